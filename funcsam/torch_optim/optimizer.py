"""A whole chain as an optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from funcsam.core.transform import Transform
from funcsam.core.types import Aux, Params, State, Tree
from funcsam.torch_optim.base import KEY, Closure, Groups, TreeOptimizer, add, clones, copy


class Optimizer(TreeOptimizer):
    """Runs a whole chain as an optimizer of `torch.optim`; the closure is called as often as the chain asks.

    Args:
        params: Parameters or parameter groups.
        transform: A transform, or with numbers in `**hyper` a function that makes one, as in `ensemble.vectorize`:
            `Optimizer(params, lambda lr: chain(sam(0.05), sgd(lr)), lr=0.1)`. Trees are lists of groups, and numbers
            that differ between groups come as lists, one per group.
        model: The module whose buffers are to be those of the pass at the params, or the buffers.
        **hyper: Numbers that live in the groups, where torch's learning rate schedulers find them.

    Raises:
        TypeError: If `transform` is not a `Transform`, or with numbers not a function.
    """

    def __init__(
        self,
        params: Groups,
        transform: Transform | Callable[..., Transform],
        *,
        model: nn.Module | Iterable[Tensor] | None = None,
        **hyper: Tree,
    ) -> None:
        if isinstance(transform, Transform) == bool(hyper):
            wanted = "a function of the numbers that are given" if hyper else "a Transform"
            raise TypeError(f"Optimizer: `transform` must be {wanted}, got {type(transform).__name__}.")
        self._transform, self._names = transform, list(hyper)
        super().__init__(params, hyper, model)
        self._state: State = None

    def _current_transform(self) -> Transform:
        if isinstance(self._transform, Transform):
            return self._transform
        numbers = {name: [group[name] for group in self.param_groups] for name in self._names}
        return self._transform(**{name: each[0] if len(each) == 1 else each for name, each in numbers.items()})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tree:
        """Takes a step and returns the loss at the params.

        Where the closure raises, params and the buffers of `model` are as they were before the call.

        Args:
            closure: Computes the loss, calls `backward` and returns the loss.

        Raises:
            TypeError: If there is no closure.
        """
        if closure is None:
            raise TypeError("step: `closure` must be a function that computes the loss and calls `backward`, got None.")
        transform, values = self._current_transform(), self._values()
        params = [clones(group) for group in values]
        state = transform.init(params) if self._state is None else self._state
        first: list[list[Tensor]] = []

        def grads_fn(w: Params) -> tuple[Params, Aux]:
            copy(values, w)
            self.zero_grad()
            with torch.enable_grad():
                loss = closure()
            first.append([] if first else clones(self._buffers()))
            return self._grads(), loss

        buffers = clones(self._buffers())
        try:
            updates, state, loss = transform.update(params, grads_fn, state)
        except BaseException:
            first[:] = [buffers]
            raise
        finally:
            copy(values, params)
            if first:
                copy([self._buffers()], [first[0]])
            self.zero_grad()
        add(values, updates)
        self._state = state
        return loss

    def state_dict(self) -> dict[str, Tree]:
        """Returns the numbers of the groups and the state of the chain."""
        return {**super().state_dict(), KEY: self._state}

    def load_state_dict(self, state_dict: Mapping[str, Tree]) -> None:
        """Loads what `state_dict` returned."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        self._state = state_dict.get(KEY)

    _pickled: ClassVar[tuple[str, ...]] = ("_transform", "_names", "_state", "_model")
