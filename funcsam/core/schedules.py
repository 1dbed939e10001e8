"""Schedules: pure functions from the step, int64 of shape (), to a hyperparameter, a tensor of shape ().

Wherever a hyperparameter is taken, a schedule is taken too. The step counts the updates made so far: the first update
reads a schedule at 0. Values are float64 on the CPU and on CUDA, and float32 on other devices. Two schedules are equal
if they were made by the same function from equal arguments.
"""

from collections.abc import Sequence

import optree
import torch
from torch import Tensor

from funcsam.core import checks, levels
from funcsam.core.records import Recorded, equal, factory
from funcsam.core.types import Hyper, Number, Schedule, Tree


def at(value: Hyper, step: Tensor) -> Tree:
    """Returns the value of a hyperparameter at a step: a number, a tensor of shape (), or a prefix tree of these."""
    if isinstance(value, float | int | Tensor):
        return value
    prefix: Tree = value
    return optree.tree_map(lambda leaf: leaf(step) if callable(leaf) else leaf, prefix)


def nonzero(value: Hyper) -> bool:
    """Tells whether a hyperparameter can differ from zero: whether it is anything but the number 0."""
    return not isinstance(value, float | int) or value != 0


class _Schedule(Recorded):
    """A schedule that records the call that made it."""

    def __init__(self, rule: Schedule) -> None:
        self._rule = rule

    def __call__(self, step: Tensor) -> Number:
        return self._rule(step)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Schedule) and equal(self, other)

    def __hash__(self) -> int:
        return hash(self._name)


def _real(step: Tensor) -> Tensor:
    return step.to(levels.widest(step.device))


@factory
def constant(value: Number) -> Schedule:
    """Returns `value` at every step.

    >>> import torch
    >>> constant(0.1)(torch.tensor(7)).item()
    0.1
    """
    checks.finite("constant", value=value)
    return _Schedule(lambda step: value * torch.ones_like(_real(step)))


@factory
def step_decay(
    value: Number, total_steps: int, factor: float = 0.2, milestones: Sequence[float] = (0.3, 0.6, 0.8)
) -> Schedule:
    """Multiplies `value` by `factor` at each milestone.

    Args:
        value: The value at step 0: a non-negative number, or a tensor of shape ().
        total_steps: Number of steps of the whole run, at least 1.
        factor: Factor of each milestone, non-negative. 0.2 in the Wide ResNet recipe.
        milestones: Fractions of the run, in [0, 1]. The step `ceil(fraction * total_steps)` is the first decayed one.

    >>> import torch
    >>> [round(step_decay(1.0, 10)(torch.tensor(k)).item(), 3) for k in (0, 2, 3, 6, 8, 99)]
    [1.0, 1.0, 0.2, 0.04, 0.008, 0.008]

    References:
        Zagoruyko and Komodakis, 2016, section 3 (learning rate times 0.2 at 60, 120 and 160 of 200 epochs).
    """
    checks.nonnegative("step_decay", value=value, factor=factor)
    checks.count("step_decay", total_steps=total_steps)
    for fraction in milestones:
        if not 0 <= fraction <= 1:
            raise ValueError(f"step_decay: `milestones` must be in [0, 1], got {fraction}.")
    # Products of floats are not exact: 0.28 * 100 is 28.000000000000004, which would be one step late.
    starts = [round(fraction * total_steps, 9) for fraction in milestones]

    def schedule(step: Tensor) -> Tensor:
        rate = value * torch.ones_like(_real(step))
        for start in starts:
            rate = torch.where(_real(step) >= start, rate * factor, rate)
        return rate

    return _Schedule(schedule)


@factory
def cosine(value: Number, total_steps: int, end: float = 0.0) -> Schedule:
    """Moves from `value` to `end` along half a cosine and stays there: `end + (value - end) (1 + cos(pi t / T)) / 2`.

    Args:
        value: The value at step 0: a non-negative number, or a tensor of shape ().
        total_steps: The step `T` from which on the value is `end`, at least 1.
        end: The last value, non-negative.

    >>> import torch
    >>> [round(cosine(1.0, 4)(torch.tensor(k)).item(), 3) for k in (0, 2, 4, 9)]
    [1.0, 0.5, 0.0, 0.0]

    References:
        Loshchilov and Hutter, 2017 (SGDR), equation 5, without restarts.
    """
    checks.nonnegative("cosine", value=value, end=end)
    checks.count("cosine", total_steps=total_steps)

    def schedule(step: Tensor) -> Tensor:
        done = torch.clamp(_real(step) / total_steps, max=1.0)
        return end + (value - end) * 0.5 * (1 + torch.cos(torch.pi * done))

    return _Schedule(schedule)


@factory
def warmup_cosine(value: Number, warmup_steps: int, total_steps: int, end: float = 0.0) -> Schedule:
    """Rises linearly from 0 to `value` in `warmup_steps`, then follows `cosine` down to `end` at `total_steps`.

    Args:
        value: The peak, reached at step `warmup_steps`. Non-negative.
        warmup_steps: Number of steps of the rise, at least 1 and less than `total_steps`.
        total_steps: Number of steps of the whole run, the rise included.
        end: The last value, non-negative.

    >>> import torch
    >>> [round(warmup_cosine(1.0, 2, 6)(torch.tensor(k)).item(), 3) for k in (0, 1, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    checks.nonnegative("warmup_cosine", value=value, end=end)
    checks.count("warmup_cosine", warmup_steps=warmup_steps, total_steps=total_steps)
    if warmup_steps >= total_steps:
        raise ValueError(
            f"warmup_cosine: `warmup_steps` must be less than `total_steps` ({total_steps}), got {warmup_steps}."
        )
    fall = cosine(value, total_steps - warmup_steps, end)

    def schedule(step: Tensor) -> Tensor:
        return torch.where(step < warmup_steps, value * _real(step) / warmup_steps, fall(step - warmup_steps))

    return _Schedule(schedule)
