"""LookSAM: SAM every k-th step, and in between what the last look has found."""

from typing import NamedTuple

from torch import Tensor

from funcsam.core import checks, schedules, tree
from funcsam.core.evaluations import either
from funcsam.core.records import factory
from funcsam.core.states import saveable
from funcsam.core.transform import Transform
from funcsam.core.types import Aux, Hyper, P, PairedGradsFn, Params, ScalarOrSchedule, State


@saveable
class LookSAMState(NamedTuple):
    """State of `looksam`.

    Attributes:
        step: Number of updates so far, int64 of shape ().
        across: The part of the last SAM gradient that is orthogonal to the gradient of that step. Structure and shapes
            of the params; zero before the first step.
    """

    step: Tensor
    across: Params


@factory
def looksam(rho: Hyper = 0.1, alpha: ScalarOrSchedule = 0.7, k: int = 5) -> Transform:
    """Takes SAM's gradient on every k-th step, and reuses what was new in it on the steps in between.

    On the steps `0, k, 2k, ...` it is SAM, `u = g+`, and keeps `v`, the part of `g+` that is orthogonal to `g`. On the
    others `u = g + alpha (||g|| / ||v||) v`, and the plain gradient if `v` is zero. Norms and products are global.

    Args:
        rho: Radius of the neighbourhood, as in `sam`: a non-negative number, a tensor of shape `()`, a schedule, or a
            prefix tree of these. `0` gives back the base optimizer. The authors use 0.05 to 0.2.
        alpha: Length of the reused part, relative to the gradient. A non-negative number, a tensor of shape `()` or a
            schedule. The default is the authors'.
        k: How often it is SAM: every k-th step, at least 1, which is SAM. The authors use 5 and 10.

    Returns:
        A `Transform` that in plain eager code evaluates `grads_fn` twice on every k-th step and once on the others.
        Under `vmap` and `torch.compile` it evaluates twice on every step, as `either` says, and saves nothing. Its
        `aux` is that of the params.

    Raises:
        TypeError: If `k` is not a whole number.
        ValueError: If `rho` or `alpha` is negative or not finite, or `k` is less than 1.

    The first look at `w` finds `v = (0, 2)` across `g = (3, 0)`; the second step adds it at half the length of `g`:

    >>> import torch
    >>> answers = iter([torch.tensor([3.0, 0.0]), torch.tensor([3.0, 2.0]), torch.tensor([4.0, 0.0])])
    >>> tx, w = looksam(rho=0.1, alpha=0.5, k=2), torch.zeros(2)
    >>> updates, state, _ = tx.update(w, lambda w: next(answers), tx.init(w))
    >>> tx.update(w, lambda w: next(answers), state)[0]
    tensor([4., 2.])

    References:
        Liu et al., 2022, algorithm 1. arXiv 2203.02714.
    """
    checks.nonnegative("looksam", rho=rho, alpha=alpha)
    checks.count("looksam", k=k)

    def init(params: Params) -> LookSAMState:
        return LookSAMState(tree.counter(params), tree.zeros_like(params))

    def update(params: P, grads_fn: PairedGradsFn, state: LookSAMState, *batch: object) -> tuple[P, State, Aux]:
        checks.same("step", "state", state.across, params)
        grads, aux = grads_fn(params, *batch)

        def look() -> tuple[P, P]:
            point = tree.add(params, tree.scale(schedules.at(rho, state.step), tree.unit(grads)))
            probe, _ = grads_fn(point, *batch)
            return probe, tree.reject(probe, grads)

        def reuse() -> tuple[P, P]:
            length = schedules.at(alpha, state.step) * tree.norm(grads) * tree.reciprocal(tree.norm(state.across))
            return tree.add_scaled(grads, length, state.across), state.across

        updates, across = either(state.step % k == 0, look, reuse)
        return updates, LookSAMState(state.step + 1, across), aux

    return Transform(init, update, LookSAMState, probes=True)
