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
from tests.modules import MODULES, allocated, batches, built, loss, plain_loop, pure_loop, sam

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
    (
        lambda: LOSS_FN(PARAMS, BUFFERS | {"weight": X[0]}, X),
        ValueError,
        "loss_fn: `params` and `buffers` must not share a name, got weight in both.",
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


def changing():
    """A module with a tied weight, whose parts the tests below replace."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[3].weight = model[2].weight
    return model


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model[0], "weight", Twice())


def to_a_buffer(model):
    """Moves the last parameter of a module in front of its buffers: all in all the same tensors in the same order."""
    norm = model[1]
    buffers = {"bias": norm._parameters.pop("bias"), **norm._buffers}
    norm._buffers.clear()
    norm._buffers.update(buffers)


CHANGES = {
    "a layer is replaced": lambda model: model.__setitem__(0, nn.Linear(4, 4).double()),
    "batch normalisation is replaced": lambda model: model.__setitem__(1, nn.BatchNorm1d(4).double()),
    "a parameter is replaced": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(4, 4).double())),
    "a layer is added": lambda model: model.append(nn.Linear(4, 4).double()),
    "a layer is removed": lambda model: model.pop(0),
    "weights are tied": lambda model: setattr(model[0], "weight", model[2].weight),
    "weights are untied": lambda model: setattr(model[3], "weight", nn.Parameter(torch.ones(4, 4).double())),
    "a layer is renamed": lambda model: model._modules.__setitem__("last", model._modules.pop("3")),
    "a buffer is added": lambda model: model.register_buffer("seen", torch.ones(2)),
    "a parameter becomes a buffer": to_a_buffer,
    "a parametrisation is added": parametrized,
    "the module is cast": lambda model: model.float(),
}
MISFITS = {
    "a layer is renamed": "`params` must hold names of the module, got 3.bias. If the module has changed, `split` it",
    "a layer is removed": "`params` must hold names of the module, got 2.weight. If the module has changed, `split` it",
    "weights are tied": "`params` must hold names of the module, got 2.weight. If the module has changed, `split` it",
    "a buffer is added": "`buffers` must hold every buffer of the module, got none for seen. If the module has changed",
    "a parameter becomes a buffer": "`buffers` must hold every buffer of the module, got none for 1.bias.",
    "a parametrisation is added": "`params` must hold names of the module, got 0.weight. If the module has changed",
}
WAYS = ["autograd", "func", pytest.param("compiled", marks=pytest.mark.compile)]


def stepper(model, way):
    """A step of SAM on a loss made now, as a function of trees and batch."""
    backend = "auto" if way == "compiled" else way
    grads_fn, tx = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True, backend=backend), sam()
    step = torch.compile(tx.step, backend="eager", fullgraph=True) if way == "compiled" else tx.step
    return lambda trees, x, y: step(trees[0], grads_fn, tx.init(trees[0]), trees[1], x, y)


COMPILED = ["batch normalisation is replaced", "weights are tied", "a buffer is added"]


@pytest.mark.parametrize(
    ("change", "way"),
    [
        *((change, way) for change in CHANGES for way in WAYS[:2]),
        *(pytest.param(change, "compiled", marks=pytest.mark.compile) for change in COMPILED),
    ],
)
def test_a_module_is_evaluated_as_it_is_at_the_call(change, way):
    """After any change a loss made before is the loss made now; trees from before fit, or are refused."""
    model = changing()
    old, (x, y) = fs.nn.split(model), batches()[0]
    step = stepper(model, way)
    step(old, x, y)
    CHANGES[change](model)
    trees = fs.nn.split(model)
    x = x.to(next(model.parameters()).dtype)
    watched = [*model.parameters(), *model.buffers()]
    versions = [t._version for t in watched]
    close(step(trees, x, y), stepper(model, "autograd")(trees, x, y), rtol=1e-5)
    assert versions == [t._version for t in watched]
    if change in MISFITS:
        error = ValueError if way != "compiled" else torch._dynamo.exc.Unsupported
        with pytest.raises(error) as caught:
            step(old, x, y)
        assert MISFITS[change] in str(caught.value)


def test_a_replaced_layer_is_differentiated():
    """`3 w` has the gradient 3, whatever layer the weight sits in."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, lambda model, x: model(x).sum()), has_aux=True)
    model[0] = nn.Linear(1, 1, bias=False)
    equal(grads_fn(*fs.nn.split(model), torch.tensor([3.0]))[0], {"0.weight": torch.tensor([[3.0]])})


@pytest.mark.parametrize("way", WAYS)
def test_cached_parametrisations_are_computed_anew(way):
    """Inside `parametrize.cached()` gradient, loss and prediction are those outside; the cache stays the module's."""
    model = changing()
    parametrized(model)
    trees, (x, y) = fs.nn.split(model), batches()[0]
    step = stepper(model, way)
    wanted, predicted = step(trees, x, y), fs.nn.predict(model, *trees, x)
    other = {name: p + 1 for name, p in trees[0].items()}
    shifted = fs.nn.predict(model, other, trees[1], x)
    with nn.utils.parametrize.cached():
        own = model[0].weight
        equal(step(trees, x, y), wanted)
        equal(fs.nn.predict(model, *trees, x), predicted)
        equal(fs.nn.predict(model, other, trees[1], x), shifted)
        assert model[0].weight is own


def test_what_is_not_written_comes_back_itself():
    """Frozen params and buffers of the module in evaluation mode are the given tensors; what is written is new."""
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    params, buffers = fs.nn.split(model)
    evaluate = fs.nn.loss_fn(model, loss)
    new = evaluate(params, buffers, *batches()[0])[1]
    assert {name for name in buffers if new[name] is not buffers[name]} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    new = fs.nn.loss_fn(model.eval(), loss)(params, buffers, *batches()[0])[1]
    assert all(new[name] is buffers[name] for name in buffers)


class Writer(nn.Module):
    """Changes its frozen parameter in one of the ways there are."""

    def __init__(self, write):
        super().__init__()
        self.linear, self.frozen, self.write = nn.Linear(4, 4), nn.Parameter(torch.eye(4), requires_grad=False), write
        self.register_buffer("other", torch.ones(4, 4))

    def forward(self, x):
        with torch.no_grad():
            self.write(self)
        return self.linear(x @ self.frozen)


WRITES = {
    "in place": lambda module: module.frozen.add_(1),
    "through .data": lambda module: module.frozen.data.add_(1),
    "through a view": lambda module: module.frozen[0].add_(1),
    "by index": lambda module: module.frozen.__setitem__(0, 5.0),
    "by a fused kernel": lambda module: torch._foreach_add_([module.frozen], 1),
    "as out=": lambda module: torch.add(module.frozen, 1, out=module.frozen),
    "by NumPy": lambda module: module.frozen.numpy().__iadd__(1),
    "its shape": lambda module: module.frozen.t_(),
    "its storage": lambda module: setattr(module.frozen, "data", module.linear.weight.detach()),
    "its storage, by that of a buffer": lambda module: setattr(module.frozen, "data", module.other),
    "by a copy": lambda module: module.frozen.copy_(module.linear.weight),
    "a new tensor": lambda module: module._parameters.__setitem__("frozen", module.frozen + 1),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("foreign", [False, True], ids=["", "memory of NumPy"])
def test_what_a_module_writes_comes_back_and_goes_nowhere_else(write, foreign):
    """However it writes, as `copy.deepcopy` of it does; the trees and the module stay as they are."""
    model = Writer(WRITES[write]).double()
    params, buffers = fs.nn.split(model)
    buffers["frozen"][0, 1] = 0.5
    if foreign:
        buffers["frozen"] = torch.from_numpy(buffers["frozen"].numpy())
    before = {name: t.clone() for name, t in buffers.items()}
    batch = batches()[0]
    plain = fs.nn.load(copy.deepcopy(model), params, buffers)
    wanted = loss(plain, *batch).detach()
    for backend in ("autograd", "func"):
        grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True, backend=backend)
        if backend == "func" and (write == "by NumPy" or write.startswith("its storage")):
            continue  # `torch.func` has neither
        value, new = grads_fn(params, buffers, *batch)[1]
        equal((value, new["frozen"]), (wanted, plain.frozen.detach()))
    equal(buffers, before)
    equal(model.frozen.detach(), torch.eye(4, dtype=torch.float64))


def test_checkpointing_writes_to_frozen_parameters_once():
    """As to buffers: what comes back is what the forward pass wrote."""
    model = Checkpointed(built(MODULES["shadow"]))
    strip = lambda tree: {key.removeprefix("body."): leaf for key, leaf in tree.items()}  # noqa: E731
    params, buffers, losses = pure_loop(model, batches(), backend="autograd")
    equal((strip(params), strip(buffers), losses), pure_loop(model.body, batches(), backend="autograd"))


@pytest.mark.parametrize("backend", ["autograd", "func"])
def test_a_step_takes_no_memory_for_a_frozen_base(backend):
    """A base ten times as large takes the same bytes, step after step."""
    sizes = []
    for rows in (1000, 10000):
        model = nn.Sequential(nn.Embedding(rows, 4).requires_grad_(False), nn.Linear(4, 4))
        params, buffers = fs.nn.split(model)
        grads_fn, tx = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True, backend=backend), sam()
        state, x = tx.init(params), torch.arange(4)
        for _ in range(2):
            step = lambda: tx.step(params, grads_fn, state, buffers, x, x)  # noqa: B023, E731
            size = allocated(step)
            params, state, (_, buffers) = step()
        sizes.append(size)
    assert 0 < sizes[0] == sizes[1] < 16000


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_loop_on_an_unfrozen_backbone_grows_no_graph(way):
    """What is in neither tree is a value, though it requires grad."""
    model = changing()
    params, buffers = fs.nn.split(model)
    step, (x, y) = stepper(model, way), batches()[0]
    head = {name: p for name, p in params.items() if name.startswith("2.")}
    rest = {name: p for name, p in params.items() if name not in head}
    wanted = stepper(model, "autograd")((head, buffers | rest), x, y)
    for _ in range(3):
        answer = step((head, buffers), x, y)
        head, buffers = answer[0], answer[2][1]
        assert not any(leaf.requires_grad for leaf in optree.tree_leaves(answer))
        if wanted is not None:
            close((answer[:2], answer[2][0]), (wanted[:2], wanted[2][0]))
            wanted = None
    assert not fs.nn.loss_fn(model, loss)(head, buffers, x, y)[0].requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


