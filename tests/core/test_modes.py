"""Modes of torch x entry points: each cell of the table in the documentation is plain code's answer, or an error."""

import contextlib
import functools
import gc
import pathlib
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import funcsam as fs
from tests.asserts import close, equal

TABLE = pathlib.Path(__file__).parents[2] / ".ci" / "docs" / "modes.md"


class Half(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 0.5 * weight


def build():
    """A linear layer whose weight is parametrised, and batch normalisation."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    parametrize.register_parametrization(model[0], "weight", Half())
    for k, p in enumerate(model.parameters()):
        p.data = torch.linspace(-1, 1, p.numel()).reshape(p.shape) + 0.1 * k
    return model


MODEL = build()
X, Y = torch.linspace(-1, 2, 18).reshape(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
PARAMS, BUFFERS = fs.nn.split(MODEL)
DIRECTIONS = fs.landscape.directions(PARAMS)
LOGITS = torch.linspace(-3, 3, 24).reshape(2, 6, 2) ** 2
RADII = torch.tensor([0.1, 0.2])
STACKED = fs.ensemble.stack([(PARAMS, BUFFERS)] * 2)


@contextlib.contextmanager
def default(setter, value, before):
    """Sets a default of torch, and puts it back."""
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextlib.contextmanager
def half():
    """Autocast, the reference of which is autocast inside the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        yield


MODES = {
    "no_grad": torch.no_grad,
    "set_grad_enabled(False)": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "autocast": half,
    "deterministic algorithms": lambda: default(torch.use_deterministic_algorithms, True, False),
    "parametrize.cached": parametrize.cached,
    "detect_anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "default device": lambda: torch.device("meta"),
    "default dtype float64": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: default(torch.set_default_dtype, torch.bfloat16, torch.float32),
}


def entries(inside=contextlib.nullcontext):
    """What is called, by name; `inside` is a mode in the loss."""

    def loss(model, x, y):
        with inside():
            return F.cross_entropy(model(x), y)

    def bare(params):
        with inside():
            merged = {**params, **{name: b.clone() for name, b in BUFFERS.items()}}
            return F.cross_entropy(torch.func.functional_call(MODEL, merged, (X,)), Y)

    def sliced(params, x, y):
        return fs.nn.loss_fn(MODEL, loss)(params, BUFFERS, x, y)[0]

    def whole(params):
        return sliced(params, X, Y)

    def of_module(backend):
        return fs.grad_and_value(fs.nn.loss_fn(MODEL, loss), has_aux=True, backend=backend)

    def step(tx):
        state, params, buffers = tx.init(PARAMS), PARAMS, BUFFERS
        for _ in range(2):
            params, state, (value, buffers) = tx.step(params, of_module("auto"), state, buffers, X, Y)
        return params, buffers, value

    def members(chunk_size):
        tx = fs.ensemble.vectorize(sam, {"rho": RADII}, (0, None, None), chunk_size)
        (params, buffers), state = STACKED, tx.init(STACKED[0])
        for _ in range(2):
            params, state, (value, buffers) = tx.step(params, of_module("auto"), state, buffers, X, Y)
        return params, buffers, value

    def sam(rho=0.1):
        return fs.chain(fs.sam(rho), fs.sgd(fs.cosine(0.1, 5), momentum=0.9))

    measures, directions = fs.measures, DIRECTIONS
    called = {
        "`grad_and_value`": lambda: fs.grad_and_value(bare)(PARAMS),
        '`grad_and_value`, `backend="func"`': lambda: fs.grad_and_value(bare, backend="func")(PARAMS),
        '`grad_and_value`, `backend="autograd"`': lambda: fs.grad_and_value(bare, backend="autograd")(PARAMS),
        "`nn.loss_fn`": lambda: fs.nn.loss_fn(MODEL, loss)(PARAMS, BUFFERS, X, Y),
        "`nn.loss_fn`, its gradient": lambda: of_module("auto")(PARAMS, BUFFERS, X, Y),
        '`nn.loss_fn`, its gradient, `backend="func"`': lambda: of_module("func")(PARAMS, BUFFERS, X, Y),
        "`step`": lambda: step(sam()),
        "`step` with `adamw`": lambda: step(fs.chain(fs.asam(0.5, eta=0.01), fs.adamw(0.1))),
        "`step` with `gsam`": lambda: step(fs.chain(fs.gsam(0.1), fs.sgd(0.1, momentum=0.9))),
        "`step` with `looksam`": lambda: step(fs.chain(fs.looksam(0.1, k=2), fs.sgd(0.1, momentum=0.9))),
        "`step` with `msam`": lambda: step(fs.chain(fs.msam(0.1), fs.sgd(0.1))),
        "`step` with `common_randomness`": lambda: step(fs.chain(fs.common_randomness(), sam())),
        "`step` with `dynamic_loss_scale`": lambda: step(fs.dynamic_loss_scale(sam())),
        "`step` in slices": lambda: step(fs.chain(fs.microbatch(fs.sam(0.1), 2, (None, 0, 0)), fs.sgd(0.1))),
        "`vectorize`": lambda: members(None),
        "`vectorize`, `chunk_size=1`": lambda: members(1),
        "`ensemble.init`": lambda: fs.ensemble.init(lambda: nn.Linear(2, 2, device="cpu", dtype=torch.float32), [0, 1]),
        "`gradient_norm`": lambda: measures.gradient_norm(whole, PARAMS),
        "`worst_case_sharpness`": lambda: measures.worst_case_sharpness(whole, PARAMS, rho=0.3, steps=2, adaptive=True),
        "`m_sharpness`": lambda: measures.m_sharpness(sliced, PARAMS, X, Y, m=3, rho=0.3),
        "`average_case_sharpness`": lambda: measures.average_case_sharpness(whole, PARAMS, rho=0.1, draws=4),
        "`hessian_trace`": lambda: measures.hessian_trace(whole, PARAMS, draws=2),
        "`hessian_eigenpairs`": lambda: measures.hessian_eigenpairs(whole, PARAMS).values,
        "`landscape.directions`": lambda: fs.landscape.directions(PARAMS),
        "`landscape.grid`": lambda: fs.landscape.grid(whole, PARAMS, directions, [0.1, 0.2], [0.3]),
        "`landscape.line`, `chunk_size=2`": lambda: fs.landscape.line(
            whole, PARAMS, directions[0], RADII, chunk_size=2
        ),
    }
    predictions = {  # the mode is around these, as they have no loss
        "`nn.predict`": lambda: fs.nn.predict(MODEL, PARAMS, BUFFERS, X),
        "`ensemble.predict`": lambda: fs.ensemble.predict(MODEL, *STACKED, X),
        "`ensemble.predict`, `chunk_size=1`": lambda: fs.ensemble.predict(MODEL, *STACKED, X, chunk_size=1),
    }

    def under(call):
        with inside():
            return call()

    called |= {name: functools.partial(under, call) for name, call in predictions.items()}
    return called | {
        "`ensemble.nll`": lambda: fs.ensemble.nll(LOGITS, Y),
        "`ensemble.calibration_error`": lambda: fs.ensemble.calibration_error(LOGITS[0], Y),
        "`ensemble.disagreement`": lambda: fs.ensemble.disagreement(LOGITS),
    }


ENTRIES = list(entries())


def values(tree):
    """The answer as values."""
    return torch.utils._pytree.tree_map(lambda x: x.detach().clone(), tree)


def cell(entry, mode):
    """What comes of it: the answer of plain code, an error, or something else."""
    inside = half if mode == "autocast" else contextlib.nullcontext
    try:
        with MODES[mode]():
            found = entries()[entry]()
    except RuntimeError as error:
        return f"error: {error}"
    wanted = values(entries(inside)[entry]())
    try:
        close(values(found), wanted, rtol=1e-6)  # torch 2.14 has other kernels for a Hessian without grad mode
    except AssertionError as error:
        return f"WRONG: {str(error)[:300]}"
    return "value"


def table():
    """The cells of the documentation, by row and column."""
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows]
    assert cells[0][1:] == list(MODES)
    assert [row[0] for row in cells[2:]] == ENTRIES
    return {row[0]: dict(zip(MODES, row[1:], strict=True)) for row in cells[2:]}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("entry", ENTRIES)
