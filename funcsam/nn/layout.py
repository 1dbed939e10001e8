"""Which tensors a module has, and where it keeps them."""

import operator
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcsam.core.types import Tree

Named = dict[str, Tensor]


def initialised(where: str, model: nn.Module) -> None:
    """Raises unless `model` is a module whose tensors exist."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: `model` must be a torch.nn.Module, got {type(model).__name__}.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"{where}: `model` must be initialised, got an uninitialised tensor at {name}. "
                "Run one batch through the model first."
            )


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and the tensors of a module, each tensor once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


class Place(NamedTuple):
    """Where a module keeps a tensor: a name within `_ModelAndLoss`, and a key of a dict of one of its modules."""

    path: str
    store: dict[str, Tree]
    key: str


class Layout:
    """Which tensors a module has and where it keeps them.

    Attributes:
        places: The places of each name: several if the tensor is tied.
        buffers: The names of the buffers.
        ndims: The number of axes of each tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        names = {id(tensor): name for name, tensor in tensors(model)}
        self.places: dict[str, list[Place]] = {name: [] for name in names.values()}
        self.buffers = {name for name, _ in model.named_buffers()}
        self.ndims = {name: tensor.ndim for name, tensor in tensors(model)}
        for prefix, module in model.named_modules(prefix="model"):
            for store in (module._parameters, module._buffers):
                for key, tensor in store.items():
                    if tensor is not None:
                        self.places[names[id(tensor)]].append(Place(f"{prefix}.{key}", store, key))


class Contents:
    """What the modules of a model hold: tells, for a small part of a forward pass, whether any of it was changed."""

    def __init__(self, model: nn.Module) -> None:
        # A scripted module keeps nothing in dicts, and stays as it is.
        modules = [each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)]
        stores: list[dict[str, Tree]] = [
            store for each in modules for store in (each._modules, each._parameters, each._buffers)
        ]
        self.full, self.empty = [store for store in stores if store], [store for store in stores if not store]
        self.sizes, self.keys, self.values = self._read()

    def _read(self) -> tuple[list[int], list[str], list[object]]:
        values = chain.from_iterable(map(dict.values, self.full))
        return list(map(len, self.full)), list(chain.from_iterable(self.full)), list(values)

    def changed(self) -> bool:
        """Tells whether any module, parameter or buffer was added, removed or replaced."""
        sizes, keys, values = self._read()
        same = sizes == self.sizes and keys == self.keys and all(map(operator.is_, values, self.values))
        return not same or any(self.empty)


def check(layout: Layout, params: Named, buffers: Named) -> None:
    """Raises unless the trees fit the module."""
    trees = (("params", params), ("buffers", buffers))
    for what, given in trees:
        if not isinstance(given, dict):
            raise TypeError(
                f"loss_fn: `{what}` must be a dict of tensors by name, got {type(given).__name__}. "
                "The arguments are (params, buffers, *batch); `split` makes the first two."
            )
        if any(name not in layout.ndims for name in given):
            name = next(name for name in given if name not in layout.ndims)
            raise ValueError(
                f"loss_fn: `{what}` must hold names of the module, got {name}. "
                "If the module has changed, `split` it again."
            )
    if not layout.buffers <= buffers.keys():
        name = next(name for name in sorted(layout.buffers) if name not in buffers)
        raise ValueError(
            f"loss_fn: `buffers` must hold every buffer of the module, got none for {name}. "
            "If the module has changed, `split` it again."
        )
    if both := params.keys() & buffers.keys():
        raise ValueError(f"loss_fn: `params` and `buffers` must not share a name, got {min(both)} in both.")
    for what, given in trees:
        for name, tensor in given.items():
            if tensor.ndim > layout.ndims[name]:
                _members(layout, what, name, tensor)


def _members(layout: Layout, what: str, name: str, tensor: Tensor) -> None:
    """Raises if a tensor has one more axis than that of the module: those of all members of an ensemble."""
    place = layout.places[name][0]
    own = place.store[place.key]
    if tensor.shape[1:] == own.shape:
        raise ValueError(
            f"loss_fn: `{what}` must have the shapes of the module, "
            f"got {tuple(tensor.shape)} for {tuple(own.shape)} at {name}. If these are those of all members of an "
            "ensemble, which shared buffers that are written to become, give them `in_dims` 0; "
            "if the module has changed, `split` it again."
        )
