"""Loss scaling: the rules of torch's GradScaler, unscaled norms, and steps that are skipped as a whole."""

import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import funcsam as fs
from tests.asserts import close, equal
from tests.modules import MODULES, batches, built
from tests.strategies import call, problems

W = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor(0.5)}


def loss_fn(w, factor):
    """A loss whose gradient overflows where the factor does."""
    return factor * (w["w"].square().sum() + w["b"] ** 4)


GRADS_FN = fs.grad_and_value(loss_fn)


def run(tx, factors, w=W):
    """Steps with the given factors: params and states after each."""
    state, seen = tx.init(w), []
    for factor in factors:
        w, state, _ = tx.step(w, GRADS_FN, state, torch.tensor(factor))
        seen.append((w, state))
    return seen


@given(problem=problems(), scale=st.integers(-10, 20).map(lambda k: 2.0**k))
def test_a_scaled_step_is_the_step(problem, scale):
    """Norms, clipping and momentum see gradients of the true size; powers of two lose nothing."""
    inner = fs.chain(fs.clip_by_global_norm(0.7), fs.sam(0.3), fs.sgd(0.1, momentum=0.9))
    close(call(fs.dynamic_loss_scale(inner, init_scale=scale), problem)[0], call(inner, problem)[0])


@given(problem=problems())
def test_the_loss_behind_the_gradient_is_scaled(problem):
    """The backward pass runs on the scaled loss; the value that is returned is the loss."""
    for backend in ("autograd", "func"):
        grads_fn = fs.grad_and_value(problem.loss, backend=backend)
        grads, value = grads_fn.scaled(torch.tensor(8.0, dtype=torch.float64))(problem.params)
        equal(value, problem.loss(problem.params))
        close(grads, call(fs.scale(8.0), problem)[0])


events = st.lists(st.sampled_from(["fine", "first", "probe"]), min_size=1, max_size=12)


@given(events=events, interval=st.integers(1, 4))
def test_the_scale_moves_as_in_torchs_grad_scaler(events, interval):
    """Growth, back-off and the tracker, step for step."""
    numbers = {"init_scale": 1024.0, "growth_factor": 4.0, "backoff_factor": 0.125, "growth_interval": interval}
    scaler = torch.amp.GradScaler("cpu", **numbers)
    p = torch.nn.Parameter(torch.ones(()))
    base = torch.optim.SGD([p], 0.1)
    wanted = []
    for event in events:
        p.grad = scaler.scale(torch.tensor(1.0 if event == "fine" else torch.inf))
        scaler.step(base)
        scaler.update()
        wanted.append((scaler.get_scale(), scaler._get_growth_tracker()))
    states = [s for _, s in run(fs.dynamic_loss_scale(fs.sgd(0.1), **numbers), [_factor(e) for e in events])]
    assert [(s.scale.item(), s.growth_tracker.item()) for s in states] == wanted


def test_the_scale_stops_growing_at_the_largest_number():
    """Infinity would make every later gradient NaN: at the largest power of two the scale stays, and steps go on."""
    tx = fs.dynamic_loss_scale(fs.sgd(0.1), init_scale=2.0**126, growth_interval=1)
    w, state = torch.zeros(1), None
    state, scales = tx.init(w), []
    for _ in range(4):
        w, state, _ = tx.step(w, fs.grad_and_value(lambda w: 1e-30 * w.sum()), state)
        scales.append(state.scale.item())
    assert scales == [2.0**127] * 4
    close(w, torch.full((1,), -4e-31), rtol=0)


def _factor(event):
    return 1.0 if event == "fine" else torch.inf


def broken_at(evaluation):
    """A loss that is infinite at one evaluation of a step, and says which evaluations there were."""
    calls = []

    def loss_fn(w):
        calls.append(len(calls))
        return (w["w"].square().sum() + w["b"] ** 4) * (torch.inf if calls[-1] == evaluation else 1.0)

    return loss_fn


@pytest.mark.parametrize("evaluation", [0, 1])
@pytest.mark.parametrize(
    "inner",
    [fs.chain(fs.sam(0.3), fs.sgd(0.1, momentum=0.9)), fs.chain(fs.asam(0.3), fs.adamw(0.1))],
    ids=["sgd", "adamw"],
)
def test_a_step_is_skipped_as_a_whole(inner, evaluation):
    """Whichever pass is not finite, params, momentum and counters stay; the next step is as if nothing had been."""
    tx = fs.dynamic_loss_scale(inner)
    fine = fs.grad_and_value(broken_at(None))
    w, state, _ = tx.step(W, fine, tx.init(W))
    skipped, after, _ = tx.step(w, fs.grad_and_value(broken_at(evaluation)), state)
    equal((skipped, after.inner), (w, state.inner))
    assert after.scale == state.scale / 2
    close(tx.step(skipped, fine, after)[0], tx.step(w, fine, state)[0], rtol=1e-6)