REFUSED = "loss_fn: activation checkpointing must be differentiated by `grad_and_value(loss_fn, has_aux=True)`, got"


def test_checkpointing_in_a_loss_around_the_loss_is_refused():
    """Its second forward pass would see the module's own tensors; without a backward pass there is none."""
    model = Checkpointed(built(MODULES["batch norm"]))
    params, buffers = fs.nn.split(model)
    evaluate, batch = fs.nn.loss_fn(model, loss), batches()[0]
    around = lambda params: evaluate(params, buffers, *batch)[0]  # noqa: E731
    other = {name: (p + 1).requires_grad_() for name, p in params.items()}
    for run in (
        lambda: fs.grad_and_value(around, backend="autograd")(other),
        lambda: around(other).backward(),
        lambda: fs.nn.predict(model, other, buffers, batch[0]).sum().backward(),
    ):
        with pytest.raises(RuntimeError) as caught:
            run()
        assert REFUSED in str(caught.value)
    detached = {name: p.detach() for name, p in other.items()}
    wanted = fs.nn.loss_fn(model.body, loss)(*({k[5:]: v for k, v in t.items()} for t in (detached, buffers)), *batch)
    equal(around(detached), wanted[0])
    with torch.no_grad():
        equal(around(other), wanted[0])
        assert fs.nn.predict(model, other, buffers, batch[0]).shape == (6, 4)


