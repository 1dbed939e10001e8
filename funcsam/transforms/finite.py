"""Steps that are skipped where something is not finite."""

from typing import NamedTuple

import optree
import torch
from torch import Tensor

from funcsam.core import tree
from funcsam.core.records import factory
from funcsam.core.states import saveable
from funcsam.core.transform import Transform, check_transform
from funcsam.core.types import Aux, P, PairedGradsFn, Params, State


@saveable
class ApplyIfFiniteState(NamedTuple):
    """State of `apply_if_finite`.

    Attributes:
        skipped: Number of steps that were skipped so far, int64 of shape ().
        inner: State of the inner transform; a step that is skipped does not change it.
    """

    skipped: Tensor
    inner: State


def skip_unless(finite: Tensor, updates: P, new_state: State, state: State) -> tuple[P, State]:
    """Returns the updates and the new state where `finite` is True, zeros and the old state where it is False."""
    chosen: State = optree.tree_map(lambda new, old: torch.where(finite, new, old), new_state, state)
    return tree.where(finite, updates, tree.zeros_like(updates)), chosen


@factory
def apply_if_finite(inner: Transform) -> Transform:
    """Skips every step whose updates are not finite: params and the state of `inner` stay as they are.

    It wraps the whole chain, `apply_if_finite(chain(sam(rho), sgd(lr)))`: a NaN anywhere in the gradients of either
    evaluation reaches the updates. With `distributed.all_reduce_mean` in the chain it reaches those of every rank, so
    that all ranks skip. The host does not wait for the device. `aux` is what the loss returned, also in a step that is
    skipped.

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
    check_transform("apply_if_finite", inner=inner)

    def init(params: Params) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(tree.counter(params), inner.init_unchecked(params))

    def update(params: P, grads_fn: PairedGradsFn, state: ApplyIfFiniteState, *batch: object) -> tuple[P, State, Aux]:
        updates, new_state, aux = inner.update_unchecked(params, grads_fn, state.inner, *batch)
        finite = tree.all_finite(updates)
        updates, new_state = skip_unless(finite, updates, new_state, state.inner)
        return updates, ApplyIfFiniteState(state.skipped + ~finite, new_state), aux

    return Transform(init, update, ApplyIfFiniteState, lambda state: [(inner, state.inner)])
