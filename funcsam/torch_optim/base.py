"""What the front ends share: groups of params and gradients as trees, buffers that come back, writing in place."""

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from funcsam.core import kernels
from funcsam.core.types import Tree

Groups = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Tree]]
Closure = Callable[[], Tree]
KEY = "funcsam"
"""Where a `state_dict` holds what torch does not know of."""


class TreeOptimizer(torch.optim.Optimizer):
    """What the front ends share: groups of params as a tree, gradients as a tree, and buffers that come back."""

    def __init__(self, params: Groups, defaults: dict[str, Tree], model: nn.Module | Iterable[Tensor] | None) -> None:
        super().__init__(params, defaults)
        self._model = model if isinstance(model, nn.Module) or model is None else list(model)

    def _buffers(self) -> list[Tensor]:
        if self._model is None:
            return []
        return list(self._model.buffers() if isinstance(self._model, nn.Module) else self._model)

    def _values(self) -> list[list[Tensor]]:
        return [[p.detach() for p in group["params"]] for group in self.param_groups]

    def _grads(self) -> list[list[Tensor]]:
        """Returns dense gradients; zero where there is none."""
        return [
            [torch.zeros_like(p) if p.grad is None else kernels.dense(p.grad.detach()) for p in group["params"]]
            for group in self.param_groups
        ]

    _pickled: ClassVar[tuple[str, ...]] = ()

    def __getstate__(self) -> dict[str, Tree]:
        """Adds to what torch pickles; what schedulers and hooks put on an optimizer is theirs to restore."""
        own = {name: self.__dict__[name] for name in self._pickled if name in self.__dict__}
        return {**super().__getstate__(), **own}

    def _has_grads(self) -> bool:
        return any(p.grad is not None for group in self.param_groups for p in group["params"])


def copy(into: Iterable[Iterable[Tensor]], values: Iterable[Iterable[Tensor]]) -> None:
    """Writes values into tensors that stay where they are."""
    for targets, sources in zip(into, values, strict=True):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def add(into: Iterable[Iterable[Tensor]], values: Iterable[Iterable[Tensor]]) -> None:
    """Adds values to tensors that stay where they are."""
    for targets, sources in zip(into, values, strict=True):
        for target, source in zip(targets, sources, strict=True):
            target.add_(source)


def clones(values: Iterable[Tensor]) -> list[Tensor]:
    """Returns copies that no graph knows of."""
    return [value.detach().clone() for value in values]
