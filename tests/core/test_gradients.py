"""From a loss to a grads_fn: both backends, and what torch can do that a loss may contain."""

import copy
import gc
import pickle
import weakref

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import funcsam as fs
from tests.asserts import close, equal
from tests.strategies import Problem, call, problems, run

BACKENDS = ("auto", "func", "autograd")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@given(problem=problems())
def test_backends_agree_with_torch(backend, problem):
    """Gradients and loss are those of `torch.func.grad_and_value`."""
    wanted = torch.func.grad_and_value(problem.loss)(problem.params)
    close(fs.grad_and_value(problem.loss, backend=backend)(problem.params), wanted)


@each_backend
def test_batch(backend):
    """What follows the params is passed on, and is not differentiated."""
    grads_fn = fs.grad_and_value(lambda w, x, y: (w * x - y) ** 2, backend=backend)
    answer = grads_fn(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(1.0))
    close(answer, (torch.tensor(30.0), torch.tensor(25.0)))


@each_backend
def test_has_aux(backend):
    """Aux is `(loss, aux)`, where the loss's own aux may be any tree of tensors."""
    grads_fn = fs.grad_and_value(lambda w: (w**2, {"w": [3 * w]}), has_aux=True, backend=backend)
    wanted = (torch.tensor(4.0), (torch.tensor(4.0), {"w": [torch.tensor(6.0)]}))
    close(grads_fn(torch.tensor(2.0)), wanted)


@each_backend
def test_unused_leaves_have_gradient_zero(backend):
    """Neither None nor an error."""
    params = {"used": torch.tensor(2.0), "unused": torch.tensor([1.0, 2.0])}
    grads, _ = fs.grad_and_value(lambda params: params["used"] ** 2, backend=backend)(params)
    equal(grads, {"used": torch.tensor(4.0), "unused": torch.zeros(2)})


@each_backend
@pytest.mark.parametrize("params", [{}, (), {"w": torch.ones(2)}], ids=str)
def test_a_loss_of_nothing(backend, params):
    """A loss that does not depend on the params has gradient zero."""
    answer = fs.grad_and_value(lambda params: torch.tensor(3.0), backend=backend)(params)
    equal(answer, (optree.tree_map(torch.zeros_like, params), torch.tensor(3.0)))


@each_backend
def test_aux_keeps_no_graph(backend):
    """What a loss returns needs no grad, and what it computed on the way is freed."""
    inner = []

    def loss_fn(w):
        hidden = (2 * w).exp()
        inner.append(weakref.ref(hidden))
        return hidden.sum(), {"hidden": hidden.sum(), "twice": hidden * 2}

    answer = fs.grad_and_value(loss_fn, has_aux=True, backend=backend)(torch.ones(3))
    gc.collect()
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(answer))
    assert inner[0]() is None


@each_backend
def test_no_grad_outside(backend):
    """`torch.no_grad` around a step does not take the gradients away."""
    with torch.no_grad():
        grads, _ = fs.grad_and_value(lambda w: w**2, backend=backend)(torch.tensor(3.0))
    equal(grads, torch.tensor(6.0))


@pytest.fixture
def model():
    """A small network with numbers that can be told apart."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.linspace(-1, 1, param.numel()).reshape(param.shape))
    return net


X = torch.tensor([[1.0, -0.5], [0.25, 2.0]], dtype=torch.float64)


def test_activation_checkpointing(model):
    """With the autograd backend a checkpointed loss has the gradients, and SAM the steps, of a plain one."""

    def saving(params, x):
        return checkpoint(lambda x: functional_call(model, params, (x,)), x, use_reentrant=False).square().sum()

    def plain(params, x):
        return functional_call(model, params, (x,)).square().sum()

    params = {name: param.detach() for name, param in model.named_parameters()}
    tx = fs.chain(fs.sam(0.1), fs.sgd(0.1))
    answers = [
        tx.step(params, fs.grad_and_value(loss, backend="autograd"), tx.init(params), X) for loss in (saving, plain)
    ]
    close(*answers)


def test_params_of_a_module(model):
    """Parameters that require grad are values: no graph grows, and the module stays as it was."""
    params = dict(model.named_parameters())
    before = {name: param.detach().clone() for name, param in params.items()}
    grads_fn = fs.grad_and_value(lambda params, x: functional_call(model, params, (x,)).square().sum())
    tx = fs.chain(fs.sam(0.1), fs.adamw(0.1))
    state, new = tx.init(params), params
    for _ in range(2):
        new, state, aux = tx.step(new, grads_fn, state, X)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves((new, state, aux)))
    equal({name: param.detach() for name, param in params.items()}, before)
    assert all(param.grad is None for param in model.parameters())


def test_bare_autograd(model):
    """A `grads_fn` may call `torch.autograd.grad` itself; its graph does not outlive the step."""
    params = dict(model.named_parameters())

    def grads_fn(params, x):
        leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
        loss = functional_call(model, leaves, (x,)).square().sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)), loss.detach()

    mine = fs.grad_and_value(lambda params, x: functional_call(model, params, (x,)).square().sum())
    tx = fs.chain(fs.asam(0.5), fs.sgd(0.1))
    state = tx.init(params)
    close(tx.step(params, grads_fn, state, X), tx.step(params, mine, state, X))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("how", ["auto", "func", "autograd", "bare", "bare func"])
def test_sparse_gradients_among_others(how, place):
    """One sparse gradient, wherever it stands: the step, and every gradient, is as if all were dense."""
    ids = torch.tensor([0, 2, 2])
    params = tuple(torch.arange(6.0).reshape(3, 2).sin() + k for k in range(3))

    def loss(params, sparse):
        tables = [F.embedding(ids, w, sparse=sparse and k == place) for k, w in enumerate(params)]
        return (tables[0] * tables[1].cos() + tables[2]).square().sum()

    def bare(params, sparse):
        leaves = [leaf.detach().requires_grad_() for leaf in params]
        return torch.autograd.grad(loss(leaves, sparse), leaves), ()

    grads_fn = {"bare": bare, "bare func": torch.func.grad(loss)}.get(how)
    grads_fn = fs.grad_and_value(loss, backend=how) if grads_fn is None else grads_fn
    tx, seen = fs.chain(fs.lift(lambda params: (), lambda g, s, w: (seen.append(g), (g, s))[1]), fs.sam(0.3)), []
    with torch.enable_grad():
        answers = [tx.step(params, grads_fn, tx.init(params), sparse)[0] for sparse in (True, False)]
    close(*answers, rtol=1e-6)
    assert all(g.layout is torch.strided for grads in seen for g in grads)
    assert len(seen) == 4


def test_sparse_gradients_come_back_dense():
    """An embedding with `sparse=True` takes the step that a dense one takes."""
    ids = torch.tensor([0, 2, 2])
    answers = []
    for sparse in (True, False):
        table = nn.Embedding(4, 2, sparse=sparse)
        params = {"weight": torch.linspace(-1, 1, 8).reshape(4, 2)}
        grads_fn = fs.grad_and_value(
            lambda params, ids, table=table: functional_call(table, params, (ids,)).square().sum(), backend="autograd"
        )
        tx = fs.chain(fs.sam(0.5), fs.adamw(0.1))
        answers.append(tx.step(params, grads_fn, tx.init(params), ids))
    close(*answers, rtol=1e-6)


@each_backend
def test_batch_norm_statistics_are_those_of_the_params(backend):
    """Buffers cloned in the loss and returned as aux come from the pass at the params, not from the probe."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double().train()
    params = {name: param.detach() for name, param in net.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in net.named_buffers()}

    def loss_fn(params, buffers, x):
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(net, (params, fresh), (x,)).pow(3).sum(), fresh

    tx = fs.chain(fs.sam(0.5), fs.sgd(0.1))
    state = tx.init(params)
    _, _, (loss, after) = tx.step(params, fs.grad_and_value(loss_fn, has_aux=True, backend=backend), state, buffers, X)
    equal((loss, after), loss_fn(params, buffers, X))
    assert after["1.num_batches_tracked"] == 1


