"""Average-case sharpness: how far the loss rises under random perturbations."""

from torch import Tensor

from funcsam.core import tree
from funcsam.core.types import Mask, P
from funcsam.measures.support import Estimate, Loss, checked, estimate, neighbourhood, normal


def average_case_sharpness(
    loss_fn: Loss,
    params: P,
    *batch: object,
    rho: float | Tensor = 0.05,
    draws: int = 32,
    seed: int = 0,
    adaptive: bool = False,
    eta: float | Tensor = 0.0,
    mask: Mask = None,
    chunk_size: int | None = None,
) -> Estimate:
    """Estimates how far the loss rises on average: `E L(w + e) - L(w)` with `e ~ N(0, rho^2 T^2)`.

    To second order it is `rho^2 / 2` times the trace of `T H T`. `rho` is a deviation per param: the perturbation is
    about `rho sqrt(n)` long for `n` params, so that radii of `worst_case_sharpness` are far too large here.

    Draws are independent. The same seed gives the same perturbations, under `vmap` to every member, which takes chance
    out of the comparison of two solutions; the error of a difference is then that of the differences of the draws.
    Sharpness predicts generalisation only weakly (Andriushchenko et al., 2023).

    Args:
        loss_fn: `loss_fn(params, *batch)` returns the loss, a real tensor of shape ().
        params: A pytree of tensors.
        *batch: Passed on to `loss_fn`.
        rho: Deviation, in the units of the params, or relative to them with `adaptive`. A non-negative number or a
            tensor of shape (), which `vmap` may batch.
        draws: Number of perturbations, at least 2.
        seed: Where the generators of the perturbations start. They are drawn on the device of the params.
        adaptive: Whether `T = |w| + eta`; otherwise `T = 1`. With it, and `eta = 0`, a rescaling of a ReLU network that
            leaves its function as it is changes nothing.
        eta: Keeps `T` away from zero, in the units of the params.
        mask: Where `T = |w| + eta`: a prefix tree of booleans, or a function of path and leaf. Elsewhere `T = 1`.
        chunk_size: How many draws are computed at once by `vmap`; `None` takes all, each with params of its own, and 1
            takes them in a plain loop.

    Returns:
        `(mean, standard_error)`, tensors of shape ().

    Raises:
        TypeError: If `loss_fn` does not return a real tensor of shape (), or a number is something else.
        ValueError: If a number is out of range, or `eta` or `mask` comes without `adaptive`.

    With `L = w^2 / 2` a deviation of 0.1 gives 0.005:

    >>> import torch
    >>> mean, error = average_case_sharpness(lambda w: w**2 / 2, torch.tensor(0.0), rho=0.1, draws=1000)
    >>> bool((mean - 0.005).abs() < 4 * error)
    True

    References:
        Andriushchenko et al., 2023, who compare it with the worst case. arXiv 2302.07011.
    """
    where = "average_case_sharpness"
    near = neighbourhood(where, rho, adaptive, eta, mask)
    loss, params = checked(where, loss_fn, params)
    start = loss(params, *batch)

    def rise(noise: P) -> Tensor:
        offset = tree.scale(rho, near.stretch(noise, params))
        return loss(tree.add(params, offset), *batch) - start

    return estimate(where, rise, normal, params, draws, seed, chunk_size)
