"""Leaves spread over processes (DTensors): reductions of whole trees with one small message per mesh, no gather."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_PLAIN = {Tensor, torch.nn.Parameter}


def sharded(leaf: Any) -> bool:
    """Tells whether a leaf is a DTensor, without importing them, which takes a second."""
    return type(leaf) not in _PLAIN and hasattr(leaf, "full_tensor")


def among(leaves: Iterable[Any]) -> bool:
    """Tells whether any leaf is a DTensor."""
    return not _PLAIN.issuperset(map(type, leaves)) and any(sharded(leaf) for leaf in leaves)


def by_mesh(leaves: Sequence[Any]) -> list[list[int]]:
    """Lists the positions of leaves that one kernel may take: those of one mesh, those without."""
    meshes: dict[Any, list[int]] = {}
    for position, leaf in enumerate(leaves):
        meshes.setdefault(getattr(leaf, "device_mesh", None), []).append(position)
    return list(meshes.values())


def fused(kernel: Callable[..., Any], *lists: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Calls a foreach kernel, once for each mesh among the leaves."""
    if not among(lists[0]):
        return list(kernel(*lists, **options))
    out: list[Any] = [None] * len(lists[0])
    for positions in by_mesh(lists[0]):
        results = kernel(*([leaves[k] for k in positions] for leaves in lists), **options)
        for position, result in zip(positions, results, strict=True):
            out[position] = result
    return out


def total(leaves: Sequence[Tensor], local: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Adds up over all entries of all leaves, wherever they lie; every rank gets the same plain tensor.

    Args:
        leaves: Tensors and DTensors, of any meshes and placements.
        local: From tensors to a sum over their entries, shape ().
    """
    own: dict[Any, list[Tensor]] = {}
    for leaf in leaves:
        key = None
        if sharded(leaf):
            leaf, key = _shard(leaf)
        own.setdefault(key, []).append(leaf)
    sums = [_summed(local(parts), key) for key, parts in own.items()]
    return torch.stack([each.to(sums[0].device) for each in sums]).sum()


def _shard(leaf: Any) -> tuple[Tensor, Any]:
    """Returns what lies here, and over which dimensions of which mesh the rest lies."""
    if any(placement.is_partial() for placement in leaf.placements):
        leaf = leaf.redistribute(placements=[_settled(placement) for placement in leaf.placements])
    dims = tuple(k for k, placement in enumerate(leaf.placements) if not placement.is_replicate())
    return leaf.to_local(), (leaf.device_mesh, dims) if dims else None


def _settled(placement: Any) -> Any:
    from torch.distributed.tensor import Replicate  # where there is a DTensor, it has been imported

    return Replicate() if placement.is_partial() else placement


def _summed(value: Tensor, key: Any) -> Tensor:
    if key is None:
        return value
    mesh, dims = key
    for dim in dims:
        value = _all_reduce(value, mesh.get_group(dim))
    return value


def _all_reduce(value: Tensor, group: Any) -> Tensor:
    import torch.distributed._functional_collectives as collectives

    summed: Tensor = collectives.wait_tensor(collectives.all_reduce(value, "sum", group))  # type: ignore[no-untyped-call]
    return summed
