"""Modules to pure functions and back: every kind of module trains as the plain loop does."""

import copy

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import funcsam as fs
from tests.asserts import close, equal
from tests.modules import MODULES, batches, built, loss, plain_loop, pure_loop, sam

each = pytest.mark.parametrize("name", MODULES)
BUFFERED = [name for name in MODULES if fs.nn.split(built(MODULES[name]))[1]]


@each
@pytest.mark.parametrize("backend", ["autograd", "func"])
def test_a_pure_loop_is_the_plain_loop(name, backend):
    """Params, buffers and losses after three steps of SAM."""
    model, plain = built(MODULES[name]), built(MODULES[name])
    wanted = plain_loop(plain, batches())
    params, buffers, losses = pure_loop(model, batches(), backend=backend)
    close((params, buffers), fs.nn.split(plain))
    close(torch.stack(losses), torch.tensor(wanted, dtype=torch.float64))


@each
@pytest.mark.parametrize("backend", ["autograd", "func"])
def test_nothing_in_the_module_or_the_trees_changes(name, backend):
    """Neither values nor versions nor the mode, and the module still computes with its own tensors."""
    model = built(MODULES[name])
    trees = fs.nn.split(model)
    watched = [*model.parameters(), *model.buffers(), *optree.tree_leaves(trees)]
    values, versions = [t.detach().clone() for t in watched], [t._version for t in watched]
    x, y = batches()[0]
    before = loss(copy.deepcopy(model), x, y)
    pure_loop(model, batches(), backend=backend, trees=trees)
    equal([t.detach() for t in watched], values)
    assert versions == [t._version for t in watched]
    assert all(a is b for a, b in zip(watched, (*model.parameters(), *model.buffers()), strict=False))
    equal(loss(model, x, y).detach(), before.detach())


@pytest.mark.compile
@pytest.mark.parametrize("name", [name for name, case in MODULES.items() if case.compiles])
def test_a_compiled_step_is_the_step(name):
    """One graph, for whatever dynamo traces at all."""
    model = built(MODULES[name])
    close(pure_loop(model, batches(), compile="eager"), pure_loop(model, batches()))


@pytest.mark.parametrize("name", BUFFERED)
@pytest.mark.parametrize("backend", ["autograd", "func"])
def test_buffers_are_those_of_the_pass_at_the_params(name, backend):
    """Whatever the number of probes."""
    model = built(MODULES[name])
    params, buffers = fs.nn.split(model)
    loss_fn = fs.nn.loss_fn(model, loss)
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True, backend=backend)
    batch = batches()[0]
    alone = loss_fn(params, buffers, *batch)
    climb = fs.chain(fs.normalize(), fs.scale(0.3))
    for tx in (fs.sgd(0.1), fs.sam(0.3), fs.sharpness_aware(climb, steps=3)):
        equal(tx.update(params, grads_fn, tx.init(params), buffers, *batch)[2], alone)


def test_num_batches_tracked_counts_steps():
    """One per step for SAM, with three ascents, with accumulation, with an ascent on half the batch."""
    model = built(MODULES["batch norm"])
    climb = fs.chain(fs.normalize(), fs.scale(0.3))
    dims = (None, 0, 0)
    for tx in (
        fs.sam(0.3),
        fs.sharpness_aware(climb, steps=3),
        fs.chain(fs.microbatch(fs.identity(), 3, dims), fs.sam(0.3)),
        fs.microbatch(fs.sam(0.3), 2, dims, chunk_size=1),
        fs.sharpness_aware(fs.chain(fs.ascent_batch(0.5, dims), climb)),
    ):
        _, buffers, _ = pure_loop(model, batches(4), tx=fs.chain(tx, fs.sgd(0.1)))
        assert buffers["1.num_batches_tracked"] == 4


def test_running_statistics_in_closed_form():
    """After one step from (0, 1) with momentum 0.1: a tenth of the batch's mean, 0.9 plus a tenth of its variance."""
    model = nn.BatchNorm1d(1).double()
    x = torch.tensor([[1.0], [3.0], [8.0]], dtype=torch.float64)
    trees = fs.nn.split(model)
    _, buffers, _ = pure_loop(model, [(x,)], trees=trees, loss=lambda model, x: (model(x) ** 3).mean())
    close(buffers["running_mean"], torch.tensor([0.4], dtype=torch.float64))
    close(buffers["running_var"], torch.tensor([0.9 + 0.1 * 13], dtype=torch.float64))


def test_split_lists_a_tied_tensor_once():
    """Under its first name; the tied linear layers have a weight and two biases."""
    params, buffers = fs.nn.split(built(MODULES["tied and shared"]))
    assert set(params) == {"first.weight", "first.bias", "last.bias"}
    assert buffers == {}


