"""Worst-case sharpness: how far the loss rises in a ball around the params."""

import math

import torch
from torch import Tensor

from funcsam.core import checks, tree
from funcsam.core.gradients import grad_and_value
from funcsam.core.slices import taken_apart
from funcsam.core.transform import identity
from funcsam.core.types import InDims, Mask, P, Params
from funcsam.measures.support import Loss, Neighbourhood, checked, neighbourhood
from funcsam.transforms.batches import microbatch


def gradient_norm(loss_fn: Loss, params: Params, *batch: object) -> Tensor:
    """Returns `||grad L(w)||`, the 2-norm over all leaves.

    To first order it is the worst-case sharpness divided by `rho`.

    Args:
        loss_fn: `loss_fn(params, *batch)` returns the loss, a real tensor of shape ().
        params: A pytree of tensors.
        *batch: Passed on to `loss_fn`.

    Returns:
        The norm, a tensor of shape ().

    Raises:
        TypeError: If `loss_fn` does not return a real tensor of shape ().

    >>> gradient_norm(lambda w: w @ torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0]))
    tensor(5.)
    """
    loss, params = checked("gradient_norm", loss_fn, params)
    return tree.norm(grad_and_value(loss)(params, *batch)[0])


def worst_case_sharpness(
    loss_fn: Loss,
    params: P,
    *batch: object,
    rho: float | Tensor = 0.05,
    steps: int = 1,
    adaptive: bool = False,
    eta: float | Tensor = 0.0,
    mask: Mask = None,
) -> Tensor:
    """Returns how far the loss rises in a ball: `max L(w + e) - L(w)` over `||T^-1 e|| <= rho`, approached from below.

    Projected, normalised gradient ascent with steps as long as the radius, in the coordinates `d = T^-1 e`:
    `d_0 = 0`, `d_k+1 = P(d_k + rho u_k)` with `u_k = T g_k / ||T g_k||`, `g_k = grad L(w + T d_k)`, where `P` shortens
    what is longer than `rho`. The result is the largest `L(w + T d_k) - L(w)` over `k = 1, ..., steps`.

    - `steps=1` is the point that SAM looks at, `e = rho g / ||g||`, and with `adaptive` that of ASAM. It is less than
      zero where that step overshoots.
    - More steps never give less. They can give far more: the gradient at a solution that fits its data is almost zero
      and need not point to where the loss rises. Where values are compared, all must have the same number of steps.

    Sharpness predicts generalisation only weakly (Andriushchenko et al., 2023). Without `adaptive` it changes when a
    ReLU network is rescaled without changing its function; with it, and `eta = 0`, it does not. A loss that draws
    random numbers (dropout) or updates statistics on the way measures those, too: `nn.predict` does not.

    Args:
        loss_fn: `loss_fn(params, *batch)` returns the loss, a real tensor of shape ().
        params: A pytree of tensors.
        *batch: Passed on to `loss_fn`.
        rho: Radius, in the units of the params, or relative to them with `adaptive`. A non-negative number or a tensor
            of shape (), which `vmap` may batch.
        steps: Number of ascents, at least 1. `steps` gradients and one loss.
        adaptive: Whether `T = |w| + eta` (adaptive sharpness); otherwise `T = 1`.
        eta: Keeps `T` away from zero, in the units of the params.
        mask: Where `T = |w| + eta`: a prefix tree of booleans, or a function of path and leaf. Elsewhere `T = 1`.

    Returns:
        The rise, a tensor of shape () in float32 at least, where what is under 1e-7 of the loss is
        rounding. A zero gradient gives zero, NaN stays NaN.

    Raises:
        TypeError: If `loss_fn` does not return a real tensor of shape (), or a number is something else.
        ValueError: If a number is out of range, or `eta` or `mask` comes without `adaptive`.

    `L = w^2` rises from 1 at `w = 1` to 2.25 at 1.5:

    >>> worst_case_sharpness(lambda w: w**2, torch.tensor(1.0), rho=0.5)
    tensor(1.2500)

    References:
        Foret et al., 2021 (SAM), equation 2 for one step, appendix C.6 for several. arXiv 2010.01412.
        Kwon et al., 2021 (ASAM), section 3 for the adaptive form. arXiv 2102.11600.
        Andriushchenko et al., 2023. arXiv 2302.07011.
    """
    where = "worst_case_sharpness"
    near = neighbourhood(where, rho, adaptive, eta, mask)
    checks.count(where, steps=steps)
    return _rise(*checked(where, loss_fn, params), batch, rho, steps, near)