def test_auto_under_vmap_and_grad():
    """`auto` composes with `torch.func`: an ensemble, and a second derivative."""
    grads_fn = fs.grad_and_value(lambda w: (w**3).sum())
    close(torch.vmap(grads_fn)(torch.tensor([[1.0], [2.0]]))[0], torch.tensor([[3.0], [12.0]]))
    close(torch.func.grad(lambda w: grads_fn(w)[0].sum())(torch.tensor([2.0])), torch.tensor([12.0]))


@given(problem=problems())
def test_backends_take_the_same_steps(problem):
    """SAM with momentum, three steps."""
    tx = fs.chain(fs.sam(0.25), fs.sgd(0.01, momentum=0.9))

    class Func(Problem):
        @property
        def grads_fn(self):
            return fs.grad_and_value(self.loss, backend="func")

    close(run(tx, Func(*problem), 3), run(tx, problem, 3), rtol=1e-7)


def test_dropout_under_func_needs_no_more_than_a_seed():
    """A loss may draw random numbers; with the seed set inside the loss all evaluations see the same mask."""

    def loss_fn(w):
        torch.manual_seed(0)
        return F.dropout(w, 0.5).sum()

    w = torch.ones(8)
    equal(call(fs.sam(0.5), Problem(w, loss_fn))[0], fs.grad_and_value(loss_fn)(w)[0])


@pytest.mark.compile
def test_aux_may_be_an_empty_dict_in_a_compiled_step():
    """A network without buffers returns none; the step still compiles as one graph."""
    grads_fn = fs.grad_and_value(lambda w: ((w * w).sum(), {}), has_aux=True)
    tx, w = fs.chain(fs.sam(0.5), fs.sgd(0.1)), torch.tensor([3.0, 4.0])
    step = torch.compile(lambda w, state: tx.step(w, grads_fn, state), backend="eager", fullgraph=True)
    (new, _, (loss, aux)), plain = step(w, tx.init(w)), tx.step(w, grads_fn, tx.init(w))
    torch.testing.assert_close(new, plain[0])
    assert (loss.item(), aux) == (25.0, {})


@pytest.mark.parametrize("backend", ["func", "autograd"])
def test_a_scaled_loss_keeps_its_backend(backend):
    """Whatever computes the gradients computes those of the loss times a factor."""
    seen = []

    def loss_fn(w):
        seen.append(torch._C._functorch.is_functorch_wrapped_tensor(w))
        return w**2

    grads_fn = fs.grad_and_value(loss_fn, backend=backend).scaled(torch.tensor(8.0))
    equal(grads_fn(torch.tensor(3.0)), (torch.tensor(48.0), torch.tensor(9.0)))
    assert seen == [backend == "func"]


def test_grads_fns_are_shown_and_copied():
    """By the name of the loss; a copy gives the same."""
    grads_fn = fs.grad_and_value(torch.linalg.vector_norm, backend="func")
    assert repr(fs.grad_and_value(F.softplus)) == "grad_and_value(softplus, has_aux=False, backend='auto')"
    for copied in (copy.deepcopy(grads_fn), pickle.loads(pickle.dumps(grads_fn))):
        equal(copied(torch.tensor([3.0, 4.0])), grads_fn(torch.tensor([3.0, 4.0])))
