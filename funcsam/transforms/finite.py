"""Steps that are skipped where something is not finite."""

from typing import NamedTuple

import optree
import torch
from torch import Tensor

from funcsam.core import tree
from funcsam.core.records import factory
from funcsam.core.transform import Transform, saveable
from funcsam.core.types import Aux, P, PairedGradsFn, Params, State


@saveable
class ApplyIfFiniteState(NamedTuple):
    """State of `apply_if_finite`.

    Attributes:
        skipped: Number of steps that were skipped so far, int64 of shape ().
        inner: State of the transform inside; it does not move in a step that is skipped.
    """

    skipped: Tensor
    inner: State


def kept(finite: Tensor, updates: P, moved: State, state: State) -> tuple[P, State]:
    """Returns updates and the moved state where `finite` is True, and zeros and the state as it was where not."""
    still: State = optree.tree_map(lambda new, old: torch.where(finite, new, old), moved, state)
    return tree.where(finite, updates, tree.zeros_like(updates)), still


@factory
def apply_if_finite(inner: Transform) -> Transform:
    """Skips every step whose updates are not finite: params and the state of `inner` stay as they are.

    It wraps the whole chain, `apply_if_finite(chain(sam(rho), sgd(lr)))`: a NaN anywhere in the gradients of either
    evaluation reaches the updates. Behind `distributed.all_reduce_mean` it reaches those of every rank, so that all
    skip. Nothing waits for the device. `aux` is what the loss returned, also of a step that is skipped.

    Args:
        inner: The whole chain.

    Raises:
        TypeError: If `inner` is not a `Transform`.

    >>> import torch
    >>> from funcsam import identity
    >>> tx = apply_if_finite(identity())
    >>> tx.update(torch.tensor(0.0), lambda w: 1 / w, tx.init(torch.tensor(0.0)))[:2]
    (tensor(0.), ApplyIfFiniteState(skipped=tensor(1), inner=()))
    """
    if not isinstance(inner, Transform):
        raise TypeError(f"apply_if_finite: `inner` must be a Transform, got {type(inner).__name__}.")

    def init(params: Params) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(tree.counter(params), inner.init_unchecked(params))

    def update(params: P, grads_fn: PairedGradsFn, state: ApplyIfFiniteState, *batch: object) -> tuple[P, State, Aux]:
        updates, moved, aux = inner.update_unchecked(params, grads_fn, state.inner, *batch)
        finite = tree.all_finite(updates)
        updates, still = kept(finite, updates, moved, state.inner)
        return updates, ApplyIfFiniteState(state.skipped + ~finite, still), aux

    return Transform(init, update, ApplyIfFiniteState, lambda state: [(inner, state.inner)])
