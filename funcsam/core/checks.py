"""Early, readable errors: every message has the form *where*: `what` must *condition*, got *value* [at *path*].

Numbers are checked when they are Python numbers. A tensor may be batched or traced, so only its shape is looked at;
a schedule is only known once it is called.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real

import optree
import torch
from torch import Tensor

from funcsam.core.types import Tree

_NUMBER = "a number, a tensor of shape () or a schedule"


def _at(path: str) -> str:
    return f" at {path}" if path else ""


def paths(tree: Tree) -> list[str]:
    """Lists the path of every leaf as Python code, e.g. `['layers'][0]`."""
    return [accessor.codify("") for accessor in optree.tree_accessors(tree)]


def _number(where: str, name: str, value: object, path: str, condition: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex() or value.dtype is torch.bool:
            got = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"{where}: `{name}` must be a real tensor of shape (), got {got}{_at(path)}.")
    elif isinstance(value, bool) or not (isinstance(value, Real) or callable(value)):
        kind = f"{type(value).__name__}{_at(path)}"
        raise TypeError(f"{where}: `{name}` must be {_NUMBER}, got {kind}.")
    elif isinstance(value, Real) and not (_finite(value) and holds(float(value))):
        raise ValueError(f"{where}: `{name}` must be {condition}, got {value}{_at(path)}.")


def _finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _numbers(where: str, condition: str, holds: Callable[[float], bool], named: dict[str, Tree]) -> None:
    for name, tree in named.items():
        if tree is None:
            raise TypeError(f"{where}: `{name}` must be {_NUMBER}, got None.")
        for path, value in zip(paths(tree), optree.tree_leaves(tree), strict=True):
            _number(where, name, value, path, condition, holds)


def finite(where: str, **named: Tree) -> None:
    """Raises unless every number is finite."""
    _numbers(where, "finite", lambda _: True, named)


def nonnegative(where: str, **named: Tree) -> None:
    """Raises unless every number is finite and at least zero."""
    _numbers(where, "finite and non-negative", lambda x: x >= 0, named)


def positive(where: str, **named: Tree) -> None:
    """Raises unless every number is finite and greater than zero."""
    _numbers(where, "finite and positive", lambda x: x > 0, named)


def fraction(where: str, **named: Tree) -> None:
    """Raises unless every number is at least 0 and less than 1."""
    _numbers(where, "in [0, 1)", lambda x: 0 <= x < 1, named)


def share(where: str, **named: Tree) -> None:
    """Raises unless every number is at least 0 and at most 1."""
    _numbers(where, "in [0, 1]", lambda x: 0 <= x <= 1, named)


def integer(where: str, **named: object) -> None:
    """Raises unless every value is a whole number; a bool is refused."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{where}: `{name}` must be a whole number, got {type(value).__name__}.")


def count(where: str, **named: int) -> None:
    """Raises unless every value is a positive whole number."""
    integer(where, **named)
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"{where}: `{name}` must be at least 1, got {value}.")


def chunk_size(where: str, given: int | None) -> None:
    """Raises unless `chunk_size` is a positive whole number, or `None`, which takes all at once."""
    if given is not None:
        count(where, chunk_size=given)


def choice(where: str, options: Sequence[str], **named: object) -> None:
    """Raises unless every value is one of the options, of which there are at least two."""
    for name, value in named.items():
        if not (isinstance(value, str) and value in options):
            *others, last = (f'"{option}"' for option in options)
            raise ValueError(f"{where}: `{name}` must be {', '.join(others)} or {last}, got {value!r}.")


def function(where: str, **named: object) -> None:
    """Raises unless every value can be called."""
    for name, value in named.items():
        if not callable(value):
            raise TypeError(f"{where}: `{name}` must be a function, got {type(value).__name__}.")


def tensors(where: str, what: str, tree: Tree) -> None:
    """Raises unless every leaf is a tensor; `None` is a leaf here, as torch's own trees have it."""
    leaves = optree.tree_leaves(tree, none_is_leaf=True)
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return
    for accessor, leaf in zip(optree.tree_accessors(tree, none_is_leaf=True), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            path = accessor.codify("")
            raise TypeError(f"{where}: `{what}` must hold tensors only, got {type(leaf).__name__}{_at(path)}.")


def params(where: str, tree: Tree) -> None:
    """Raises unless every leaf is a floating-point or complex tensor."""
    tensors(where, "params", tree)
    for path, leaf in zip(paths(tree), optree.tree_leaves(tree), strict=True):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"{where}: `params` must hold floating-point or complex tensors, got {leaf.dtype}{_at(path)}. "
                "Pass what is not trained through the batch."
            )


def structure(where: str, what: str, tree: Tree, like: Tree, like_what: str = "params") -> None:
    """Raises unless `tree` has the structure of `like`; names the first leaf that differs."""
    if optree.tree_structure(tree) == optree.tree_structure(like):
        return
    got, wanted = paths(tree), paths(like)
    must = f"{where}: `{what}` must have the structure of `{like_what}`"
    for path in wanted:
        if path not in got:
            raise ValueError(f"{must}, got no leaf{_at(path)}.")
    for path in got:
        if path not in wanted:
            raise ValueError(f"{must}, got a leaf too many{_at(path)}.")
    raise ValueError(f"{must}, got {optree.tree_structure(tree)} for {optree.tree_structure(like)}.")


def same(where: str, what: str, tree: Tree, like: Tree, like_what: str = "params") -> None:
    """Raises unless `tree` has the structure of `like` and its leaves have the shapes of its leaves."""
    ours, spec = optree.tree_flatten(tree)
    theirs, wanted = optree.tree_flatten(like)
    if spec == wanted and all(isinstance(x, Tensor) and x.shape == y.shape for x, y in zip(ours, theirs, strict=True)):
        return
    structure(where, what, tree, like, like_what)
    for path, x, y in zip(paths(like), ours, theirs, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{where}: `{what}` must hold tensors only, got {type(x).__name__}{_at(path)}.")
        if x.shape != y.shape:
            got = f"{tuple(x.shape)} for {tuple(y.shape)}"
            raise ValueError(f"{where}: `{what}` must have the shapes of `{like_what}`, got {got}{_at(path)}.")


def dtypes(where: str, what: str, tree: Tree, like: Tree, like_what: str = "params") -> None:
    """Raises unless the leaves of `tree`, whose structure is that of `like`, have the dtypes of its leaves."""
    for path, x, y in zip(paths(like), optree.tree_leaves(tree), optree.tree_leaves(like), strict=True):
        if x.dtype is not y.dtype:
            got = f"{x.dtype} for {y.dtype}"
            raise ValueError(f"{where}: `{what}` must have the dtypes of `{like_what}`, got {got}{_at(path)}.")
