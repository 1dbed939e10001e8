"""Ways to differentiate x what is differentiated: each cell of the table in the documentation is the derivative, or an
error that says what to use."""

import pathlib
import re

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, functional

import funcsam as fs
from tests.asserts import close

F64 = torch.float64
TABLE = pathlib.Path(__file__).parents[2] / ".ci" / "docs" / "derivatives.md"


def tensor(*values):
    """Float64, of shape () if there is one value."""
    return torch.tensor(values if len(values) > 1 else values[0], dtype=F64)


W, MATRIX = tensor(1.0, 2.0), torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)


def quartic(w):
    """Its Hessian is not constant."""
    return (w**4).sum() / 4 + w @ MATRIX @ w / 2


def query(w):
    """What is looked at in the end."""
    return torch.cos(w).sum()


def steps(tx, w, loss=quartic, *batch, backend="auto"):
    """Params and the last loss after three steps."""
    grads_fn, state = fs.grad_and_value(loss, backend=backend), tx.init(w)
    for _ in range(3):
        w, state, value = tx.step(w, grads_fn, state, *batch)
    return w, value


def trained(tx, w=W, loss=quartic, *batch):
    """A number from the params and the last loss."""
    w, value = steps(tx, w, loss, *batch)
    return query(w) + 0.1 * value


def sam(rho=0.3, lr=0.01):
    """The chain of most rows."""
    return fs.chain(fs.sam(rho), fs.sgd(lr, momentum=0.5))


def members(x, chunk_size, hyper=True):
    """Three members, which share a number or start from it, and step together."""
    start = torch.stack([W, W + 0.5, W - 0.3])
    make = (lambda scale: sam(rho=scale * x)) if hyper else (lambda scale: sam(rho=0.3 * scale))
    tx = fs.ensemble.vectorize(make, {"scale": tensor(1.0, 0.5, 2.0)}, chunk_size=chunk_size)
    return query(steps(tx, start if hyper else start * x)[0])


def around(x, chunk_size):
    """The number of each member is differentiated inside of `vmap`."""

    def slope(scale):
        return torch.func.grad(lambda rho: trained(sam(rho * scale)))(x)

    return torch.vmap(slope, chunk_size=chunk_size)(tensor(0.5, 1.0, 1.5)).sum()


class Network(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3, dtype=F64), nn.Linear(3, 1, dtype=F64)
        for k, p in enumerate(self.parameters()):
            p.data = torch.linspace(-1, 1, p.numel(), dtype=F64).reshape(p.shape) + 0.1 * k

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


MODEL = Network()


def network(rho):
    """Three steps of a module."""
    model, x, y = MODEL, tensor(1.0, -0.5).repeat(4, 1), torch.linspace(-1, 1, 4, dtype=F64)[:, None]
    loss_fn = fs.nn.loss_fn(model, lambda model, x, y: (model(x) - y).square().mean())
    (params, buffers), tx = fs.nn.split(model), sam(rho, lr=0.1)
    grads_fn, state = fs.grad_and_value(loss_fn, has_aux=True), tx.init(params)
    for _ in range(3):
        params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, x, y)
    return loss_fn(params, buffers, x, y + 1)[0]


def eigenvalue(w):
    """Of the Hessian, the largest."""
    return fs.measures.hessian_eigenpairs(quartic, w).values.sum()


