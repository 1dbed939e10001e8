"""States of transforms: what they may hold, how they are checked, and how files name their classes."""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

from funcsam.core import tree
from funcsam.core.records import public_module
from funcsam.core.types import State, Tree

StateClass: TypeAlias = type | tuple[()] | None
"""What a transform says of its states: their class, `()` if there are none, or `None` for any tree of tensors. With
`object` nothing is checked."""

C = TypeVar("C", bound=type)
_scalars: dict[type, tuple[str, ...]] = {}
"""The names of the fields that are tensors of shape (), for each class of states."""


def saveable(cls: C) -> C:
    """Registers a class of states for `torch.load(weights_only=True)`; its `Tensor` fields must have shape ()."""
    module, cls.__module__ = cls.__module__, public_module(cls.__module__)
    # Files of version 0.1.0 name modules of its layout, in which every module lay in `funcsam` or `funcsam.measures`.
    place = "funcsam" if cls.__module__ == "funcsam" else module.rpartition(".")[0]
    file = module.rpartition(".")[2].removesuffix("_aware")
    torch.serialization.add_safe_globals([cls, (cls, f"{place}.{file}.{cls.__name__}")])
    _scalars[cls] = tuple(name for name, hint in cls.__annotations__.items() if hint is Tensor)
    return cls


def problem(state: State, cls: StateClass) -> str | None:
    """Returns words for an error, what a state must be and what it is; `None` if it fits."""
    if cls is object:
        return None
    if cls is None:
        wrong = misfit(state, _tensor)
        return None if wrong is None else f"a tree of tensors, got {wrong}"
    if not isinstance(cls, type):
        return None if type(state) is tuple and not state else f"(), got {kind_of(state)}"
    if not isinstance(state, cls):
        return f"{_with_article(cls)}, got {kind_of(state)}"
    for field in _scalars.get(cls, ()):
        value = getattr(state, field)
        if not isinstance(value, Tensor) or value.ndim:
            return f"{_with_article(cls)} whose `{field}` is a tensor of shape (), got {kind_of(value)}"
    return None


def _with_article(cls: type) -> str:
    return f"{'an' if cls.__name__[0] in 'AEIOU' else 'a'} {cls.__name__}"


def _tensor(x: Tree) -> bool:
    return isinstance(x, Tensor)


def kind_of(x: Tree) -> str:
    """Returns words for an error: what was given in the place of a state."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    if type(x) in (tuple, list, dict):
        return f"{type(x).__name__} of {len(x)} {'entry' if len(x) == 1 else 'entries'}"
    return type(x).__name__


def misfit(state: State, fits: Callable[[Tree], bool]) -> str | None:
    """Returns words for an error: the first leaf that does not fit, and its path. `None` is a leaf."""
    for position, leaf in enumerate(optree.tree_leaves(state, tree.empty, none_is_leaf=True)):
        if not (tree.empty(leaf) or fits(leaf)):
            path = optree.tree_accessors(state, tree.empty, none_is_leaf=True)[position].codify("")
            return f"{kind_of(leaf)} at {path}" if path else kind_of(leaf)
    return None
