"""What measures share: checked losses, neighbourhoods, random probes, and means with their errors."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcsam.core import checks, levels, tree
from funcsam.core.states import saveable
from funcsam.core.types import Hyper, Mask, P, Params

Loss = Callable[..., Tensor]
"""`loss_fn(params, *batch)` returns the loss, a real tensor of shape ()."""
Draw = Callable[[tuple[int, ...], torch.dtype, torch.Generator], Tensor]


@saveable
class Estimate(NamedTuple):
    """A mean over random draws.

    Attributes:
        mean: The mean, of shape ().
        standard_error: Its standard error, of shape (): the deviation of the draws over the root of their number.
    """

    mean: Tensor
    standard_error: Tensor


class Neighbourhood(NamedTuple):
    """The unit of the radius for each param: `T = 1`, or `T = |w| + eta` where it is adaptive."""

    adaptive: bool
    eta: Hyper
    mask: Mask

    def stretch(self, x: P, params: P) -> P:
        """Returns `T x`."""
        return tree.scale_by_magnitude(x, params, self.eta, self.mask) if self.adaptive else x


def neighbourhood(where: str, rho: Hyper, adaptive: bool, eta: Hyper, mask: Mask) -> Neighbourhood:
    """Checks a radius and what it is measured in.

    Raises:
        TypeError: If `rho` or `eta` is not a number or a tensor.
        ValueError: If one is negative or not finite, or `eta` or `mask` is given although nothing is adaptive.
    """
    for name, value in (("rho", rho), ("eta", eta)):
        if isinstance(value, bool) or not isinstance(value, float | int | Tensor):
            kind = type(value).__name__
            raise TypeError(f"{where}: `{name}` must be a number or a tensor of shape (), got {kind}.")
    checks.nonnegative(where, rho=rho, eta=eta)
    if not adaptive and (mask is not None or isinstance(eta, Tensor) or eta):
        what = "eta" if mask is None else "mask"
        raise ValueError(f"{where}: `{what}` must come with `adaptive=True`, got `adaptive={adaptive}`.")
    return Neighbourhood(adaptive, eta, mask)


def checked(where: str, loss_fn: Loss, given: P) -> tuple[Loss, P]:
    """Checks params and losses, and widens both to 32 bits at least; the user's loss gets the dtypes of `given`."""
    checks.function(where, loss_fn=loss_fn)
    checks.params(where, given)
    wide = tree.widened(given)

    def loss(params: Params, *batch: object) -> Tensor:
        with levels.fresh():
            value = loss_fn(tree.cast(params, given), *batch)
        if not isinstance(value, Tensor) or value.ndim or value.is_complex():
            got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            hint = " Take the loss out of it, and of `nn.loss_fn` the first." if isinstance(value, tuple) else ""
            raise TypeError(f"{where}: `loss_fn` must return a real tensor of shape (), got {got}.{hint}")
        return value.to(torch.promote_types(value.dtype, torch.float32))

    return loss, wide


def generator(where: str, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator of a measure's own.

    Raises:
        TypeError: If the seed is not a whole number.
    """
    checks.integer(where, seed=seed)
    return torch.Generator(device).manual_seed(seed)


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draws from `N(0, 1)`."""
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)


def rademacher(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draws -1 or 1."""
    return 2 * torch.randint(0, 2, shape, dtype=dtype, device=generator.device, generator=generator) - 1


def estimate(
    where: str,
    sample: Callable[[P], Tensor],
    draw: Draw,
    params: P,
    draws: int,
    seed: int,
    chunk_size: int | None,
) -> Estimate:
    """Averages a function of random trees like the params, `chunk_size` of them at once."""
    checks.count(where, draws=draws)
    checks.chunk_size(where, chunk_size)
    if draws < 2:
        raise ValueError(f"{where}: `draws` must be at least 2, for a standard error, got {draws}.")
    generators = {leaf.device: generator(where, seed, leaf.device) for leaf in tree.flatten(params)[0]}
    parts = []
    for start in range(0, draws, chunk_size or draws):
        count = min(chunk_size or draws, draws - start)
        parts.append(_each(sample, [_like(params, draw, generators) for _ in range(count)]))
    values = torch.cat(parts)
    return Estimate(values.mean(), values.std() / math.sqrt(draws))


def _like(params: P, draw: Draw, generators: dict[torch.device, torch.Generator]) -> P:
    """Draws a tree like the params, a complex entry as two numbers.

    Under `vmap` every member gets the same: what differs between members is then not chance. The tensors are made
    outside of the `torch.func` levels, because `vmap` refuses to draw unless its caller says how.
    """
    leaves, spec = tree.flatten(tree.real_views(params))
    kinds = [(tuple(leaf.shape), leaf.dtype, generators[leaf.device]) for leaf in leaves]
    with torch._C._DisableFuncTorch(), levels.untraced():
        drawn = [draw(*kind) for kind in kinds]
    return tree.like_views(tree.unflatten(spec, drawn, params), params)


def _each(sample: Callable[[P], Tensor], several: list[P]) -> Tensor:
    leaves, spec = tree.flatten(several[0])
    if len(several) == 1 or not leaves:
        return torch.stack([sample(drawn) for drawn in several])
    stacked = [torch.stack(each) for each in zip(*(tree.flatten(drawn)[0] for drawn in several), strict=True)]
    with levels.batching():
        return torch.vmap(sample, randomness="different")(tree.unflatten(spec, stacked, several[0]))
