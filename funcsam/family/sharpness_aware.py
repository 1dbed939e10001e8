"""The sharpness-aware step: an ascent chain and a combination."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcsam.core import checks, tree
from funcsam.core.evaluations import either
from funcsam.core.records import factory
from funcsam.core.states import saveable
from funcsam.core.transform import Transform, check_transform
from funcsam.core.types import Aux, P, PairedGradsFn, Params, State

Combine = Callable[[Params, Params, Tensor], Params]
When = Callable[[Tensor], Tensor | bool]


@saveable
class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware` and of the family built on it.

    Attributes:
        step: Number of updates so far, int64 of shape ().
        ascent: State of the ascent chain.
    """

    step: Tensor
    ascent: State


def _shifted(grads_fn: PairedGradsFn, offset: Params) -> PairedGradsFn:
    return lambda params, *batch: grads_fn(tree.add(params, offset), *batch)


def check_ascent(where: str, ascent: Transform) -> None:
    """Raises unless `ascent` is a transform that only maps gradients."""
    check_transform(where, ascent=ascent)
    found = ascent.prober()
    if found is not None:
        raise ValueError(
            f"{where}: `ascent` must map gradients to a perturbation, got {found}, which asks for gradients of its "
            "own. Pass how to climb, such as `chain(normalize(), scale(rho))`."
        )


def check_combine(where: str, combine: Combine | None) -> None:
    """Raises unless `combine` is `None` or a function that takes three arguments, as far as that can be seen."""
    if combine is None or torch.compiler.is_compiling():  # which cannot look at a signature
        return
    checks.function(where, combine=combine)
    try:
        signature = inspect.signature(combine)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    try:
        signature.bind((), (), ())
    except TypeError:
        raise TypeError(
            f"{where}: `combine` must take three arguments, `(grads, probe, step)`, got a function of {signature}. "
            "Let it take the step, too, also where it makes no use of it."
        ) from None


@factory
def sharpness_aware(
    ascent: Transform, combine: Combine | None = None, when: When | None = None, steps: int = 1
) -> Transform:
    """Climbs from the params, asks for a second gradient there, and combines the two.

    `e = ascent(g)`, `g+ = grads_fn(w + e)`, `u = combine(g, g+, step)`. If the loss draws random numbers (dropout),
    they are others for `g+`, which then differs from `g` also where `e = 0`, unless `common_randomness()` stands in
    front.

    Args:
        ascent: A transform (usually a chain) from gradient to perturbation `e`, which is *added* to the params. It
            must not ask for gradients at other params, as `sam` does.
        combine: `combine(grads, probe, step) -> updates`, from the gradients at `w` and at `w + e` and the number of
            updates so far (int64, shape ()), at which it can read a schedule. `None` takes the probe, as SAM does, and
            keeps no gradient alive beside it.
        when: `when(step)` is true on the steps that probe, a bool or a boolean tensor of shape (); on the others the
            update is the plain gradient. `None` probes always. In plain eager code a step without a probe costs one
            gradient; under `vmap` and `torch.compile` both are computed and one is chosen, as `either` says.
        steps: Number of ascents, each of `1/steps` the length: their sum stays inside any convex neighbourhood without
            a projection. `steps + 1` gradient evaluations.

    Returns:
        A `Transform` whose `aux` and upstream states are those of the evaluation at the params.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If `steps` is less than 1, or `ascent` is, or holds, a transform such as `sam`.

    References:
        Foret et al., 2021 (SAM), algorithm 1; appendix C.6 for several steps.
    """
    check_ascent("sharpness_aware", ascent)
    check_combine("sharpness_aware", combine)
    if when is not None:
        checks.function("sharpness_aware", when=when)
    checks.count("sharpness_aware", steps=steps)
    keeps_grads = combine is not None or when is not None

    def init(params: Params) -> SharpnessAwareState:
        return SharpnessAwareState(tree.counter(params), ascent.init(params))

    def at_params(grads_fn: PairedGradsFn) -> PairedGradsFn:
        """Lets the plain gradient travel in aux, next to what is kept."""

        def evaluate(params: P, *batch: object) -> tuple[P, Aux]:
            grads, aux = grads_fn(params, *batch)
            return grads, (grads if keeps_grads else (), aux)

        return evaluate

    def perturbed(params: P, grads_fn: PairedGradsFn, state: State, batch: tuple[object, ...], offset: P) -> P:
        """Adds the ascent to the params, after the remaining ascents."""
        if steps > 1:
            offset = tree.scale(1 / steps, offset)
        for _ in range(steps - 1):
            more, _, _ = ascent.update_unchecked(params, _shifted(grads_fn, offset), state, *batch)
            offset = tree.add_scaled(offset, 1 / steps, more)
        return tree.add(params, offset)

    def update(params: P, grads_fn: PairedGradsFn, state: SharpnessAwareState, *batch: object) -> tuple[P, State, Aux]:
        offset, ascent_state, (grads, aux) = ascent.update_unchecked(params, at_params(grads_fn), state.ascent, *batch)
        offsets = [offset]
        del offset  # so that `pop` lets it go: memory peaks in the backward pass at the probe

        def probed() -> P:
            point = perturbed(params, grads_fn, state.ascent, batch, offsets.pop())
            probe, _ = grads_fn(point, *batch)
            updates: P = probe if combine is None else combine(grads, probe, state.step)
            return updates

        pick = True if when is None else when(state.step)
        return either(pick, probed, lambda: grads), SharpnessAwareState(state.step + 1, ascent_state), aux

    return Transform(init, update, SharpnessAwareState, lambda state: [(ascent, state.ascent)], probes=True)
