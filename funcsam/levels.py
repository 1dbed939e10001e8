"""Which `torch.func` levels (`grad`, `vmap`, ...) and modes the code runs under, and whether it is being compiled."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize


def eager() -> bool:
    """Tells whether plain eager code runs: no `torch.func` level is active and nothing is being compiled."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def plain(x: Tensor) -> Tensor:
    """Takes a tensor out of the `torch.func` levels around it; of the members of a batch, all alike, the first."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        batched, axis = torch._C._functorch.is_batchedtensor(x), torch._C._functorch.maybe_get_bdim(x)
        x = torch._C._functorch.get_unwrapped(x)
        x = x.select(axis, 0) if batched else x  # which wraps it again where a level is differentiating
    return x


def differentiating() -> bool:
    """Tells whether `torch.func` takes a derivative; the compiler, which hides the levels, needs not know."""
    # There a tensor that `torch.func.grad` tracks does not say that it requires grad.
    if torch.compiler.is_compiling():
        return False
    return any(_differentiates(level) for level in _levels())


def _levels() -> Sequence[Any]:
    """Returns the `torch.func` levels, the outermost first."""
    return torch._C._functorch.get_interpreter_stack() or ()


def _differentiates(level: Any) -> bool:
    kinds = torch._C._functorch.TransformType
    return level.key() in (kinds.Grad, kinds.Jvp)


def vectorizing() -> bool:
    """Tells whether a `vmap` level may be active; under the compiler that cannot be seen."""
    if eager():
        return False
    return torch.compiler.is_compiling() or any(not _differentiates(level) for level in _levels())


def differentiates_vmap() -> bool:
    """Tells whether a `vmap` level lies inside a differentiating one (hyper-gradients of an ensemble)."""
    if eager() or torch.compiler.is_compiling():
        return False
    kinds = [_differentiates(level) for level in _levels()]
    return True in kinds and False in kinds[kinds.index(True) :]


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Computes parametrised weights anew: `parametrize.cached()` may hold those of other params."""
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before
