"""One graph for a whole run: nothing that moves from step to step is compiled again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import funcsam as fs
from tests.asserts import close, equal

pytestmark = pytest.mark.compile

DIMS = (None, 0, 0)
RHO, LR = fs.cosine(0.2, 8), fs.warmup_cosine(0.1, 2, 8)
CHAINS = {
    "sam, sgd": fs.chain(fs.sam(RHO), fs.clip_by_global_norm(1.0), fs.sgd(LR, momentum=0.9, weight_decay=0.01)),
    "asam, adamw": fs.chain(fs.asam(RHO), fs.adamw(LR)),
    "m-sharpness": fs.chain(fs.microbatch(fs.sam(RHO), 3, DIMS), fs.sgd(LR)),
    "groups": fs.partition(
        lambda path, leaf: leaf.ndim > 1,
        {True: fs.chain(fs.sam(RHO), fs.sgd(LR, weight_decay=0.01)), False: fs.sgd(LR)},
    ),
}


def network():
    """Convolution, batch normalisation and dropout; in float64, as AdamW makes much of rounding."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3)
    ).double()


def data(members=()):
    generator = torch.Generator().manual_seed(0)
    shape = (*members, 6)
    return [
        (
            torch.randn(*shape, 1, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, shape, generator=generator),
        )
        for _ in range(5)
    ]


def run(tx, step, trees, batches):
    """Five steps from one seed."""
    model = network()
    loss_fn = fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y))
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True)
    (params, buffers), losses = trees, []
    state = tx.init(params)
    torch.manual_seed(1)
    for batch in batches:
        params, state, (loss, buffers) = step(params, grads_fn, state, buffers, *batch)
        losses.append(loss)
    return params, state, buffers, losses


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_compiles_once(name):
    """`torch.compile(tx.step, fullgraph=True)`, with batch normalisation, dropout, a moving lr and a moving rho."""
    tx, trees, counter = CHAINS[name], fs.nn.split(network()), CompileCounter()
    compiled = torch.compile(tx.step, backend=counter, fullgraph=True)
    close(run(tx, compiled, trees, data()), run(tx, tx.step, trees, data()), rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["m-sharpness", "groups"])
def test_a_model_without_buffers(name):
    """Whose buffers are an empty dict."""
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y)), has_aux=True)
    tx, (params, buffers) = CHAINS[name], fs.nn.split(model)
    step = torch.compile(tx.step, backend="eager", fullgraph=True)
    answers = [take(params, grads_fn, tx.init(params), buffers, x, y) for take in (step, tx.step)]
    close(*answers, rtol=1e-5)
    assert answers[0][2][1] == {}


@pytest.mark.parametrize("name", ["asam, adamw", "m-sharpness"])
def test_a_run_of_an_ensemble_compiles_once(name):
    """Each member with its own batches and its own dropout masks."""
    tx, counter = fs.ensemble.vectorize(CHAINS[name]), CompileCounter()
    trees = fs.ensemble.init(network, range(3))
    compiled = torch.compile(tx.step, backend=counter, fullgraph=True)
    close(run(tx, compiled, trees, data((3,))), run(tx, tx.step, trees, data((3,))), rtol=1e-4)
    assert counter.frame_count == 1


def test_a_sweep_compiles_once():
    """Hyperparameters of the members are inputs of the graph."""
    hyper = {"rho": torch.tensor([0.0, 0.1, 0.2])}
    tx = fs.ensemble.vectorize(lambda rho: fs.chain(fs.sam(rho), fs.sgd(LR)), hyper, in_dims=(0, None, None))
    trees, counter = fs.ensemble.init(network, range(3)), CompileCounter()
    compiled = torch.compile(tx.step, backend=counter, fullgraph=True)
    close(run(tx, compiled, trees, data()), run(tx, tx.step, trees, data()), rtol=1e-4)
    assert counter.frame_count == 1


def test_code_is_built_once():
    """With the default backend too, which chooses its own memory layouts."""
    model = network().eval()  # no dropout: compiled code draws from a generator of its own
    model[1].train()
    tx = fs.ensemble.vectorize(CHAINS["sam, sgd"])
    trees = fs.ensemble.init(network, range(2))
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y)), has_aux=True)
    counters.clear()
    step = torch.compile(tx.step, fullgraph=True)
    runs = {}
    for name, take in (("compiled", step), ("eager", tx.step)):
        params, buffers = trees
        state = tx.init(params)
        for batch in data((2,)):
            params, state, (_, buffers) = take(params, grads_fn, state, buffers, *batch)
        runs[name] = (params, buffers)
    close(runs["compiled"], runs["eager"], rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_built_code_keeps_every_factor():
    """Decay, momentum and averages keep their factors where the compiler fuses them with the product before them."""
    x, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2)
    grads_fn = fs.grad_and_value(lambda w, x, y: ((x @ w - y) ** 2).mean())
    tx = fs.chain(
        fs.add_decayed_weights(0.1),
        fs.microbatch(fs.identity(), 2, chunk_size=1),
        fs.sam(0.1),
        fs.sgd(0.1, momentum=0.5, dampening=0.2),
    )
    runs = []
    for step in (torch.compile(tx.step, fullgraph=True), tx.step):
        w = torch.ones(3, 2)
        state = tx.init(w)
        for _ in range(3):
            w, state, _ = step(w, grads_fn, state, x, y)
        runs.append((w, state))
    close(*runs, rtol=1e-5)


def test_the_module_is_as_it_was():
    """Tracing leaves nothing of its own in it."""
    model = network()
    before = fs.nn.split(model)
    tx = CHAINS["sam, sgd"]
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y)), has_aux=True)
    params, buffers = before
    torch.compile(tx.step, backend="eager", fullgraph=True)(params, grads_fn, tx.init(params), buffers, *data()[0])
    equal(fs.nn.split(model), before)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
