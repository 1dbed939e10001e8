"""Loss scaling for float16: gradients that neither vanish nor overflow."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcsam.core import checks, tree
from funcsam.core.records import factory
from funcsam.core.transform import Carried, Transform, saveable
from funcsam.core.types import Aux, CheckedGradsFn, P, PairedGradsFn, Params, State
from funcsam.transforms.finite import kept


@saveable
class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
        scale: What the loss is multiplied by before the backward pass, float32 of shape ().
        growth_tracker: Number of finite steps since the scale last changed, int32 of shape ().
        inner: State of the transform inside; it does not move in a step that is skipped.
    """

    scale: Tensor
    growth_tracker: Tensor
    inner: State


@factory
def dynamic_loss_scale(
    inner: Transform,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> Transform:
    """Multiplies the loss before every backward pass and divides the gradients by the same number afterwards.

    It wraps the whole chain, `dynamic_loss_scale(chain(sam(rho), sgd(lr)))`, so that every norm and every clipping sees
    gradients of the true size. A step in which any evaluation is not finite is skipped as a whole: params and the state
    of `inner` stay as they are. The scale then backs off, and it grows again after `growth_interval` finite steps: the
    rules of `torch.amp.GradScaler`. Nothing waits for the device.

    Args:
        inner: The whole chain.
        init_scale: Where the scale starts, positive.
        growth_factor: What it grows by, at least 1.
        backoff_factor: What it backs off by, in (0, 1).
        growth_interval: Finite steps in a row before it grows.

    Returns:
        A `Transform` for a `grads_fn` that `grad_and_value` made. `aux` holds the loss as it is, not scaled.

    Raises:
        TypeError: If `inner` is not a `Transform`, or on a step, if the loss behind `grads_fn` cannot be scaled.
        ValueError: If a number is out of range.

    References:
        Micikevicius et al., 2018, section 3.2.
    """
    if not isinstance(inner, Transform):
        raise TypeError(f"dynamic_loss_scale: `inner` must be a Transform, got {type(inner).__name__}.")
    checks.positive("dynamic_loss_scale", init_scale=init_scale, backoff_factor=backoff_factor)
    checks.count("dynamic_loss_scale", growth_interval=growth_interval)
    if growth_factor < 1:
        raise ValueError(f"dynamic_loss_scale: `growth_factor` must be at least 1, got {growth_factor}.")
    if backoff_factor >= 1:
        raise ValueError(f"dynamic_loss_scale: `backoff_factor` must be less than 1, got {backoff_factor}.")

    def init(params: Params) -> LossScaleState:
        tracker = tree.counter(params).to(torch.int32)
        return LossScaleState(
            torch.full_like(tracker, init_scale, dtype=torch.float32), tracker, inner.init_unchecked(params)
        )

    def update(params: P, grads_fn: PairedGradsFn, state: LossScaleState, *batch: object) -> tuple[P, State, Aux]:
        unscaled = _unscaled(grads_fn, state.scale)
        updates, moved, (finite, aux) = inner.update_unchecked(params, unscaled, state.inner, *batch)
        finite = (finite == 1) & tree.all_finite(updates)
        updates, still = kept(finite, updates, moved, state.inner)
        tracker = state.growth_tracker + 1
        grown = state.scale * growth_factor
        grows = (tracker >= growth_interval) & grown.isfinite()
        scale = torch.where(finite, torch.where(grows, grown, state.scale), state.scale * backoff_factor)
        tracker = torch.where(finite & (tracker < growth_interval), tracker, torch.zeros_like(tracker))
        return updates, LossScaleState(scale, tracker, still), aux

    return Transform(init, update, LossScaleState, lambda state: [(inner, state.inner)])


def _unscaled(grads_fn: PairedGradsFn, scale: Tensor) -> PairedGradsFn:
    """Gradients of the true size; where one entry is not finite all are NaN, so that none goes unseen downstream."""
    scaled = grads_fn.scaled(scale) if isinstance(grads_fn, CheckedGradsFn) else None
    if scaled is None:
        raise TypeError(
            "dynamic_loss_scale: `grads_fn` must come from `funcsam.grad_and_value`, and the transform must wrap the "
            "whole chain: the loss is scaled before its backward pass."
        )

    def evaluate(params: P, *batch: object) -> tuple[P, Aux]:
        grads, aux = scaled(params, *batch)
        finite = tree.all_finite(grads)
        grads = tree.scale(torch.where(finite, 1 / scale, torch.nan), grads)
        return grads, Carried(finite.to(scale.dtype), aux)

    return evaluate