WHAT = {
    "rho": (lambda x: trained(fs.chain(fs.sam(x), fs.sgd(0.01))) + 0.1 * x**2, tensor(0.5)),
    "lr": (lambda x: trained(sam(lr=x)), tensor(0.02)),
    "momentum, dampening": (
        lambda x: trained(fs.chain(fs.sam(0.3), fs.sgd(0.01, momentum=x, dampening=x / 2))),
        tensor(0.5),
    ),
    "eta, weight decay, betas, eps": (
        lambda x: trained(fs.chain(fs.asam(0.3, eta=x), fs.adamw(0.05, (x, 1 - x / 5), x / 9, x))),
        tensor(0.5),
    ),
    "gsam": (lambda x: trained(fs.chain(fs.gsam(x, alpha=x / 2), fs.sgd(0.01))), tensor(0.5)),
    "looksam": (lambda x: trained(fs.chain(fs.looksam(x, alpha=x, k=2), fs.sgd(0.01))), tensor(0.5)),
    "msam": (lambda x: trained(fs.chain(fs.msam(x, momentum=x), fs.sgd(0.01))), tensor(0.5)),
    "clipping": (lambda x: trained(fs.chain(fs.clip_by_global_norm(x), fs.sam(0.1), fs.sgd(0.1))), tensor(3.0)),
    "a schedule": (lambda x: trained(sam(rho=fs.cosine(x, 5))), tensor(0.5)),
    "initial params": (lambda x: trained(sam(), W * x), tensor(1.1)),
    "MAML": (lambda w: query(steps(sam(), w * 1.0)[0]) + 0.1 * quartic(w), W),
    "a number in the loss": (lambda x: trained(sam(), W, lambda w: quartic(w) + x * (w**2).sum()), tensor(0.7)),
    "the batch": (lambda x: trained(sam(), W, lambda w, b: quartic(w * b), W * x), tensor(0.7)),
    "slices": (
        lambda x: trained(
            fs.chain(fs.microbatch(fs.sam(x), 2, chunk_size=1), fs.sgd(0.01)),
            W,
            lambda w, b: quartic(w * b.mean()),
            tensor(0.5, 1.0, 1.5),
        ),
        tensor(0.4),
    ),
    "groups": (
        lambda x: query(
            steps(
                fs.partition({"a": 0, "b": 1}, {0: sam(x), 1: fs.adam(x / 10)}),
                {"a": W, "b": W / 2},
                lambda w: quartic(w["a"] * w["b"]),
            )[0]["a"]
        ),
        tensor(0.4),
    ),
    "a step's own loss": (lambda x: steps(sam(x), W)[1], tensor(0.4)),
    "a module": (network, tensor(0.3)),
    "a vectorised step": (lambda x: members(x, None), tensor(0.4)),
    "a vectorised step, chunk_size=2": (lambda x: members(x, 2), tensor(0.4)),
    "a vectorised step, chunk_size=1": (lambda x: members(x, 1), tensor(0.4)),
    "a vectorised step's params": (lambda x: members(x, None, hyper=False), tensor(0.9)),
    "a vectorised step's params, chunk_size=1": (lambda x: members(x, 1, hyper=False), tensor(0.9)),
    "a hyper-gradient under vmap": (lambda x: around(x, None), tensor(0.4)),
    "a hyper-gradient under vmap, chunk_size=1": (lambda x: around(x, 1), tensor(0.4)),
    "gradients": (lambda w: query(fs.grad_and_value(quartic)(w)[0] / 9), W),
    "gradient norm": (lambda w: quartic(w) + fs.measures.gradient_norm(quartic, w), W),
    "worst-case sharpness": (lambda w: quartic(w) + fs.measures.worst_case_sharpness(quartic, w, rho=0.1), W),
    "worst-case sharpness, several steps": (
        lambda w: fs.measures.worst_case_sharpness(quartic, w, rho=0.1, steps=3, adaptive=True, eta=0.1),
        W,
    ),
    "m-sharpness": (
        lambda w: fs.measures.m_sharpness(lambda w, b: quartic(w * b.mean()), w, W, m=1, rho=0.1),
        W,
    ),
    "m-sharpness, chunk_size=1": (
        lambda w: fs.measures.m_sharpness(lambda w, b: quartic(w * b.mean()), w, W, m=1, rho=0.1, chunk_size=1),
        W,
    ),
    "average-case sharpness": (
        lambda w: fs.measures.average_case_sharpness(quartic, w, rho=0.1, draws=4)[0],
        W,
    ),
    "trace of the Hessian": (lambda w: fs.measures.hessian_trace(quartic, w, draws=2)[0], W),
    "eigenvalues of the Hessian": (eigenvalue, W),
    "a landscape": (
        lambda x: fs.landscape.line(quartic, W * x, W + x, [0.0, 0.3, 1.0]).sum(),
        tensor(0.9),
    ),
    "a landscape, chunk_size=2": (
        lambda x: fs.landscape.grid(quartic, W * x, (W, W + x), [0.1, 0.2], [0.3], chunk_size=2).sum(),
        tensor(0.9),
    ),
}