def test_a_first_pass_that_the_probe_does_not_see_is_seen():
    """Where the loss is linear, or the ascent is masked, NaN at the params does not reach the update by itself."""
    calls = []

    def loss_fn(w):
        calls.append(0)
        return w["w"].sum() + w["b"] * (torch.nan if len(calls) == 1 else 1.0)

    tx = fs.dynamic_loss_scale(fs.sharpness_aware(fs.chain(fs.freeze(), fs.scale(0.1))))
    state = tx.init(W)
    _, after, _ = tx.step(W, fs.grad_and_value(loss_fn), state)
    assert after.scale == state.scale / 2


def test_one_bad_slice_skips_the_step():
    """Also where slices are averaged, in a loop and under `vmap`."""
    for size in (None, 1):
        tx = fs.dynamic_loss_scale(fs.microbatch(fs.chain(fs.sam(0.1), fs.sgd(0.1)), 2, chunk_size=size))
        grads_fn = fs.grad_and_value(lambda w, x: (x * (w["w"].sum() + w["b"])).mean())
        w, after, _ = tx.step(W, grads_fn, tx.init(W), torch.tensor([1.0, 1.0, torch.inf, 1.0]))
        equal(w, W)
        assert after.scale == 2.0**15


@pytest.mark.parametrize("size", [None, 1])
def test_one_bad_slice_that_no_update_sees_skips_the_step(size):
    """Its ascent is frozen, and its probe is finite: three good slices of four do not outvote it."""
    climb = fs.chain(fs.freeze(), fs.scale(0.1))
    tx = fs.dynamic_loss_scale(fs.microbatch(fs.sharpness_aware(climb), 4, chunk_size=size))
    calls = []

    def loss_fn(w, x):
        calls.append(0)
        first = len(calls) % 2
        return (w["w"].sum() + w["b"]) * torch.where((x.max() > 2) & bool(first), torch.inf, 1.0)

    w, after, _ = tx.step(W, fs.grad_and_value(loss_fn), tx.init(W), torch.tensor([1.0, 1.0, 3.0, 1.0]))
    equal(w, W)
    assert after.scale == 2.0**15


def test_numbers_that_are_not_given_are_those_of_torch():
    scaler = torch.amp.GradScaler("cpu")
    ours, w = fs.dynamic_loss_scale(fs.sgd(0.1)), torch.ones(1)
    state = ours.init(w)
    assert state.scale == scaler.get_scale()
    close_to = state._replace(growth_tracker=torch.tensor(scaler.get_growth_interval() - 2, dtype=torch.int32))
    for factor in (1.0, scaler.get_growth_factor()):
        _, close_to, _ = ours.step(w, fs.grad_and_value(torch.sum), close_to)
        assert close_to.scale == factor * state.scale
    _, after, _ = ours.step(w, fs.grad_and_value(lambda w: w.sum() * torch.inf), state)
    assert after.scale == scaler.get_backoff_factor() * state.scale


def test_members_of_an_ensemble_have_scales_of_their_own():
    """One that overflows does not hold back the others."""
    tx = fs.dynamic_loss_scale(fs.chain(fs.sam(0.1), fs.sgd(0.1)))
    many = fs.ensemble.vectorize(tx)
    stacked = fs.ensemble.stack([W, W])
    w, state, _ = many.step(stacked, GRADS_FN, many.init(stacked), torch.tensor([1.0, torch.inf]))
    assert state.scale.tolist() == [2.0**16, 2.0**15]
    equal(fs.ensemble.member(w, 1), W)
    close(fs.ensemble.member(w, 0), tx.step(W, GRADS_FN, tx.init(W), torch.tensor(1.0))[0], rtol=1e-6)


def half_loss(model, x, y):
    """A loss in float16 autocast, small enough for its gradients to vanish without scaling."""
    with torch.autocast("cpu", dtype=torch.float16):
        return F.cross_entropy(model(x), y) * 1e-6


