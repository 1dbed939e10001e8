"""Weight decay as a transform."""

from typing import NamedTuple

from torch import Tensor

from funcsam.core import checks, schedules, tree
from funcsam.core.records import factory
from funcsam.core.states import saveable
from funcsam.core.transform import Transform, lift
from funcsam.core.types import Mask, Params, ScalarOrSchedule, State


@saveable
class DecayState(NamedTuple):
    """State of `add_decayed_weights`.

    Attributes:
        step: Number of updates so far, int64 of shape ().
    """

    step: Tensor


@factory
def add_decayed_weights(weight_decay: ScalarOrSchedule = 0.0, mask: Mask = None) -> Transform:
    """Adds the decayed params to the gradients: `u = g + weight_decay w`.

    Its place in the chain is its meaning: before `sam` it is L2 inside the loss, at `w` and at `w + e`; after `sam` it
    is torch.optim's habit; after `scale_by_adam` it is decoupled, as in AdamW.

    Args:
        weight_decay: A non-negative number, a tensor of shape () or a schedule.
        mask: Where it applies: a prefix tree of booleans or a function of path and leaf, e.g.
            `lambda path, leaf: leaf.ndim > 1` to spare biases and normalisation layers.

    Raises:
        ValueError: If `weight_decay` is negative or not finite.

    >>> import torch
    >>> tx, w = add_decayed_weights(0.5), torch.tensor(4.0)
    >>> tx.update(w, torch.func.grad(lambda w: 3 * w), tx.init(w))
    (tensor(5.), DecayState(step=tensor(1)), ())
    """
    checks.nonnegative("add_decayed_weights", weight_decay=weight_decay)

    def update(grads: Params, state: DecayState, params: Params) -> tuple[Params, State]:
        factor = schedules.at(weight_decay, state.step)
        return tree.add_scaled(grads, factor, params, mask), DecayState(state.step + 1)

    return lift(lambda params: DecayState(tree.counter(params)), update, DecayState)