def backward(fn, x):
    """The loop of torch."""
    x = x.clone().requires_grad_()
    fn(x).backward()
    return x.grad


def dual(fn, x):
    """Forward mode by hand, along each axis."""
    found = []
    for direction in torch.eye(x.numel(), dtype=x.dtype):
        with forward_ad.dual_level():
            answer = fn(forward_ad.make_dual(x, direction.reshape(tuple(x.shape))))
            tangent = forward_ad.unpack_dual(answer).tangent
        found.append(torch.zeros_like(answer) if tangent is None else tangent)
    return torch.stack(found).reshape(tuple(x.shape))


def along(take, x):
    """Forward mode along each axis."""
    found = [take(direction.reshape(tuple(x.shape))) for direction in torch.eye(x.numel(), dtype=x.dtype)]
    return torch.stack(found).reshape(tuple(x.shape))


WAYS = {
    "func.grad": lambda fn, x: torch.func.grad(fn)(x),
    "func.vjp": lambda fn, x: torch.func.vjp(fn, x)[1](torch.ones((), dtype=F64))[0],
    "func.jvp": lambda fn, x: along(lambda v: torch.func.jvp(fn, (x,), (v,))[1], x),
    "func.jacrev": lambda fn, x: torch.func.jacrev(fn)(x),
    "func.jacfwd": lambda fn, x: torch.func.jacfwd(fn)(x),
    "func.linearize": lambda fn, x: along(torch.func.linearize(fn, x)[1], x),
    "func.hessian": lambda fn, x: torch.func.hessian(fn)(x),
    "`grad_and_value`": lambda fn, x: fs.grad_and_value(fn)(x)[0],
    '`backend="func"`': lambda fn, x: fs.grad_and_value(fn, backend="func")(x)[0],
    '`backend="autograd"`': lambda fn, x: fs.grad_and_value(fn, backend="autograd")(x)[0],
    "backward": backward,
    "forward_ad": dual,
    "autograd.functional": functional.jacobian,
}


def quotients(fn, x, step=1e-5):
    """Central differences along each axis."""
    found = []
    for direction in torch.eye(x.numel(), dtype=x.dtype):
        shift = step * direction.reshape(tuple(x.shape))
        found.append((fn(x + shift) - fn(x - shift)) / (2 * step))
    return torch.stack(found).reshape((*x.shape, *found[0].shape)).detach()


def cell(what, way):
    """What comes of it: the derivative, an error, or something else."""
    fn, x = WHAT[what]
    try:
        wanted = quotients((lambda x: torch.func.grad(fn)(x)) if way == "func.hessian" else fn, x)
        found = WAYS[way](fn, x)
    except (RuntimeError, NotImplementedError) as error:
        return f"error: {error}"
    assert (wanted.abs() > 1e-4).any()
    try:
        close(found.detach() / wanted.abs().max(), wanted / wanted.abs().max(), rtol=2e-5)
    except AssertionError:
        return f"WRONG: {found} for {wanted}"
    return "value"


def table():
    """The cells of the documentation, by row and column."""
    tried = TABLE.read_text().split("## What was tried")[1]
    rows = [line for line in tried.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows]
    assert cells[0][1:] == list(WAYS)
    assert [row[0] for row in cells[2:]] == list(WHAT)
    return {row[0]: dict(zip(WAYS, row[1:], strict=True)) for row in cells[2:]}


@pytest.mark.filterwarnings("ignore:.*get_attr Node.*")  # torch.func.linearize, of its own graph
@pytest.mark.parametrize("what", WHAT)
def test_each_cell_of_the_table(what):
    """The derivative, by central differences in float64, or an error; the documentation says which."""
    found = {way: cell(what, way).split(":")[0] for way in WAYS}
    assert found == table()[what]


def tracked(*values):
    """A leaf that requires grad."""
    return tensor(*values).requires_grad_()


def test_a_leaf_before_and_after_the_steps():
    """The one use that cannot be seen: the steps take a leaf as a value. A copy that is no leaf is differentiated."""
    w = tracked(1.0, 2.0)
    new, _ = steps(sam(), w)
    assert not new.requires_grad
    (found,) = torch.autograd.grad(query(new) + 0.1 * quartic(w), w)
    close(found, torch.func.grad(lambda w: 0.1 * quartic(w))(W))
    new, _ = steps(sam(), w.clone())
    (found,) = torch.autograd.grad(query(new) + 0.1 * quartic(w), w)
    close(found, quotients(WHAT["MAML"][0], W), rtol=1e-6)