def _rise(
    loss: Loss, params: P, batch: tuple[object, ...], rho: float | Tensor, steps: int, near: Neighbourhood
) -> Tensor:
    grads_fn = grad_and_value(loss)
    grads, start = grads_fn(params, *batch)
    offset, point, rises = tree.zeros_like(params), params, []
    for step in range(steps):
        if step:
            grads, there = grads_fn(point, *batch)
            rises.append(there - start)
        scaled = near.stretch(grads, params)
        length = rho * tree.reciprocal(tree.norm(scaled))
        offset = _within(rho, tree.add(offset, tree.scale(length, scaled)))
        point = tree.add(params, near.stretch(offset, params))
    rises.append(loss(point, *batch) - start)
    return torch.stack(rises).amax()


def _within(rho: float | Tensor, x: P) -> P:
    """Shortens what is longer than `rho`."""
    norm = tree.norm(x)
    return tree.scale(torch.where(norm > rho, rho * tree.reciprocal(norm), 1.0), x)


def m_sharpness(
    loss_fn: Loss,
    params: Params,
    *batch: object,
    m: int,
    rho: float | Tensor = 0.05,
    steps: int = 1,
    adaptive: bool = False,
    eta: float | Tensor = 0.0,
    mask: Mask = None,
    in_dims: InDims = 0,
    chunk_size: int | None = None,
) -> Tensor:
    """Returns the mean of `worst_case_sharpness` over disjoint slices of `m` examples, each with an ascent of its own.

    Of true maxima it is at least that of the whole batch, and does not fall where slices are cut further: values are
    comparable at one `m` only.

    Args:
        loss_fn: `loss_fn(params, *batch)` returns the loss, a mean over the examples, of shape ().
        params: A pytree of tensors.
        *batch: Passed on to `loss_fn` in slices.
        m: Examples per slice. Where it does not divide the batch, slices are as even as they can be, of `m` at most,
            and weigh as much as they have examples.
        rho: As in `worst_case_sharpness`.
        steps: As in `worst_case_sharpness`.
        adaptive: As in `worst_case_sharpness`.
        eta: As in `worst_case_sharpness`.
        mask: As in `worst_case_sharpness`.
        in_dims: The axis of the examples for each argument of the batch, as in `microbatch`.
        chunk_size: How many slices are computed at once by `vmap`; `None` takes all, 1 takes them in a plain loop.

    Returns:
        The mean rise, a tensor of shape ().

    Raises:
        TypeError: As `worst_case_sharpness`, or if what is to be sliced is not a tensor.
        ValueError: As `worst_case_sharpness`, or if `m` exceeds the number of examples, or `in_dims` does not fit the
            batch.

    Examples of opposite slopes 1 and -1 make a flat batch, and two steep slices:

    >>> w, x = torch.tensor(0.0), torch.tensor([1.0, -1.0])
    >>> [float(m_sharpness(lambda w, x: (w * x).mean(), w, x, m=m, rho=0.5)) for m in (2, 1)]
    [0.0, 0.5]

    References:
        Foret et al., 2021, section 4.1. arXiv 2010.01412.
    """
    where = "m_sharpness"
    near = neighbourhood(where, rho, adaptive, eta, mask)
    checks.count(where, m=m, steps=steps)
    checks.chunk_size(where, chunk_size)
    loss, params = checked(where, loss_fn, params)
    examples = taken_apart(where, batch, in_dims).size
    if m > examples:
        raise ValueError(f"{where}: `m` must be at most the number of examples, got {m} for {examples}.")

    def measure(nothing: Params, *part: object) -> tuple[Params, Tensor]:
        """A grads_fn without params, whose aux is what `microbatch` averages."""
        return nothing, _rise(loss, params, part, rho, steps, near)

    slices = microbatch(identity(), math.ceil(examples / m), in_dims, chunk_size)
    mean: Tensor = slices.update((), measure, slices.init(()), *batch)[2]
    return mean
