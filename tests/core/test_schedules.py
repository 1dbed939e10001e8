"""Schedules: closed forms, torch's schedulers, and steps that are batched."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import funcsam as fs
from tests.asserts import close, defaults, equal

totals = st.integers(2, 50)
values = st.floats(0.01, 2)

SCHEDULES = {
    "constant": fs.constant(0.3),
    "step_decay": fs.step_decay(1.0, 10),
    "cosine": fs.cosine(1.0, 10, end=0.1),
    "warmup_cosine": fs.warmup_cosine(1.0, 3, 10, end=0.1),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def read(schedule, steps):
    """Values at 0, 1, ..., as floats."""
    return [schedule(torch.tensor(step)).item() for step in range(steps)]


@given(value=values, total=totals, end=st.floats(0, 0.5))
def test_cosine(value, total, end):
    """`end + (value - end) (1 + cos(pi t / T)) / 2`, and `end` from `T` on."""
    wanted = [end + (value - end) * (1 + math.cos(math.pi * min(t / total, 1))) / 2 for t in range(total + 5)]
    assert read(fs.cosine(value, total, end), total + 5) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@given(value=values, total=totals, end=st.floats(0, 0.5), data=st.data())
def test_warmup_cosine(value, total, end, data):
    """A line from 0 to the peak, then the cosine of the rest."""
    warm = data.draw(st.integers(1, total - 1))
    rest = read(fs.cosine(value, total - warm, end), total + 5 - warm)
    wanted = [value * t / warm for t in range(warm)] + rest
    assert read(fs.warmup_cosine(value, warm, total, end), total + 5) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@given(value=values, epochs=st.integers(1, 30), factor=st.floats(0, 1))
def test_step_decay(value, epochs, factor):
    """With 10 steps an epoch the milestones 0.3, 0.6, 0.8 fall on whole steps, the first decayed ones."""
    starts = [3 * epochs, 6 * epochs, 8 * epochs]
    wanted = [value * factor ** sum(t >= start for start in starts) for t in range(10 * epochs + 2)]
    assert read(fs.step_decay(value, 10 * epochs, factor), 10 * epochs + 2) == pytest.approx(wanted, rel=1e-12)


def test_step_decay_rounds_up():
    """A milestone between two steps takes effect at the later one."""
    assert read(fs.step_decay(1.0, 5, 0.5, [0.5]), 5) == [1, 1, 1, 0.5, 0.5]


@pytest.mark.parametrize(("fraction", "total"), [(0.07, 100), (0.14, 50), (0.28, 25), (0.57, 100), (0.29, 100)])
def test_a_milestone_is_what_its_digits_say(fraction, total):
    """`0.07 * 100` is 7.000000000000001 and `0.57 * 100` 56.99999999999999 for a computer: step 7 and step 57 here."""
    start = round(fraction * total)
    assert read(fs.step_decay(1.0, total, 0.5, [fraction]), total) == [1.0] * start + [0.5] * (total - start)


def test_a_milestone_beyond_the_integers_of_float32():
    """It takes effect at its step and not one earlier."""
    start = 2**24 + 1
    schedule = fs.step_decay(1.0, 2 * start, 0.5, [0.5])
    assert [schedule(torch.tensor(start + k)).item() for k in (-1, 0)] == [1.0, 0.5]


@given(value=values)
def test_constant(value):
    """The same at every step."""
    assert read(fs.constant(value), 3) == [value] * 3


def _torch(scheduler, steps, value, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=value)
    scheduler, rates = scheduler(optimizer, **options), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@given(value=values, total=totals, end=st.floats(0, 0.5))
def test_cosine_annealing(value, total, end):
    """`torch.optim.lr_scheduler.CosineAnnealingLR`, up to `T_max`, where ours stays and theirs turns."""
    theirs = _torch(torch.optim.lr_scheduler.CosineAnnealingLR, total + 1, value, T_max=total, eta_min=end)
    assert read(fs.cosine(value, total, end), total + 1) == pytest.approx(theirs, rel=1e-9, abs=1e-9)


@given(value=values, epochs=st.integers(1, 10))
def test_multi_step(value, epochs):
    """`torch.optim.lr_scheduler.MultiStepLR` with milestones in steps."""
    starts = [3 * epochs, 6 * epochs, 8 * epochs]
    theirs = _torch(torch.optim.lr_scheduler.MultiStepLR, 10 * epochs, value, milestones=starts, gamma=0.2)
    assert read(fs.step_decay(value, 10 * epochs), 10 * epochs) == pytest.approx(theirs, rel=1e-9)


@each_schedule
def test_steps_may_be_batched(schedule):
    """Under `vmap` every member has its own step."""
    steps = torch.arange(12)
    close(torch.vmap(schedule)(steps), torch.stack([schedule(step) for step in steps]))


@each_schedule
def test_values_are_tensors_of_shape_none(schedule):
    """A schedule returns float64 of shape (), in which 0.1 is 0.1."""
    value = schedule(torch.tensor(4))
    assert (value.shape, value.dtype) == ((), torch.float64)


@pytest.mark.parametrize("device", ["mps", "xpu"])
@each_schedule
def test_a_device_that_may_have_no_float64(schedule, device):
    """There it is float32. Apple's devices have no float64, and some others only pretend to."""
    with FakeTensorMode():
        value = schedule(torch.zeros((), dtype=torch.int64, device=device))
    assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, device)


@each_schedule
def test_defaults_do_not_matter(schedule):
    """Neither the default dtype nor the default device."""
    step, wanted = torch.tensor(4), schedule(torch.tensor(4))
    with defaults():
        found = schedule(step)
    equal(found, wanted)


@pytest.mark.compile
def test_schedules_compile():
    """In one graph, to the same float64."""

    def values(step):
        return [schedule(step) for schedule in SCHEDULES.values()]

    compiled = torch.compile(values, backend="aot_eager", fullgraph=True)
    for step in (torch.tensor(0), torch.tensor(4)):
        close(compiled(step), values(step), rtol=1e-15)


@each_schedule
def test_no_schedule_is_negative(schedule):
    """Not beyond the end either."""
    assert min(read(schedule, 40)) >= 0


def test_a_schedule_may_be_any_function_of_the_step():
    """A Python number is as good an answer as a tensor."""
    tx = fs.scale(lambda step: 2.0)
    w = torch.tensor(3.0)
    close(tx.update(w, lambda w: w, tx.init(w))[0], torch.tensor(6.0))


def test_a_prefix_of_schedules():
    """One schedule per leaf."""
    params = {"w": torch.tensor(1.0), "b": torch.tensor(1.0)}
    tx = fs.scale_by_learning_rate({"w": fs.constant(0.5), "b": 0.25})
    updates = tx.update(params, lambda params: params, tx.init(params))[0]
    close(updates, {"w": torch.tensor(-0.5), "b": torch.tensor(-0.25)})