@pytest.mark.parametrize("take", [functional.jacobian, functional.vjp, functional.jvp])
def test_autograd_functional_is_refused_where_it_would_be_zero(take):
    """Its inputs are leaves; those of `hessian` are not."""
    with pytest.raises(RuntimeError, match=r"^step: params that are leaves must not be differentiated by torch.autogr"):
        take(lambda w: query(steps(sam(), w)[0]), W, *([W] if take is functional.jvp else []))
    close(
        functional.hessian(lambda w: query(steps(sam(), w)[0]), W),
        torch.func.hessian(lambda w: query(steps(sam(), w)[0]))(W),
    )


def test_params_used_a_second_time_by_the_loss():
    """A loss may hold on to the first params: gradients are those by its argument alone."""

    def near(w):
        start = w * 1.0
        return query(steps(sam(), start, lambda v: quartic(v) + (v * start).sum())[0])

    wanted = quotients(near, W)
    for way in ("func.grad", "backward", "`grad_and_value`"):
        close(WAYS[way](near, W), wanted, rtol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "func", "autograd"])
def test_parameters_that_the_loss_captures_are_values(backend):
    """A head on a body that is not frozen: no graph grows, whatever the backend."""
    body, w = nn.Parameter(MATRIX.clone()), W
    grads_fn = fs.grad_and_value(lambda w: quartic(body @ w), backend=backend)
    tx = sam()
    state = tx.init(w)
    for _ in range(3):
        w, state, value = tx.step(w, grads_fn, state)
        assert not any(x.requires_grad for x in (w, value, state[1].trace))
    close(w, steps(sam(), W, lambda w: quartic(MATRIX @ w))[0])


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_parameters_that_the_losses_of_an_ensemble_capture_are_values(chunk_size):
    """In a vectorised step too."""
    body = nn.Parameter(MATRIX.clone())
    tx = fs.ensemble.vectorize(sam(), chunk_size=chunk_size)
    w, value = steps(tx, torch.stack([W, 2 * W, -W]), lambda w: quartic(body @ w))
    assert not w.requires_grad
    assert not value.requires_grad


@pytest.mark.parametrize("backend", ["auto", "func", "autograd"])
def test_a_differentiated_step_with_such_values_is_refused(backend):
    """Nobody can tell whether the derivative by them is wanted: some evaluations would have it, others not."""
    body, rho = nn.Parameter(MATRIX.clone()), tracked(0.3)
    with pytest.raises(RuntimeError, match=r"^update: a step that is differentiated must not capture an nn.Parameter"):
        steps(sam(rho), W, lambda w: quartic(body @ w), backend=backend)
    outcome = fs.grad_and_value(lambda rho: trained(sam(rho), W, lambda w: quartic(body @ w)))
    close(
        outcome(rho)[0].detach(),
        quotients(lambda rho: trained(sam(rho), W, lambda w: quartic(MATRIX @ w)), rho.detach()),
        1e-6,
    )


def test_outside_of_a_step_parameters_are_differentiated():
    """A measure is a function like any other: of params that are leaves, and of what the loss captures."""
    w, body = tracked(1.0, 2.0), nn.Parameter(MATRIX.clone())

    def rise(w, body):
        return fs.measures.worst_case_sharpness(lambda w: quartic(body @ w), w, rho=0.1)

    found = torch.autograd.grad(rise(w, body), (w, body))
    close(found, torch.func.grad(rise, (0, 1))(W, MATRIX), rtol=1e-7)
    with torch.no_grad():
        assert not rise(w, body).requires_grad


def test_a_landscape_takes_leaves_as_values():
    """A picture of many points keeps no graph."""
    w, body = tracked(1.0, 2.0), nn.Parameter(MATRIX.clone())
    for chunk_size in (1, 2):
        losses = fs.landscape.line(lambda w: quartic(body @ w), w, 2 * W, [0.0, 1.0], chunk_size=chunk_size)
        assert not losses.requires_grad