def test_split_puts_frozen_parameters_among_the_buffers():
    params, buffers = fs.nn.split(built(MODULES["frozen"]))
    assert set(params) == {"2.weight", "2.bias"}
    assert set(buffers) == {"0.weight", "0.bias"}


@each
def test_load_undoes_split(name):
    """A trained module gives the loss that the pure function gives; storage and ties are as they were."""
    model, other = built(MODULES[name]), built(MODULES[name], seed=7)
    pointers = [t.data_ptr() for t in other.parameters()]
    params, buffers, _ = pure_loop(model, batches())
    assert fs.nn.load(other, params, buffers) is other
    close(fs.nn.split(other), (params, buffers))
    assert pointers == [t.data_ptr() for t in other.parameters()]
    batch = batches()[0]
    evaluated = fs.nn.loss_fn(model, loss)(params, buffers, *batch)[0]
    close(loss(other, *batch).detach(), evaluated)


def test_predict_is_the_module_in_evaluation_mode():
    """And leaves the mode of every part as it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    params, buffers = fs.nn.split(model)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    wanted = copy.deepcopy(model).eval()(x).detach()
    equal(fs.nn.predict(model, params, buffers, x), wanted)
    assert [part.training for part in model] == [True, False, True, True]
    assert model.training
    equal(fs.nn.split(model), (params, buffers))


def test_the_loss_sees_the_mode_of_the_module():
    model = nn.Dropout(0.5)
    evaluate = fs.nn.loss_fn(model.eval(), lambda model, x: model(x).sum())
    equal(evaluate({}, {}, torch.ones(8))[0], torch.tensor(8.0))


def test_aux_comes_beside_the_buffers():
    """With `has_aux` the loss may return metrics too."""
    model = built(MODULES["batch norm"])
    params, buffers = fs.nn.split(model)

    def with_logits(model, x, y):
        logits = model(x)
        return F.cross_entropy(logits, y), {"accuracy": (logits.argmax(-1) == y).double().mean()}

    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, with_logits, has_aux=True), has_aux=True)
    _, (value, (new, metrics)) = grads_fn(params, buffers, *batches()[0])
    equal((value, new), fs.nn.loss_fn(model, loss)(params, buffers, *batches()[0]))
    assert 0 <= metrics["accuracy"] <= 1


def test_what_is_in_neither_tree_is_the_modules_own():
    """A large frozen part need not be copied at every evaluation."""
    model = built(MODULES["frozen"])
    params, buffers = fs.nn.split(model)
    batch = batches()[0]
    equal(
        fs.nn.loss_fn(model, loss)(params, {}, *batch)[0],
        fs.nn.loss_fn(model, loss)(params, buffers, *batch)[0].detach(),
    )
    close(pure_loop(model, batches(), trees=(params, {}))[0], pure_loop(model, batches())[0])


def test_a_module_on_meta_will_do():
    """Only its forward is of use."""
    model = built(MODULES["batch norm"])
    trees = fs.nn.split(model)
    wanted = pure_loop(model, batches(), trees=trees)
    equal(pure_loop(model.to("meta"), batches(), trees=trees), wanted)


@pytest.mark.parametrize("backend", ["autograd", "func"])
def test_an_error_in_the_loss_leaves_the_module_as_it_was(backend):
    model = built(MODULES["batch norm"])
    own = [*model.parameters(), *model.buffers()]

    def broken(model, x, y):
        loss(model, x, y)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pure_loop(model, batches(), loss=broken, backend=backend)
    assert all(a is b for a, b in zip(own, (*model.parameters(), *model.buffers()), strict=True))


class Checkpointed(nn.Module):
    """Computes its body again in the backward pass."""

    def __init__(self, body):
        super().__init__()
        self.body, self.calls = body, 0

    def forward(self, x):
        return checkpoint(self._body, x, use_reentrant=False)

    def _body(self, x):
        self.calls += 1
        return self.body(x)


@pytest.mark.parametrize("name", ["batch norm", "tied and shared", "averages", "spectral norm", "attention"])
def test_activation_checkpointing_changes_nothing(name):
    """The second forward pass sees the weights and the buffers of the first, also at the probe, and leaves no trace."""
    model = Checkpointed(built(MODULES[name]))
    params, buffers, losses = pure_loop(model, batches(), backend="autograd")
    assert model.calls == 3 * 2 * 2
    wanted = pure_loop(model.body, batches(), backend="autograd")
    strip = lambda tree: {key.removeprefix("body."): leaf for key, leaf in tree.items()}  # noqa: E731
    equal((strip(params), strip(buffers), losses), wanted)


HALVES = [torch.bfloat16, torch.float16]


def autocast(dtype):
    """A loss in mixed precision."""

    def mixed(model, x, y):
        with torch.autocast("cpu", dtype=dtype):
            return loss(model, x, y)

    return mixed


def single(name):
    """A module and its data in float32."""
    return built(MODULES[name]).float(), [(x.float(), y) for x, y in batches()]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", ["autograd", "func"])
@pytest.mark.parametrize("name", ["batch norm", "batch norm 2d", "attention"])
def test_autocast_is_the_plain_loop(name, dtype, backend):
    """Gradients are float32, and those of the plain loop under autocast; `torch.func` may choose other kernels."""
    (model, data), (plain, _) = single(name), single(name)
    wanted = plain_loop(plain, data, loss=autocast(dtype))
    params, _, losses = pure_loop(model, data, loss=autocast(dtype), backend=backend)
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}
    rtol = 1e-5 if backend == "autograd" else torch.finfo(dtype).eps
    close(torch.stack(losses).float(), torch.tensor(wanted), rtol)
    close(params, fs.nn.split(plain)[0], rtol)
    exact = pure_loop(model, data)[0]
    assert any((params[key] != exact[key]).any() for key in params)


@pytest.mark.compile
def test_autocast_compiles():
    model, data = single("batch norm")
    mixed = autocast(torch.bfloat16)
    close(pure_loop(model, data, loss=mixed, compile="eager")[0], pure_loop(model, data, loss=mixed)[0], rtol=1e-5)


def test_autocast_around_the_step_is_autocast_in_the_loss():
    """The cache of casts does not outlive an evaluation: the probe is taken at `w + e`."""
    model, data = single("batch norm")
    grads_fn, tx = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True), sam()
    params, buffers = fs.nn.split(model)
    state = tx.init(params)
    for batch in data:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, *batch)
    close(params, pure_loop(model, data, loss=autocast(torch.bfloat16))[0], rtol=1e-5)


LAZY = nn.Sequential(nn.LazyLinear(2))
NORM = nn.BatchNorm1d(2)
PARAMS, BUFFERS = fs.nn.split(NORM)
LOSS_FN = fs.nn.loss_fn(NORM, lambda model, x: model(x).sum())
PAIR_FN = fs.nn.loss_fn(NORM, lambda model, x: model(x).sum(), has_aux=True)
X = torch.ones(3, 2)
BAD = [
    (
        lambda: fs.nn.split(LAZY),
        ValueError,
        "split: `model` must be initialised, got an uninitialised tensor at 0.weight. Run one batch through the model",
    ),
    (
        lambda: fs.nn.loss_fn(LAZY, loss),
        ValueError,
        "loss_fn: `model` must be initialised, got an uninitialised tensor",
    ),
    (lambda: fs.nn.load(LAZY, {}), ValueError, "load: `model` must be initialised, got an uninitialised tensor"),
    (lambda: fs.nn.split(nn.Linear), TypeError, "split: `model` must be a torch.nn.Module, got type."),
    (lambda: fs.nn.loss_fn(NORM, 0.1), TypeError, "loss_fn: `loss` must be a function, got float."),
    (
        lambda: fs.nn.load(NORM, {"scale": X}),
        ValueError,
        "load: `model` must have every name of the trees, got none at scale.",
    ),
    (
        lambda: fs.nn.load(NORM, {"weight": X}),
        ValueError,
        "load: the trees must have the shapes of `model`, got (3, 2) for (2,) at weight.",
    ),
    (
        lambda: LOSS_FN(PARAMS, X),
        TypeError,
        "loss_fn: `buffers` must be a dict of tensors by name, got Tensor. The arguments are (params, buffers,",
    ),
    (
        lambda: LOSS_FN({"scale": X}, BUFFERS, X),
        ValueError,
        "loss_fn: `params` must hold names of the module, got scale.",
    ),
    (
        lambda: LOSS_FN(PARAMS, {}, X),
        ValueError,
        "loss_fn: `buffers` must hold every buffer of the module, got none for num_batches_tracked.",
    ),
    (lambda: PAIR_FN(PARAMS, BUFFERS, X), TypeError, "with `has_aux` `loss` must return `(loss, aux)`, got Tensor."),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD, ids=[text for *_, text in BAD])
def test_bad_arguments_are_refused(make, error, text):
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


def test_load_writes_nothing_if_anything_is_wrong():
    model = nn.BatchNorm1d(2)
    before = fs.nn.split(model)
    with pytest.raises(ValueError, match="load: the trees must have the shapes"):
        fs.nn.load(model, {"bias": torch.ones(2), "weight": torch.ones(3)})
    equal(fs.nn.split(model), before)


def test_load_takes_what_requires_grad():
    """And other types, which it casts."""
    model = nn.Linear(1, 1, bias=False)
    fs.nn.load(model, {"weight": torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)})
    assert (model.weight.item(), model.weight.dtype) == (2.0, torch.float32)
