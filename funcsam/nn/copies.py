"""Copies of buffers, for a module to write to: they take no memory until it does, where that is safe."""

from typing import Any

import torch
from torch import Tensor, nn

from funcsam.core import levels, tree
from funcsam.nn.layout import Layout, Named

_C: Any = torch._C  # functions for which torch has no types


def copy_all(layout: Layout, params: Named, buffers: Named, batch: tuple[object, ...]) -> Named:
    """Returns copies of the buffers and frozen parameters, which the module may write to."""
    if levels.eager():
        lazy = {name: _lazy(buffer, buffer) for name, buffer in buffers.items()}
        return {name: buffers[name].clone() if copy is None else copy for name, copy in lazy.items()}
    if not layout.buffers or not levels.vectorizing():
        return {name: lazy_copy(buffer) for name, buffer in buffers.items()}
    always = _always(params, buffers, batch)
    return {
        name: _with_lazy_mark(torch.where(always, buffer, buffer)) if name in layout.buffers else lazy_copy(buffer)
        for name, buffer in buffers.items()
    }


def lazy_copy(x: Tensor) -> Tensor:
    """Returns a copy that takes no memory until it is written to, where that is safe."""
    if torch.compiler.is_compiling():
        return x.clone()
    if not levels.eager() and _batched(x):  # the rule of `vmap` for lazy copies is a loop
        return _with_lazy_mark(x.clone())
    lazy = _lazy(x, levels.unwrapped(x))
    return x.clone() if lazy is None else lazy


def _with_lazy_mark(x: Tensor) -> Tensor:
    """Returns a tensor whose first write will show, as it does for what `lazy_copy` returns."""
    if not torch.compiler.is_compiling():
        own = levels.unwrapped(x)
        _lazy(own, own)
    return x


def _lazy(x: Tensor, own: Tensor) -> Tensor | None:
    """Returns a copy that takes memory with the first write, or `None` where that is not safe.

    Args:
        x: A tensor that `vmap` does not batch.
        own: The tensor inside all `torch.func` levels.
    """
    # Only on CPUs: kernels elsewhere (`_foreach` ones on CUDA) write through pointers that they got for reading. Only
    # all of the memory: the first write copies it all.
    try:
        if own.is_cpu and type(own) in (Tensor, nn.Parameter) and own.untyped_storage().nbytes() == own.nbytes:
            return torch._lazy_clone(x)
    except RuntimeError:  # the memory belongs to NumPy or another process, or it is not one piece (sparse)
        pass
    return None


def _batched(x: Tensor) -> bool:
    """Tells whether `vmap` batches a tensor, at any `torch.func` level."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def is_lazy(x: Tensor) -> bool:
    """Tells whether a copy has not been written to, also through `.data`; if not, that is not known."""
    return x.is_cpu and _C._is_cow_tensor(x)


def mark(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...]] | None:
    """Returns what may change without a write: where the memory is and how it is laid out."""
    own = levels.unwrapped(x)
    return (_C._data_address(own), own.shape, own.stride()) if is_lazy(own) else None


def _always(params: Named, buffers: Named, batch: tuple[object, ...]) -> Tensor:
    """Returns True, batched as the inputs are: under `vmap` what a module writes to must be batched as they are."""
    inputs = [leaf for leaf in tree.flatten((params, batch))[0] if isinstance(leaf, Tensor)]
    nothing = [leaf.reshape(-1)[:0].ne(0).any() for leaf in inputs]
    device = (nothing or list(buffers.values()))[0].device
    found = torch.zeros((), dtype=torch.bool, device=device)
    for each in nothing:
        found = found | each.to(found.device)
    return ~found