def test_a_tensor_that_starts_to_require_grad():
    """The same gradient function, called before and after; and one that a Parameter made look twice."""
    strength, body = tensor(0.7), nn.Parameter(MATRIX.clone())
    grads_fn = fs.grad_and_value(lambda w: strength * quartic(body @ w))
    assert grads_fn(W)[0].requires_grad
    tx = fs.sgd(0.1)
    assert not tx.step(W, grads_fn, tx.init(W))[0].requires_grad
    body.requires_grad_(False)
    assert not grads_fn(W)[0].requires_grad
    strength.requires_grad_()
    (found,) = torch.autograd.grad(query(tx.step(W, grads_fn, tx.init(W))[0]), strength)
    close(
        found,
        quotients(lambda s: query(W - 0.1 * s * torch.func.grad(lambda w: quartic(MATRIX @ w))(W)), tensor(0.7)),
        1e-6,
    )


def test_eigenvectors_are_not_differentiated():
    """Where the values are, the vectors refuse."""
    pairs = fs.measures.hessian_eigenpairs(quartic, tracked(1.0, 2.0))
    with pytest.raises(RuntimeError, match=r"^hessian_eigenpairs: `vectors` must not be differentiated, got"):
        pairs.vectors.sum().backward()
    assert not fs.measures.hessian_eigenpairs(quartic, W).vectors.requires_grad


def operations(params, grads_fn, tx, state):
    """How many operations two steps run, and how many bytes they newly allocate."""
    counted, total = 0, 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal counted, total
            out = func(*args, **(kwargs or {}))
            known = {
                x.untyped_storage().data_ptr()
                for x in torch.utils._pytree.tree_leaves(args)
                if isinstance(x, torch.Tensor)
            }
            fresh = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            counted += func is not torch.ops.aten.detach.default
            total += sum(x.nbytes for x in fresh if x.untyped_storage().data_ptr() not in known)
            return out

    with Count():
        for _ in range(2):
            params, state, _ = tx.step(params, grads_fn, state)
    return counted, total


def test_a_plain_loop_costs_no_more_where_params_require_grad():
    """Kernels and bytes of steps from `named_parameters` are those from values."""
    model = Network()
    grads_fn = fs.grad_and_value(lambda params: torch.func.functional_call(model, params, (W,)).square().sum())
    values, tx = fs.nn.split(model)[0], sam()
    plain = operations(values, grads_fn, tx, tx.init(values))
    assert operations(dict(model.named_parameters()), grads_fn, tx, tx.init(values)) == plain
    with torch.no_grad():  # nothing is looked for there
        assert operations(values, grads_fn, tx, tx.init(values)) == plain


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler, of params
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_steps(backend):
    """A number is differentiated through compiled steps, and so are params, but for an `nn.Parameter`."""
    grads_fn = fs.grad_and_value(lambda params: quartic(params["w"]))
    start = sam().init({"w": W})

    def step(rho, params, state):
        return sam(rho).step(params, grads_fn, state)

    compiled = torch.compile(step, backend=backend, fullgraph=True)

    def outcome(rho, w, step=compiled):
        params, state = {"w": w}, start
        for _ in range(2):
            params, state, _ = step(rho, params, state)
        return query(params["w"])

    rho, w = tensor(0.3), nn.Parameter(W.clone())
    assert not outcome(rho, w).requires_grad
    wanted = torch.func.grad(lambda rho, w: outcome(rho, w, step), (0, 1))(rho, W)
    close(fs.grad_and_value(lambda w: outcome(rho, w))(W)[0], wanted[1])
    rho, w = tracked(0.3), tracked(1.0, 2.0)
    close(torch.autograd.grad(outcome(rho, w * 1.0), (rho, w)), wanted)


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
@pytest.mark.parametrize("backend", ["auto", "func", "autograd"])
def test_numbers_are_learned_in_chunks_of_any_size(backend, chunk_size):
    """Steps of steps: an ensemble of outer loops moves as without chunks, also where a chunk is a plain loop."""

    def learned(chunk_size, backend="auto"):
        numbers = {"rho": tensor(0.1, 0.3, 0.5).log(), "lr": tensor(0.01, 0.02, 0.03).log()}
        outer = fs.ensemble.vectorize(fs.chain(fs.clip_by_global_norm(1.0), fs.adam(0.1)), chunk_size=chunk_size)
        grads_fn = fs.grad_and_value(
            lambda numbers, w: trained(sam(numbers["rho"].exp(), numbers["lr"].exp()), w), backend=backend
        )
        state = outer.init(numbers)
        for _ in range(3):
            numbers, state, loss = outer.step(numbers, grads_fn, state, torch.stack([W, W + 0.5, W - 0.3]))
        return numbers, loss

    if backend == "autograd" and chunk_size > 1:
        with pytest.raises(RuntimeError, match=r'the "autograd" backend does not work under `torch.func` transforms'):
            learned(chunk_size, backend)
    else:
        close(learned(chunk_size, backend), learned(None), rtol=1e-7)


