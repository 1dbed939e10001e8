"""Loss scaling for float16, so that gradients neither underflow nor overflow."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcsam.core import checks, tree
from funcsam.core.records import factory
from funcsam.core.states import saveable
from funcsam.core.transform import Carried, Transform, check_transform
from funcsam.core.types import Aux, CheckedGradsFn, P, PairedGradsFn, Params, State
from funcsam.transforms.finite import skip_unless


@saveable
class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
        scale: What the loss is multiplied by before the backward pass, float32 of shape ().
        growth_tracker: Number of finite steps since the scale last changed, int32 of shape ().
        inner: State of the inner transform; a step that is skipped does not change it.
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

    It wraps the whole chain, `dynamic_loss_scale(chain(sam(rho), sgd(lr)))`, so that every norm and every clipping is
    computed from unscaled gradients. A step in which any evaluation is not finite is skipped as a whole: params and the
    state of `inner` stay as they are. The scale is then multiplied by `backoff_factor`; after `growth_interval` finite
    steps in a row it is multiplied by `growth_factor`. These are the rules of `torch.amp.GradScaler`. The host does not
    wait for the device.

    Args:
        inner: The whole chain.
        init_scale: The first scale, positive.
        growth_factor: Factor of the scale when it grows, at least 1.
        backoff_factor: Factor of the scale after a skipped step, in (0, 1).
        growth_interval: Number of finite steps in a row before the scale grows, at least 1.

    Returns:
        A `Transform` for a `grads_fn` that `grad_and_value` made. `aux` holds the unscaled loss.

    Raises:
        TypeError: If `inner` is not a `Transform`, or on a step, if the loss of `grads_fn` cannot be scaled.
        ValueError: If a number is out of range.

    References:
        Micikevicius et al., 2018, section 3.2.
    """
    check_transform("dynamic_loss_scale", inner=inner)
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
        updates, new_state, (finite, aux) = inner.update_unchecked(params, unscaled, state.inner, *batch)
        finite = (finite == 1) & tree.all_finite(updates)
        updates, new_state = skip_unless(finite, updates, new_state, state.inner)
        tracker = state.growth_tracker + 1
        grown = state.scale * growth_factor
        grows = (tracker >= growth_interval) & grown.isfinite()
        scale = torch.where(finite, torch.where(grows, grown, state.scale), state.scale * backoff_factor)
        tracker = torch.where(finite & (tracker < growth_interval), tracker, torch.zeros_like(tracker))
        return updates, LossScaleState(scale, tracker, new_state), aux

    return Transform(init, update, LossScaleState, lambda state: [(inner, state.inner)])


def _unscaled(grads_fn: PairedGradsFn, scale: Tensor) -> PairedGradsFn:
    """Returns the grads_fn of unscaled gradients; if one entry is not finite, all are NaN, also those downstream."""
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
