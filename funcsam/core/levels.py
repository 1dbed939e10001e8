"""Which `torch.func` levels (`grad`, `vmap`, ...) and modes the code runs under, and whether it is being compiled.

**What is differentiated.** As everywhere in torch, what requires grad is differentiated where grad mode is on: params,
hyperparameters, batches, states, and what a loss captures. There is one exception, since a training loop goes on from
its own result: in plain eager code a step (`step`, `update`, `apply_updates`) and a landscape take as values, detached,

- params that are leaves of the autograd graph, such as `dict(model.named_parameters())`, and
- `nn.Parameter`s that the loss captures.

In the loss of a `grad_and_value`, and under `torch.func` and forward-mode AD, there is no exception. A leaf that is
used before or after the steps, too, gets the derivative of these uses alone: give the steps a copy that is no leaf
(`leaf.clone()`), or differentiate by `torch.func.grad` or `grad_and_value`.

Compiled code knows no leaves: there a step takes params that are `nn.Parameter`s as values, and no others.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

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
    """Returns float64 for devices that have it for certain, and float32 for others, such as Apple's."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


_frame: ContextVar[str] = ContextVar("funcsam.frame", default="function")


class _In(AbstractContextManager[None]):
    """Says what runs inside: a step, or a loss that plain autograd differentiates."""

    __slots__ = ("frame", "token")

    def __init__(self, frame: str) -> None:
        self.frame = frame

    def __enter__(self) -> None:
        self.token: Token[str] = _frame.set(self.frame)

    def __exit__(self, *_: object) -> None:
        _frame.reset(self.token)


def in_step() -> AbstractContextManager[None]:
    """Inside, leaves are values."""
    return _In("step") if eager() and _frame.get() != "loss" else nullcontext()


def in_loss() -> AbstractContextManager[None]:
    """Inside, everything is differentiated."""
    return nullcontext() if torch.compiler.is_compiling() else _In("loss")


def stepping() -> bool:
    """Tells whether `nn.Parameter`s that a loss captures are values here."""
    return not torch.compiler.is_compiling() and _frame.get() == "step" and not differentiating()


def raw(x: Tensor) -> Tensor:
    """Takes a tensor out of the `torch.func` levels around it, batched as it may be."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def refuse_functional(where: str) -> None:
    """Raises inside `torch.autograd.functional`, whose inputs are leaves like all others, and would be values."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.autograd.functional":
            raise RuntimeError(
                f"{where}: params that are leaves must not be differentiated by torch.autograd.functional, got "
                f"{frame.f_code.co_name}. Use torch.func.jacrev and its like."
            )
        frame = frame.f_back  # type: ignore[assignment]


def plain(x: Tensor) -> Tensor:
    """Takes a tensor out of the `torch.func` levels around it; of the members of a batch, all alike, the first."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        batched, axis = torch._C._functorch.is_batchedtensor(x), torch._C._functorch.maybe_get_bdim(x)
        x = torch._C._functorch.get_unwrapped(x)
        x = x.select(axis, 0) if batched else x  # which wraps it again where a level is differentiating
    return x


def differentiating() -> bool:
    """Tells whether everything is differentiated, leaves too; the compiler, which hides the levels, needs not know."""
    # Under `torch.func.grad` a tensor that it tracks does not say that it requires grad.
    if torch.compiler.is_compiling():
        return False
    if _frame.get() == "loss" or forward_ad._current_level >= 0:
        return True
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


def differentiates_vmap(leaves: Iterable[Tensor]) -> bool:
    """Tells whether a `vmap` level lies inside a differentiating one (hyper-gradients of an ensemble).

    The outermost may be plain autograd, to which `leaves` are known then.
    """
    if eager() or torch.compiler.is_compiling():
        return False
    kinds = [_differentiates(level) for level in _levels()]
    if False not in kinds:
        return False
    first = kinds.index(True) if True in kinds else len(kinds)
    return False in kinds[first:] or forward_ad._current_level >= 0 or any(raw(leaf).requires_grad for leaf in leaves)


@contextlib.contextmanager
def _hinting() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        error.add_note(
            "If it is torch that cannot batch what the loss does, `chunk_size=1` takes a plain loop instead."
        )
        raise


def batching() -> AbstractContextManager[None]:
    """Adds to an error that comes out of `torch.vmap` what can be done about it."""
    return nullcontext() if torch.compiler.is_compiling() else _hinting()


def untraced() -> AbstractContextManager[Any]:
    """Inside, random numbers are constants of what `torch.func.linearize` traces: run again, it would draw others."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None:
        return nullcontext()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def fresh() -> AbstractContextManager[None]:
    """Keeps what torch remembers of other evaluations out of this one: parametrised weights, and casts of autocast."""
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
    """Computes parametrised weights anew: `parametrize.cached()` may hold those of other params."""
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before