def test_each_cell_of_the_table(entry):
    """In every mode the answer is that of plain code, or an error."""
    assert {mode: cell(entry, mode).split(":")[0] for mode in MODES} == table()[entry]


def test_casts_of_other_evaluations():
    """Autocast keeps the cast of a weight, also when the weight is then changed in place."""
    weight = torch.full((2, 2), 0.5, requires_grad=True)

    def loss_fn(w):
        return F.linear(w, weight).float().square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        loss_fn(torch.ones(2))
        with torch.no_grad():
            weight.mul_(2)
        equal(fs.grad_and_value(loss_fn)(torch.ones(2))[1].detach(), torch.tensor(8.0))


def test_casts_do_not_pile_up():
    """A region of autocast around a whole run holds on to no cast of the params of a step."""
    casts = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and out.dtype is torch.bfloat16:
                casts.append(weakref.ref(out))
            return out

    tx, w = fs.sgd(0.1), torch.ones(2, 2)
    grads_fn = fs.grad_and_value(lambda w: F.linear(torch.ones(1, 2), w).float().square().sum())
    with torch.autocast("cpu", torch.bfloat16), Spy():
        for _ in range(3):
            w, _, _ = tx.step(w, grads_fn, tx.init(w))
        gc.collect()
        assert casts
        assert not any(cast() is not None for cast in casts)


@pytest.mark.parametrize("make", [lambda: torch.tensor([1.0, 3.0]), lambda: torch.tensor([1.0, 3.0]).requires_grad_()])
def test_inference_tensors_outside_of_their_mode(make):
    """Params that were made or loaded in inference mode can be trained on."""
    with torch.inference_mode():
        w = torch.tensor([1.0, 3.0])
        equal(fs.grad_and_value(lambda w: (w**2).sum())(make())[0], torch.tensor([2.0, 6.0]))
        equal(fs.measures.worst_case_sharpness(lambda w: (w**2).sum(), make()[1:], rho=1.0), torch.tensor(7.0))
    equal(fs.grad_and_value(lambda w: (w**2).sum())(w)[0], torch.tensor([2.0, 6.0]))
    tx = fs.chain(fs.sam(0.1), fs.sgd(0.1, momentum=0.5))
    plain = w.clone()
    grads_fn = fs.grad_and_value(lambda w: (w**4).sum())
    equal(tx.step(w, grads_fn, tx.init(w)), tx.step(plain, grads_fn, tx.init(plain)))