def test_checkpointing_around_the_loss_is_allowed():
    """It computes all of the evaluation again; so are hooks that only move tensors."""
    model = built(MODULES["batch norm"])
    params, buffers = fs.nn.split(model)
    evaluate, batch = fs.nn.loss_fn(model, loss), batches()[0]
    around = lambda params: evaluate(params, buffers, *batch)[0]  # noqa: E731
    wanted = fs.grad_and_value(around, backend="autograd")(params)
    again = lambda params: checkpoint(around, params, use_reentrant=False)  # noqa: E731
    equal(fs.grad_and_value(again, backend="autograd")(params), wanted)
    with torch.autograd.graph.save_on_cpu():
        equal(fs.grad_and_value(around, backend="autograd")(params), wanted)


def test_checkpointing_is_not_differentiated_twice():
    """The second backward pass would run parts again when the tensors have left the module."""
    model = Checkpointed(built(MODULES["linear"]))
    params, buffers = fs.nn.split(model)
    params = {name: p.requires_grad_() for name, p in params.items()}
    evaluate, batch = fs.nn.loss_fn(model, loss), batches()[0]
    with (
        evaluate.in_force(differentiated=True) as held,
        pytest.raises(RuntimeError, match="must not be differentiated twice"),
    ):
        held(params, buffers, *batch)
    plain = fs.nn.loss_fn(model.body, loss)
    params = {name.removeprefix("body."): p for name, p in params.items()}
    with plain.in_force(differentiated=True) as held:
        equal(held(params, buffers, *batch), plain(params, buffers, *batch))


def test_modes():
    """Inference mode, no gradients, vmap, deterministic kernels and another default device change nothing."""
    model = built(MODULES["batch norm"])
    trees, batch = fs.nn.split(model), batches()[0]
    evaluate = fs.nn.loss_fn(model, loss)
    wanted, predicted = evaluate(*trees, *batch), fs.nn.predict(model, *trees, batch[0])
    before = [leaf.clone() for leaf in optree.tree_leaves(trees)]

    def check():
        equal(evaluate(*trees, *batch), wanted)
        equal(fs.nn.predict(model, *trees, batch[0]), predicted)
        equal(fs.nn.split(model), trees)
        equal(fs.nn.split(fs.nn.load(copy.deepcopy(model), *trees)), trees)

    for mode in (torch.inference_mode(), torch.no_grad(), torch.device("meta")):
        with mode:
            check()
    torch.use_deterministic_algorithms(True)
    try:
        check()
    finally:
        torch.use_deterministic_algorithms(False)
    many = torch.vmap(evaluate, in_dims=(None, None, 0, 0))(*trees, *(x[None].repeat_interleave(2, 0) for x in batch))
    close(optree.tree_map(lambda leaf: leaf[1], many), wanted)
    equal([leaf.clone() for leaf in optree.tree_leaves(trees)], before)
