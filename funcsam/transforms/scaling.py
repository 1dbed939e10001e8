"""Transforms that only rescale gradients: by a number, a norm, the magnitude of the params, a learning rate."""

from operator import neg
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from funcsam.core import checks, schedules, tree
from funcsam.core.records import factory
from funcsam.core.states import saveable
from funcsam.core.transform import Transform, lift
from funcsam.core.types import Hyper, Mask, Params, ScalarOrSchedule, State


@saveable
class ScaleState(NamedTuple):
    """State of `scale`, `scale_by_learning_rate`, `scale_by_magnitude` and `clip_by_global_norm`.

    Attributes:
        step: Number of updates so far, int64 of shape ().
    """

    step: Tensor


def _init(params: Params) -> ScaleState:
    return ScaleState(tree.counter(params))


@factory
def scale(factor: Hyper) -> Transform:
    """Multiplies gradients by a factor: `u = factor g`.

    Args:
        factor: A finite number, a tensor of shape (), a schedule, or a prefix tree of these: one factor per leaf or
            subtree.

    Raises:
        ValueError: If a factor is not finite, or the prefix does not fit the params.
    """
    checks.finite("scale", factor=factor)

    def update(grads: Params, state: ScaleState, params: Params) -> tuple[Params, State]:
        return tree.scale(schedules.at(factor, state.step), grads), ScaleState(state.step + 1)

    return lift(_init, update, ScaleState)


@factory
def scale_by_learning_rate(lr: Hyper) -> Transform:
    """Turns a descent direction into an update: `u = -lr g`.

    Args:
        lr: Learning rate. A non-negative number, a tensor of shape (), a schedule, or a prefix tree of these.

    Raises:
        ValueError: If a learning rate is negative or not finite.
    """
    checks.nonnegative("scale_by_learning_rate", lr=lr)

    def update(grads: Params, state: ScaleState, params: Params) -> tuple[Params, State]:
        rate = schedules.at(lr, state.step)
        rate = -rate if isinstance(rate, float | int | Tensor) else optree.tree_map(neg, rate)
        return tree.scale(rate, grads), ScaleState(state.step + 1)

    return lift(_init, update, ScaleState)


@factory
def normalize() -> Transform:
    """Divides gradients by their global norm: `u = g / ||g||`.

    A zero gradient gives zero; one entry that is NaN or infinite makes every entry NaN.

    >>> import torch
    >>> normalize().update(torch.tensor([1.0, 2.0]), lambda w: torch.tensor([3.0, 4.0]), ())[0]
    tensor([0.6000, 0.8000])
    """

    def update(grads: Params, state: State, params: Params) -> tuple[Params, State]:
        return tree.unit(grads), state

    return lift(lambda params: (), update, ())


@factory
def scale_by_magnitude(eta: Hyper = 0.0, mask: Mask = None) -> Transform:
    """Multiplies gradients by the magnitude of the params: `u = T g` with `T = |w| + eta`.

    Args:
        eta: Keeps `T` away from zero, in the units of the params. A non-negative number, a tensor of shape (), a
            schedule, or a prefix tree of these.
        mask: Where it applies: a prefix tree of booleans or a function of path and leaf. Elsewhere `T = 1`.

    Raises:
        ValueError: If `eta` is negative or not finite.

    References:
        Kwon et al., 2021 (ASAM), section 3: the element-wise normalisation operator `T_w + eta I`.
    """
    checks.nonnegative("scale_by_magnitude", eta=eta)

    def update(grads: Params, state: ScaleState, params: Params) -> tuple[Params, State]:
        updates = tree.scale_by_magnitude(grads, params, schedules.at(eta, state.step), mask)
        return updates, ScaleState(state.step + 1)

    return lift(_init, update, ScaleState)


@factory
def clip_by_global_norm(max_norm: ScalarOrSchedule) -> Transform:
    """Shortens gradients whose global norm exceeds `max_norm`: `u = g min(1, max_norm / ||g||)`.

    Gradients whose norm is at most `max_norm` are returned bit for bit. An infinite gradient gives NaN.

    Args:
        max_norm: Largest norm, in the units of the gradients. A positive number, a tensor of shape () or a schedule.

    Raises:
        ValueError: If `max_norm` is not positive and finite.

    References:
        Pascanu et al., 2013, algorithm 1.
    """
    checks.positive("clip_by_global_norm", max_norm=max_norm)

    def update(grads: Params, state: ScaleState, params: Params) -> tuple[Params, State]:
        norm, bound = tree.norm(grads), schedules.at(max_norm, state.step)
        factor = torch.where(norm > bound, bound * tree.reciprocal(norm), 1.0)
        return tree.scale(factor, grads), ScaleState(state.step + 1)

    return lift(_init, update, ScaleState)