@pytest.mark.parametrize("backend", ["autograd", "func"])
def test_it_saves_gradients_that_float16_would_lose(backend):
    """The step comes close to the one in float32; without scaling most of the gradient is zero."""
    model = built(MODULES["linear"]).float()
    x, y = batches()[0]
    batch = (x.float(), y)
    params, buffers = fs.nn.split(model)
    exact_fn = fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y) * 1e-6)
    half = fs.grad_and_value(fs.nn.loss_fn(model, half_loss), has_aux=True, backend=backend)
    exact = fs.grad_and_value(exact_fn, has_aux=True, backend=backend)

    def moved(tx, grads_fn):
        return tx.update(params, grads_fn, tx.init(params), buffers, *batch)[0]

    inner = fs.chain(fs.sam(0.1), fs.scale(1e6))
    wanted = moved(inner, exact)
    error = lambda got: max((got[key] - wanted[key]).abs().max().item() for key in wanted)  # noqa: E731
    assert error(moved(fs.dynamic_loss_scale(inner), half)) < 0.01 < 0.03 < error(moved(inner, half))


def test_it_backs_off_until_float16_holds_the_gradients():
    """From a scale that overflows, with every skipped step leaving the params alone, training goes on."""
    model = built(MODULES["batch norm"]).float()
    tx = fs.dynamic_loss_scale(fs.chain(fs.sam(0.1), fs.sgd(0.5)), init_scale=2.0**30)

    def mixed(model, x, y):
        with torch.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(model(x), y)

    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, mixed), has_aux=True)
    (params, buffers), (x, y) = fs.nn.split(model), batches()[0]
    state, losses = tx.init(params), []
    for _ in range(60):
        before, scale = params, state.scale
        params, state, (value, buffers) = tx.step(params, grads_fn, state, buffers, x.float(), y)
        if state.scale < scale:
            equal(params, before)
        losses.append(value.item())
    assert 2.0**8 < state.scale < 2.0**30
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.compile
def test_it_compiles_once():
    """Skipping takes no look at the numbers."""
    tx = fs.dynamic_loss_scale(fs.chain(fs.sam(0.1), fs.sgd(0.1, momentum=0.9)))
    counter = CompileCounter()
    step = torch.compile(tx.step, backend=counter, fullgraph=True)
    w, state = W, tx.init(W)
    for factor in (1.0, torch.inf, 1.0):
        w, state, _ = step(w, GRADS_FN, state, torch.tensor(factor))
    close((w, state), run(tx, [1.0, torch.inf, 1.0])[-1], rtol=1e-5)
    assert counter.frame_count == 1


def test_a_resumed_run_is_the_run():
    tx = fs.dynamic_loss_scale(fs.chain(fs.sam(0.1), fs.sgd(0.1, momentum=0.9)), growth_interval=2)
    whole = run(tx, [1.0, torch.inf, 1.0, 1.0, 1.0])
    w, state = whole[1]
    torch.save((w, state), file := io.BytesIO())
    file.seek(0)
    w, state = torch.load(file, weights_only=True)
    for _ in range(3):
        w, state, _ = tx.step(w, GRADS_FN, state, torch.tensor(1.0))
    equal((w, state), whole[-1])


BAD = [
    (lambda: fs.dynamic_loss_scale(0.1), TypeError, "dynamic_loss_scale: `inner` must be a Transform, got float."),
    (lambda: fs.dynamic_loss_scale(fs.sgd(), 0.0), ValueError, "`init_scale` must be finite and positive, got 0.0."),
    (lambda: fs.dynamic_loss_scale(fs.sgd(), 1.0, 0.5), ValueError, "`growth_factor` must be at least 1, got 0.5."),
    (
        lambda: fs.dynamic_loss_scale(fs.sgd(), 1.0, 2.0, 1.0),
        ValueError,
        "`backoff_factor` must be less than 1, got 1.0.",
    ),
    (
        lambda: fs.dynamic_loss_scale(fs.sgd(), growth_interval=0),
        ValueError,
        "`growth_interval` must be at least 1, got 0.",
    ),
    (
        lambda: fs.dynamic_loss_scale(fs.sgd()).update(
            W, torch.func.grad(lambda w: w["b"]), fs.dynamic_loss_scale(fs.sgd()).init(W)
        ),
        TypeError,
        "dynamic_loss_scale: `grads_fn` must come from `funcsam.grad_and_value`, and the transform must wrap",
    ),
    (
        lambda: fs.chain(fs.scale(1.0), fs.dynamic_loss_scale(fs.sgd())).update(
            W, GRADS_FN, fs.chain(fs.scale(1.0), fs.dynamic_loss_scale(fs.sgd())).init(W), torch.tensor(1.0)
        ),
        TypeError,
        "the transform must wrap the whole chain",
    ),
    (
        lambda: fs.dynamic_loss_scale(fs.sgd()).update(W, GRADS_FN, (), torch.tensor(1.0)),
        ValueError,
        "dynamic_loss_scale: `state` must be a LossScaleState, got tuple of 0 entries. Make it with `init`.",
    ),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD, ids=[text for *_, text in BAD])
def test_bad_arguments_are_refused(make, error, text):
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)
