"""Which kernels do the work: one fused `torch._foreach` kernel for all leaves, or one operation for each.

The fused kernels have no `vmap` rule, and the compiler fuses by itself: they are for plain eager code.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcsam.core import levels, shards
from funcsam.core.types import Number

HALF = (torch.float16, torch.bfloat16)


def fusable(leaves: Sequence[Tensor]) -> bool:
    """Tells whether one fused kernel may take the leaves."""
    return bool(leaves) and levels.eager()


def uniform(factor: Number, leaves: Sequence[Tensor]) -> bool:
    """Tells whether one foreach kernel may multiply the leaves by the factor."""
    dtype, device = leaves[0].dtype, leaves[0].device
    fits = not isinstance(factor, Tensor) or (
        factor.dtype is dtype
        and factor.device == device
        and not factor.requires_grad  # the kernel has no derivative by a factor
    )
    return fits and all(x.dtype is dtype and x.device == device for x in leaves) and dtype not in HALF


def each(
    fused: Callable[..., Sequence[Tensor]] | None, single: Callable[..., Tensor], *lists: Sequence[Tensor]
) -> list[Tensor]:
    """Applies a fused kernel to lists of leaves, or, where it must not be used, an operation to one leaf of each.

    The results have the dtypes of the first list.
    """
    if fused is not None and fusable(lists[0]):
        out = shards.fused(fused, *lists)
    else:
        out = [single(*leaves) for leaves in zip(*lists, strict=True)]
    return cast(out, lists[0])


def dense(x: Tensor) -> Tensor:
    """Returns a sparse tensor as a dense one."""
    return x if x.layout is torch.strided else x.to_dense()


def cast(leaves: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Brings leaves to the dtypes of others."""
    return [x if x.dtype is y.dtype else x.to(y.dtype) for x, y in zip(leaves, like, strict=True)]


def on(factor: Number, x: Tensor) -> Number:
    """Brings a factor to the device of a leaf."""
    return factor.to(x.device) if isinstance(factor, Tensor) and factor.device != x.device else factor
