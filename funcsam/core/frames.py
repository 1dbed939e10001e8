"""Whether code runs in a step or in a loss, which decides what is differentiated.

As everywhere in torch, what requires grad is differentiated where grad mode is on: params, hyperparameters, batches,
states, and what a loss captures. There is one exception, because a training loop continues from its own result: in
plain eager code a step (`step`, `update`, `apply_updates`) and a landscape treat as values, that is, they detach

- params that are leaves of the autograd graph, such as `dict(model.named_parameters())`, and
- `nn.Parameter`s that the loss captures.

In the loss of a `grad_and_value`, and under `torch.func` and forward-mode AD, there is no exception. If a leaf is used
before or after the steps, too, its derivative is that of these uses alone. To differentiate through the steps, start
them from a copy that is not a leaf (`leaf.clone()`), or use `torch.func.grad` or `grad_and_value`.

Compiled code does not know which tensors are leaves: there a step detaches params that are `nn.Parameter`s alone.
"""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token

import torch

from funcsam.core import levels

_frame: ContextVar[str] = ContextVar("funcsam.frame", default="function")


class _In(AbstractContextManager[None]):
    """Inside, a step runs, or a loss that plain autograd differentiates."""

    __slots__ = ("frame", "token")

    def __init__(self, frame: str) -> None:
        self.frame = frame

    def __enter__(self) -> None:
        self.token: Token[str] = _frame.set(self.frame)

    def __exit__(self, *_: object) -> None:
        _frame.reset(self.token)


def in_step() -> AbstractContextManager[None]:
    """Inside, in plain eager code, leaves are values."""
    return _In("step") if levels.eager() and _frame.get() != "loss" else nullcontext()


def in_loss() -> AbstractContextManager[None]:
    """Inside, leaves are differentiated too."""
    return nullcontext() if torch.compiler.is_compiling() else _In("loss")


def differentiating() -> bool:
    """Tells whether leaves are differentiated too; not for compiled code, in which no leaf is known."""
    if torch.compiler.is_compiling():
        return False
    return _frame.get() == "loss" or levels.differentiating()


def captures_are_values() -> bool:
    """Tells whether an `nn.Parameter` that a loss captures is a value: in a step that nothing differentiates."""
    return not torch.compiler.is_compiling() and _frame.get() == "step" and not differentiating()
