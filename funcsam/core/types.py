"""The types of the library.

A pytree has no type in Python: a `dict[str, Tensor]`, a list and a class of the user's own are all trees. So a tree is
`Any` under a name that says what it holds, and a function that keeps the structure of a tree says so by `P`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor

P = TypeVar("P")
"""The type of the params: what keeps their structure returns the type that it was given."""
Tree: TypeAlias = Any
"""Anything that optree takes apart: nested dicts, lists, tuples and NamedTuples, registered classes, or one leaf."""
Params: TypeAlias = Any
"""A tree of floating-point or complex tensors. Gradients and updates have its structure and its shapes."""
State: TypeAlias = Any
"""A tree of tensors whose structure depends on the params alone; a transform without memory has `()`."""
Aux: TypeAlias = Any
"""What a loss returns beside the gradient: its value, buffers, metrics. `()` for a bare gradient function."""
Number: TypeAlias = float | Tensor
"""A number, or a tensor of shape ()."""
Schedule: TypeAlias = Callable[[Tensor], Any]
"""A function from the step, int64 of shape (), to a number or a tensor of shape ()."""
ScalarOrSchedule: TypeAlias = Number | Schedule
"""A number, a tensor of shape (), or a function from the step to either."""
Hyper: TypeAlias = ScalarOrSchedule | Mapping[Any, "Hyper"] | Sequence["Hyper"]
"""A hyperparameter: a number, a tensor of shape (), a schedule, or a prefix tree of these, one for each subtree."""
Mask: TypeAlias = bool | Callable[..., bool] | Mapping[Any, "Mask"] | Sequence["Mask"] | None
"""Where something applies: a prefix tree of booleans, or a function of path and leaf. `None` is everywhere."""
InDims: TypeAlias = int | Mapping[Any, "InDims"] | Sequence["InDims"] | None
"""An axis for every argument of the batch, as in `torch.vmap`: a whole number, or a tuple with a whole number, `None`
(not sliced) or a prefix tree of these for each argument."""
Loss: TypeAlias = Callable[..., Any]
"""`loss(params, *batch)` returns a real tensor of shape (), or `(loss, aux)`."""


class GradAndAuxFn(Protocol[P]):
    """A gradient function that returns a pair, as `torch.func.grad_and_value` does."""

    def __call__(self, params: P, /, *batch: Any, **options: Any) -> tuple[P, Aux]:
        """Returns `(grads, aux)`."""


class GradFn(Protocol[P]):
    """A gradient function that returns gradients alone, as `torch.func.grad` does."""

    def __call__(self, params: P, /, *batch: Any, **options: Any) -> P:
        """Returns the gradients."""


GradsFn: TypeAlias = GradAndAuxFn[P] | GradFn[P]
"""A gradient function, `grads_fn(params, *batch)`, that returns `(grads, aux)` or `grads`."""


class PairedGradsFn(Protocol):
    """What a transform is given as its `grads_fn`: it always returns the pair, and the gradients fit the params."""

    def __call__(self, params: P, /, *batch: Any) -> tuple[P, Aux]:
        """Returns `(grads, aux)`."""


class CheckedGradsFn(ABC):
    """A gradient function that checks its own answers, so that a transform need not."""

    @abstractmethod
    def __call__(self, params: P, /, *batch: Any) -> tuple[P, Aux]:
        """Returns `(grads, aux)`: dense gradients in the structure and the shapes of the params."""

    @abstractmethod
    def scaled(self, factor: Tensor) -> "CheckedGradsFn | None":
        """Returns the same for the loss times a factor, or `None` where the loss cannot be multiplied.

        Gradients are those of `factor` times the loss; `aux` is unchanged.
        """


@runtime_checkable
class ScalableGradsFn(Protocol):
    """A gradient function whose loss can be multiplied before its backward pass, as `dynamic_loss_scale` needs."""

    def scaled(self, factor: Tensor) -> GradsFn[Any]:
        """Returns the function whose gradients are those of `factor` times the loss, and whose `aux` is unchanged."""


@runtime_checkable
class ScopedLoss(Protocol):
    """A loss that must stay in force until its backward pass is over, as that of a module with checkpointing."""

    def held(self, again: bool = True, differentiated: bool = False) -> AbstractContextManager[Loss]:
        """Gives the loss for one forward and backward pass inside the context."""


class Init(Protocol):
    """`init(params) -> state`."""

    def __call__(self, params: Any, /) -> State:
        """Returns the state before the first step."""


class Update(Protocol):
    """`update(params, grads_fn, state, *batch) -> (updates, state, aux)`."""

    def __call__(self, params: Any, grads_fn: Any, state: Any, /, *batch: Any) -> tuple[Any, State, Aux]:
        """Returns updates in the structure of the params, the next state, and the `aux` of the params."""


class PlainUpdate(Protocol):
    """`update(grads, state, params) -> (updates, state)`: the way optax users write a transform."""

    def __call__(self, grads: Any, state: Any, params: Any, /) -> tuple[Any, State]:
        """Returns updates in the structure of the gradients, and the next state."""
