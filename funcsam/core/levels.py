"""Which `torch.func` levels (`grad`, `vmap`, ...) and modes of torch are active, and whether code is compiled."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrize


def eager() -> bool:
    """Tells whether plain eager code runs: no `torch.func` or forward-mode level is active, nothing is compiled."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def widest(device: torch.device) -> torch.dtype:
    """Returns float64 for devices that are known to have it, and float32 for others, such as Apple's."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


def unwrapped(x: Tensor) -> Tensor:
    """Unwraps a tensor from all `torch.func` levels; a batch keeps the axis of its members."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def refuse_functional(where: str) -> None:
    """Raises inside `torch.autograd.functional`: its inputs are leaves, so a step would not differentiate by them."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.autograd.functional":
            raise RuntimeError(
                f"{where}: params that are leaves must not be differentiated by torch.autograd.functional, got "
                f"{frame.f_code.co_name}. Use torch.func.jacrev and its like."
            )
        frame = frame.f_back


def first_unwrapped(x: Tensor) -> Tensor:
    """Unwraps a tensor from all `torch.func` levels; of a batch, whose members must be equal, it returns the first."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        batched, axis = torch._C._functorch.is_batchedtensor(x), torch._C._functorch.maybe_get_bdim(x)
        x = torch._C._functorch.get_unwrapped(x)
        x = x.select(axis, 0) if batched else x  # under a differentiating level `select` wraps it again
    return x


class _Level(Protocol):
    """One level of `torch.func`: a `grad`, a `vmap`, ..."""

    def key(self) -> object:
        """Returns its kind, a `TransformType`."""


def differentiating() -> bool:
    """Tells whether a level of `torch.func` or forward-mode AD differentiates here; not for compiled code."""
    # Under `torch.func.grad` a tensor that it tracks does not say that it requires grad.
    return forward_ad._current_level >= 0 or any(_differentiates(level) for level in _levels())


def _levels() -> Sequence[_Level]:
    """Returns the `torch.func` levels, the outermost first."""
    return torch._C._functorch.get_interpreter_stack() or ()


def _differentiates(level: _Level) -> bool:
    kinds = torch._C._functorch.TransformType
    return level.key() in (kinds.Grad, kinds.Jvp)


def vectorizing() -> bool:
    """Tells whether a `vmap` level may be active; under the compiler that cannot be seen."""
    if eager():
        return False
    return torch.compiler.is_compiling() or any(not _differentiates(level) for level in _levels())


def differentiates_vmap(leaves: Iterable[Tensor]) -> bool:
    """Tells whether a `vmap` level lies inside a differentiating one (hyper-gradients of an ensemble).

    The outermost level may be plain autograd: then `leaves` require grad.
    """
    if eager() or torch.compiler.is_compiling():
        return False
    kinds = [_differentiates(level) for level in _levels()]
    if False not in kinds:
        return False
    first = kinds.index(True) if True in kinds else len(kinds)
    return False in kinds[first:] or forward_ad._current_level >= 0 or any(unwrapped(x).requires_grad for x in leaves)


@contextlib.contextmanager
def _with_hint() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        error.add_note("If torch cannot batch an operation of the loss, `chunk_size=1` takes a plain loop instead.")
        raise


def batching() -> AbstractContextManager[None]:
    """Adds a hint to every error that `torch.vmap` raises inside."""
    return nullcontext() if torch.compiler.is_compiling() else _with_hint()


def untraced() -> AbstractContextManager[object]:
    """Makes random numbers constants of what `torch.func.linearize` traces; each run of the trace would draw others."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None:
        return nullcontext()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def fresh() -> AbstractContextManager[None]:
    """Inside, caches of other evaluations are not used: those of parametrised weights and of the casts of autocast."""
    if torch.compiler.is_compiling() or not (parametrize._cache_enabled or torch._C._is_any_autocast_enabled()):
        return nullcontext()
    return _fresh()


@contextlib.contextmanager
def _fresh() -> Iterator[None]:
    torch.clear_autocast_cache()
    with uncached():
        yield
    torch.clear_autocast_cache()


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Inside, parametrised weights are computed anew: the cache of `parametrize.cached()` may hold older ones."""
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before
