"""Masks and prefix trees, broadcast to the leaves of a tree."""

import optree

from funcsam.core import checks
from funcsam.core.types import Mask, Tree


def broadcast(prefix: Tree, x: Tree) -> list[Tree]:
    """Broadcasts a prefix tree to the leaves of `x`."""
    try:
        return optree.broadcast_prefix(prefix, x)
    except ValueError as error:
        raise ValueError(f"tree: a prefix tree must match the structure of `params`, got {prefix!r}: {error}") from None


def spread(what: Tree, x: Tree) -> list[Tree]:
    """Returns the value of a prefix tree, or of a function of path and leaf, at each leaf of `x`.

    Args:
        what: A prefix tree, or a function of path and leaf, where the path is a tuple of keys and indices such as
            `("layers", 0, "bias")`.
        x: The tree whose leaves get the values.
    """
    if not callable(what):
        return broadcast(what, x)
    named, leaves, _ = optree.tree_flatten_with_path(x)
    return [what(path, leaf) for path, leaf in zip(named, leaves, strict=True)]


def masks(mask: Mask, x: Tree) -> list[bool]:
    """Returns the value of a mask at each leaf of `x`; True means that the transform applies.

    Args:
        mask: `None` (every leaf), a prefix tree of booleans, or a function of path and leaf.
        x: The tree whose leaves get the values.
    """
    if mask is None:
        return [True] * len(optree.tree_leaves(x))
    chosen = spread(mask, x)
    for position, on in enumerate(chosen):
        if not isinstance(on, bool):
            path = checks.paths(x)[position]
            raise TypeError(f"tree: a `mask` must hold booleans, got {type(on).__name__} at {path}.")
    return chosen