def test_batches_that_require_grad():
    """Also inside of a dict, and made before the step."""
    scale = tracked(0.7)
    grads_fn = fs.grad_and_value(lambda w, batch: quartic(w * batch["x"]))
    tx = sam()
    new, _, _ = tx.step(W, grads_fn, tx.init(W), {"x": W * scale})
    (found,) = torch.autograd.grad(query(new), scale)
    plain = fs.grad_and_value(lambda w, batch: quartic(w * batch["x"]))
    wanted = quotients(lambda s: query(tx.step(W, plain, tx.init(W), {"x": W * s})[0]), tensor(0.7))
    close(found, wanted, rtol=1e-6)


def test_a_gradient_of_zero_has_a_derivative():
    """At a point where nothing moves every derivative is finite, in plain autograd too."""
    for tx in (sam(), fs.adam(0.1), fs.chain(fs.asam(0.1), fs.adamw(0.1, amsgrad=True))):
        w = tracked(0.0, 0.0)
        new, _ = steps(tx, w * 1.0, lambda w: (w**2).sum())
        (found,) = torch.autograd.grad(new.sum(), w)
        assert found.isfinite().all()


def test_parameters_that_a_bare_gradient_captures_are_values():
    """With `torch.func.grad` as the gradient function no graph grows either."""
    body, w, tx = nn.Parameter(MATRIX.clone()), W, sam()
    state = tx.init(w)
    for _ in range(3):
        w, state, _ = tx.step(w, torch.func.grad(lambda w: quartic(body @ w)), state)
        assert not w.requires_grad
    close(w, steps(sam(), W, lambda w: quartic(MATRIX @ w))[0])
    rho = tracked(0.3)
    with pytest.raises(RuntimeError, match=r"^update: a step that is differentiated must not capture an nn.Parameter"):
        sam(rho).step(W, torch.func.grad(lambda w: quartic(body @ w)), tx.init(W))
    new, _, _ = sam(rho).step(W, torch.func.grad(quartic), tx.init(W))
    (found,) = torch.autograd.grad(query(new), rho)
    close(found, quotients(lambda r: query(sam(r).step(W, torch.func.grad(quartic), tx.init(W))[0]), tensor(0.3)), 1e-6)


def test_derivatives_of_derivatives_keep_no_graph():
    """A loss that differentiates another, by a value of its own: the answer of the outer one is a value."""

    def slope(scale):
        return fs.grad_and_value(lambda rho: trained(sam(rho * scale)))(tensor(0.3))[0]

    found, value = fs.grad_and_value(slope)(tensor(1.1))
    close(found, quotients(slope, tensor(1.1)), rtol=1e-6)
    assert not found.requires_grad
    assert not value.requires_grad


def test_what_is_captured_by_aux_alone_or_is_the_loss():
    """Neither the gradient nor the rest of the loss depends on it."""
    x = tracked(2.0)
    grads_fn = fs.grad_and_value(lambda w: (quartic(w), {"aux": 3 * x, "own": w * 1.0}), has_aux=True)
    _, (_, aux) = grads_fn(W)
    close(torch.autograd.grad(aux["aux"], x)[0], tensor(3.0))
    close(torch.autograd.grad(fs.grad_and_value(lambda w: x)(W)[1], x)[0], tensor(1.0))
    assert not fs.grad_and_value(lambda w: (quartic(w), w * 1.0), has_aux=True)(W)[1][1].requires_grad
