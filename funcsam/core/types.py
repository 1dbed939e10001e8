"""The types of the library.

Python has no type for a pytree: a `dict[str, Tensor]`, a list and a class of the user's own are all trees. So a tree
has a name here that says what it holds, and type checkers accept everything for it. A function that keeps the structure
of a tree says so by `P`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Concatenate, Protocol, TypeAlias, TypeVar

from torch import Tensor

P = TypeVar("P")
"""The type of the params: what keeps their structure returns the type that it was given."""
V = TypeVar("V", covariant=True)
Tree: TypeAlias = Any
"""Anything that optree takes apart: nested dicts, lists, tuples and NamedTuples, registered classes, or one leaf."""
Params: TypeAlias = Tree
"""A tree of floating-point or complex tensors. Gradients and updates have its structure and its shapes."""
State: TypeAlias = Tree
"""A tree of tensors whose structure depends on the params alone; a transform without memory has `()`."""
Aux: TypeAlias = Tree
"""What a loss returns beside the gradient: its value, buffers, metrics. `()` for a bare gradient function."""


class Node(Protocol[V]):
    """A list, a tuple or a dict whose entries have the type `V`. A string is none: it holds nothing but strings."""

    def __len__(self) -> int:
        """Returns the number of entries."""

    def __contains__(self, entry: object, /) -> bool:
        """Tells whether an object is among the entries or keys."""

    def __getitem__(self, key: Any, /) -> V:
        """Returns one entry."""


Number: TypeAlias = float | Tensor
"""A number, or a tensor of shape ()."""
Schedule: TypeAlias = Callable[[Tensor], Number]
"""A function from the step, int64 of shape (), to a number or a tensor of shape ()."""
ScalarOrSchedule: TypeAlias = Number | Schedule
"""A number, a tensor of shape (), or a function from the step to either."""
Hyper: TypeAlias = ScalarOrSchedule | Node["Hyper"]
"""A hyperparameter: a number, a tensor of shape (), a schedule, or a prefix tree of these, one for each subtree."""
Mask: TypeAlias = bool | Callable[..., bool] | Node["Mask"] | None
"""Where something applies: a prefix tree of booleans, or a function of path and leaf. `None` is everywhere."""
InDims: TypeAlias = int | Node["InDims"] | None
"""An axis for every argument of the batch, as in `torch.vmap`: a whole number, or a tuple with a whole number, `None`
(not sliced) or a prefix tree of these for each argument."""
Loss: TypeAlias = Callable[..., Tensor | tuple[Tensor, Aux]]
"""`loss(params, *batch)` returns a real tensor of shape (), or `(loss, aux)`."""
GradsFn: TypeAlias = Callable[Concatenate[P, ...], tuple[P, Aux]] | Callable[Concatenate[P, ...], P]
"""A gradient function, `grads_fn(params, *batch)`: it returns `(grads, aux)`, as `torch.func.grad_and_value` does, or
`grads` alone, as `torch.func.grad` does."""


class PairedGradsFn(Protocol):
    """What a transform is given as its `grads_fn`: it always returns the pair, and the gradients fit the params."""

    def __call__(self, params: P, /, *batch: object) -> tuple[P, Aux]:
        """Returns `(grads, aux)`."""


class CheckedGradsFn(ABC):
    """A gradient function that checks its own answers, so that a transform need not."""

    @abstractmethod
    def __call__(self, params: P, /, *batch: object) -> tuple[P, Aux]:
        """Returns `(grads, aux)`: dense gradients in the structure and the shapes of the params."""

    @abstractmethod
    def scaled(self, factor: Tensor) -> "CheckedGradsFn | None":
        """Returns the same for the loss times a factor, or `None` where the loss cannot be multiplied.

        Gradients are those of `factor` times the loss; `aux` is unchanged.
        """


class ScalableGradsFn(Protocol):
    """A gradient function whose loss can be multiplied before its backward pass, as `dynamic_loss_scale` needs."""

    def scaled(self, factor: Tensor) -> GradsFn[Params]:
        """Returns the function whose gradients are those of `factor` times the loss, and whose `aux` is unchanged."""


class ScopedLoss(Protocol):
    """A loss that must stay in force until its backward pass is over, as that of a module with checkpointing."""

    def in_force(self, again: bool = True, differentiated: bool = False) -> AbstractContextManager[Loss]:
        """Gives the loss for one forward and backward pass inside the context."""


Init: TypeAlias = Callable[[Params], State]
"""`init(params)` returns the state before the first step."""
Update: TypeAlias = Callable[Concatenate[Params, PairedGradsFn, State, ...], tuple[Params, State, Aux]]
"""`update(params, grads_fn, state, *batch)` returns updates in the structure of the params, the next state, and the
`aux` of the params."""
PlainUpdate: TypeAlias = Callable[[Params, State, Params], tuple[Params, State]]
"""`update(grads, state, params)` returns updates in the structure of the gradients, and the next state: the way optax
users write a transform."""
