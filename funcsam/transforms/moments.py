"""Transforms whose state holds past gradients: momentum and the moments of Adam."""

from typing import NamedTuple

from torch import Tensor

from funcsam.core import checks, schedules, tree
from funcsam.core.records import factory
from funcsam.core.states import saveable
from funcsam.core.transform import Transform, lift
from funcsam.core.types import Params, ScalarOrSchedule, State


@saveable
class TraceState(NamedTuple):
    """State of `trace`.

    Attributes:
        step: Number of updates so far, int64 of shape ().
        trace: Decayed sum of past gradients. Structure and shapes of the params.
    """

    step: Tensor
    trace: Params


@factory
def trace(decay: ScalarOrSchedule = 0.9, *, dampening: ScalarOrSchedule = 0.0, nesterov: bool = False) -> Transform:
    """Replaces the gradient by a decayed sum of all gradients so far (momentum).

    `m = decay m + (1 - dampening) g`, where the first gradient enters undamped, as in torch.optim.SGD; `u = m`, or
    `u = g + decay m` with `nesterov`.

    Args:
        decay: Momentum, in [0, 1]; 1 adds all gradients up. A number, a tensor of shape () or a schedule.
        dampening: In [0, 1]. A number, a tensor of shape () or a schedule.
        nesterov: Whether to use Nesterov's momentum, `u = g + decay m`.

    Raises:
        ValueError: If `decay` or `dampening` is out of range, or `dampening` is not 0 with `nesterov`.

    References:
        Sutskever et al., 2013, equations 3 and 4, with the learning rate outside the sum.
    """
    checks.share("trace", decay=decay, dampening=dampening)
    damped = schedules.nonzero(dampening)
    if nesterov and damped:
        raise ValueError(f"trace: `dampening` must be 0 with `nesterov`, got {dampening}.")

    def init(params: Params) -> TraceState:
        return TraceState(tree.counter(params), tree.zeros_like(params))

    def update(grads: Params, state: TraceState, params: Params) -> tuple[Params, State]:
        factor = schedules.at(decay, state.step)
        fresh = grads
        if damped:
            keep = 1 - schedules.at(dampening, state.step)
            fresh = tree.where(state.step == 0, grads, tree.scale(keep, grads))
        total = tree.add_scaled(fresh, factor, state.trace, words=tree.STATE)
        updates = tree.add_scaled(grads, factor, total) if nesterov else total
        return updates, TraceState(state.step + 1, total)

    return lift(init, update, TraceState)


@saveable
class AdamState(NamedTuple):
    """State of `scale_by_adam`.

    Attributes:
        step: Number of updates so far, int64 of shape ().
        mean: Moving average of the gradients. Structure and shapes of the params.
        square: Moving average of their squares. Structure and shapes of the params.
        largest: With `amsgrad` the largest `square` so far, in the structure and shapes of the params; otherwise `()`.
    """

    step: Tensor
    mean: Params
    square: Params
    largest: Params


@factory
def scale_by_adam(
    b1: ScalarOrSchedule = 0.9, b2: ScalarOrSchedule = 0.999, eps: ScalarOrSchedule = 1e-8, *, amsgrad: bool = False
) -> Transform:
    """Divides the mean gradient by the root of the mean squared gradient, both with bias correction.

    `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, `u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)`.
    Complex leaves are treated as pairs of reals, as in torch.optim.

    Args:
        b1: Decay of the mean, in [0, 1). A number, a tensor of shape () or a schedule.
        b2: Decay of the mean square, in [0, 1). A number, a tensor of shape () or a schedule.
        eps: Added to the root. A non-negative number, a tensor of shape () or a schedule.
        amsgrad: Whether to divide by the largest mean square so far.

    Raises:
        ValueError: If `b1`, `b2` or `eps` is out of range.

    References:
        Kingma and Ba, 2015, algorithm 1; Reddi et al., 2018, algorithm 2 (AMSGrad).
    """
    checks.fraction("scale_by_adam", b1=b1, b2=b2)
    checks.nonnegative("scale_by_adam", eps=eps)

    def init(params: Params) -> AdamState:
        mean, square = tree.zeros_like(params), tree.zeros_like(params)
        return AdamState(tree.counter(params), mean, square, tree.zeros_like(params) if amsgrad else ())

    def update(grads: Params, state: AdamState, params: Params) -> tuple[Params, State]:
        for moment, like in zip(state[1:], (params, params, params if amsgrad else ()), strict=True):
            checks.same("step", "state", moment, like)
        count = (state.step + 1).to(tree.real_dtype(params))
        decay, decay_square, floor = (schedules.at(value, state.step) for value in (b1, b2, eps))
        g, m, v = grads, state.mean, state.square
        if any(leaf.is_complex() for leaf in tree.flatten(params)[0]):
            g, m, v = (tree.real_views(each) for each in (grads, state.mean, state.square))
        m = tree.lerp(m, g, 1 - decay)
        v = tree.lerp(v, tree.multiply(g, g), 1 - decay_square)
        bound = tree.maximum(tree.real_views(state.largest), v) if amsgrad else v
        root = tree.sqrt(tree.scale(1 / (1 - decay_square**count), bound))
        updates = tree.divide(tree.scale(1 / (1 - decay**count), m), tree.shift(root, floor))
        largest = tree.like_views(bound, params) if amsgrad else ()
        new_state = AdamState(state.step + 1, tree.like_views(m, params), tree.like_views(v, params), largest)
        return tree.like_views(updates, params), new_state

    return lift(init, update, AdamState)
