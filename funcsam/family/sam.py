"""SAM and its adaptive form, ASAM."""

from funcsam.core import checks
from funcsam.core.records import factory
from funcsam.core.transform import Transform, chain
from funcsam.core.types import Aux, GradsFn, Hyper, Mask, P, State
from funcsam.family.sharpness_aware import sharpness_aware
from funcsam.transforms.scaling import normalize, scale, scale_by_magnitude


@factory
def sam(rho: Hyper = 0.05) -> Transform:
    """Replaces the gradient at `w` by the gradient at the worst point nearby, `w + rho g / ||g||`.

    The norm is global: taken over all leaves, also where `rho` differs between them.

    Args:
        rho: Radius of the neighbourhood, in the units of the params. A non-negative number, a tensor of shape `()`, a
            schedule from the step (int64, shape `()`) to either, or a prefix tree of these: one radius per leaf or
            subtree. `0` gives back the base optimizer, if the loss draws no random numbers: the update is that of the
            second evaluation, which has other dropout masks than the first. With `common_randomness()` in front it has
            the same, and `0` is the base optimizer again.

    Returns:
        A `Transform` that evaluates `grads_fn` twice a step; its `aux` is that of the params.

    Raises:
        ValueError: If `rho` is negative or not finite.

    On `L = w^2`, `g = 2w` at `w = 1` climbs to `1.5`, where the gradient is 3:

    >>> import torch
    >>> tx, w = sam(rho=0.5), torch.tensor(1.0)
    >>> tx.update(w, torch.func.grad(lambda w: w**2), tx.init(w))[0]
    tensor(3.)

    References:
        Foret et al., 2021, equation 2 and algorithm 1. arXiv 2010.01412.
    """
    checks.nonnegative("sam", rho=rho)
    return sharpness_aware(plain_ascent(rho))


def plain_ascent(rho: Hyper) -> Transform:
    """Returns the chain from gradient to perturbation of `sam`."""
    return chain(normalize(), scale(rho))


@factory
def asam(rho: Hyper = 2.0, eta: Hyper = 0.0, mask: Mask = None) -> Transform:
    """Climbs in a neighbourhood that scales with the params: `e = rho T^2 g / ||T g||`, `T = |w| + eta`.

    Two conventions are in use, with radii that differ accordingly. The default is that of the widely copied PyTorch
    class: `eta = 0`, every leaf, `rho = 2`. The authors' is `asam(0.5, eta=0.01, mask=weights)` with `T = 1` for all
    but the weights: `weights = lambda path, leaf: "weight" in path[-1]`.

    Args:
        rho: Radius in the scaled space, relative to the params. A non-negative number, a tensor of shape `()`, a
            schedule, or a prefix tree of these. `0` gives back the base optimizer, with dropout only behind
            `common_randomness()`, as in `sam`.
        eta: Keeps `T` away from zero, in the units of the params; likewise. With `0` the step is invariant under a
            rescaling of the params that leaves the function unchanged, and a param that is zero is not perturbed.
        mask: Where `T = |w| + eta`: a prefix tree of booleans, or a function of path and leaf. Elsewhere `T = 1`.

    Returns:
        A `Transform` that evaluates `grads_fn` twice a step; its `aux` is that of the params.

    Raises:
        ValueError: If `rho` or `eta` is negative or not finite.

    On `L = w^2` at `w = 2` the ascent is `rho |w| = 1`, and the gradient at 3 is 6:

    >>> import torch
    >>> tx, w = asam(rho=0.5), torch.tensor(2.0)
    >>> tx.update(w, torch.func.grad(lambda w: w**2), tx.init(w))[0]
    tensor(6.)

    References:
        Kwon et al., 2021, equation 8 with `p = 2`. arXiv 2102.11600.
    """
    checks.nonnegative("asam", rho=rho, eta=eta)
    return sharpness_aware(adaptive_ascent(rho, eta, mask))


def adaptive_ascent(rho: Hyper, eta: Hyper, mask: Mask) -> Transform:
    """Returns the chain from gradient to perturbation of `asam`."""
    magnitude = scale_by_magnitude(eta, mask)
    return chain(magnitude, normalize(), magnitude, scale(rho))


def sam_update(
    params: P, grads_fn: GradsFn[P], state: State, *batch: object, rho: Hyper = 0.05, adaptive: bool = False
) -> tuple[P, State, Aux]:
    """Returns the sharpness-aware gradient as a plain function: `sam(rho).update`, or `asam(rho).update`.

    Args:
        params: A pytree of tensors.
        grads_fn: `grads_fn(params, *batch)` returns `(grads, aux)` or `grads`.
        state: From `sam().init(params)`, or `asam().init(params)` if `adaptive`, or the last call.
        *batch: Passed on to `grads_fn`.
        rho: Radius of the neighbourhood, as in `sam` and `asam`.
        adaptive: Whether the neighbourhood scales with the params (`eta = 0`, every leaf).

    Returns:
        `(grads, state, aux)`: the gradient at the worst point nearby, with the structure of the params, and the `aux`
        of the params.

    Raises:
        ValueError: If `rho` is negative or not finite, or the state is of the other kind.

    >>> import torch
    >>> w = torch.tensor(1.0)
    >>> sam_update(w, torch.func.grad(lambda w: w**2), sam().init(w), rho=0.5)[0]
    tensor(3.)
    """
    return (asam(rho) if adaptive else sam(rho)).update(params, grads_fn, state, *batch)
