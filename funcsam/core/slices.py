"""Batches flattened to be sliced along an axis: into slices of examples, or the members of an ensemble."""

from collections.abc import Sequence
from typing import NamedTuple

import optree
from torch import Tensor

from funcsam.core import tree
from funcsam.core.types import InDims, Tree


class Batch(NamedTuple):
    """A flattened batch.

    Attributes:
        leaves: The leaves.
        axes: The axis of the examples in each leaf; `None` where the leaf is not sliced.
        spec: The structure.
        size: Number of examples.
    """

    leaves: list[Tree]
    axes: list[int | None]
    spec: optree.PyTreeSpec
    size: int

    def put(self, leaves: Sequence[Tree]) -> tuple[object, ...]:
        """Returns the arguments of a batch with other leaves."""
        whole: Tree = optree.tree_unflatten(self.spec, leaves)
        return tuple(whole)

    def part(self, start: int, size: int) -> list[Tree]:
        """Returns the leaves of some consecutive examples."""
        pairs = zip(self.leaves, self.axes, strict=True)
        return [leaf if axis is None else leaf.narrow(axis, start, size) for leaf, axis in pairs]


def taken_apart(where: str, batch: tuple[object, ...], in_dims: InDims) -> Batch:
    """Flattens a batch, and checks that it can be sliced.

    Raises:
        TypeError: If what is to be sliced is not a tensor.
        ValueError: If `in_dims` does not fit the batch, or leaves nothing to slice.
    """
    if isinstance(in_dims, tuple) and len(in_dims) != len(batch):
        raise ValueError(
            f"{where}: `in_dims` must have one entry per argument of the batch, got {len(in_dims)} for {len(batch)}."
        )
    arguments: Tree = batch
    dims: Tree = in_dims
    leaves: list[Tree]
    leaves, spec = optree.tree_flatten(arguments, is_leaf=tree.empty, none_is_leaf=True)
    try:
        axes = optree.broadcast_prefix(dims, arguments, is_leaf=tree.empty, none_is_leaf=True)
    except ValueError as error:
        raise ValueError(f"{where}: `in_dims` must fit the batch, got {in_dims}: {error}") from None
    sizes: dict[int, str] = {}
    axes = [None if tree.empty(leaf) else axis for leaf, axis in zip(leaves, axes, strict=True)]
    for position, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)):
        if axis is None:
            continue
        path = optree.tree_paths(arguments, is_leaf=tree.empty, none_is_leaf=True)[position]
        place = f"argument {path[0]}" + "".join(f"[{key!r}]" for key in path[1:])
        if not isinstance(leaf, Tensor):
            hint = "Give it None in `in_dims`."
            raise TypeError(f"{where}: the batch must hold tensors, got {type(leaf).__name__} at {place}. {hint}")
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"{where}: `in_dims` must hold whole numbers or None, got {type(axis).__name__}.")
        if not -leaf.ndim <= axis < leaf.ndim:
            got = f"{axis} for shape {tuple(leaf.shape)} at {place}"
            raise ValueError(f"{where}: `in_dims` must be axes of the batch, got {got}.")
        sizes.setdefault(leaf.shape[axis], place)
    if not sizes:
        raise ValueError(
            f"{where}: the batch must have something to slice, got in_dims {in_dims} for {len(batch)} arguments. "
            "Pass the batch to `step`, not around it."
        )
    if len(sizes) > 1:
        got = " and ".join(f"{size} at {place}" for size, place in list(sizes.items())[:2])
        raise ValueError(f"{where}: the batch must have one size along `in_dims`, got {got}.")
    return Batch(leaves, axes, spec, next(iter(sizes)))
