"""Leaves spread over processes (DTensors): reductions of whole trees with one small message per mesh, no gather."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:  # importing them takes a second; where there is a DTensor, they have been imported
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    Spread: TypeAlias = tuple[DeviceMesh, tuple[int, ...]]

_PLAIN = {Tensor, torch.nn.Parameter}


def sharded(leaf: object) -> "TypeGuard[DTensor]":
    """Tells whether a leaf is a DTensor, without importing them."""
    return type(leaf) not in _PLAIN and hasattr(leaf, "full_tensor")


def any_sharded(leaves: Iterable[object]) -> bool:
    """Tells whether any leaf is a DTensor."""
    return not _PLAIN.issuperset(map(type, leaves)) and any(sharded(leaf) for leaf in leaves)


def _positions_by_mesh(leaves: Sequence[object]) -> list[list[int]]:
    """Lists the positions of leaves that one kernel may take: those of one mesh, those without."""
    meshes: dict[object, list[int]] = {}
    for position, leaf in enumerate(leaves):
        meshes.setdefault(getattr(leaf, "device_mesh", None), []).append(position)
    return list(meshes.values())


def fused(kernel: Callable[..., Sequence[Tensor]], *lists: Sequence[Tensor], **options: object) -> list[Tensor]:
    """Calls a foreach kernel, once for each mesh among the leaves."""
    if not any_sharded(lists[0]):
        return list(kernel(*lists, **options))
    out = list(lists[0])
    for positions in _positions_by_mesh(lists[0]):
        results = kernel(*([leaves[k] for k in positions] for leaves in lists), **options)
        for position, result in zip(positions, results, strict=True):
            out[position] = result
    return out


def total(leaves: Sequence[Tensor], local: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Adds up over all entries of all leaves, on whichever rank they lie; every rank gets the same plain tensor.

    Args:
        leaves: Tensors and DTensors, of any meshes and placements.
        local: From tensors to a sum over their entries, shape ().
    """
    parts: dict[Spread | None, list[Tensor]] = {}
    for leaf in leaves:
        part, spread = _local(leaf) if sharded(leaf) else (leaf, None)
        parts.setdefault(spread, []).append(part)
    sums = [_sum_over_ranks(local(each), spread) for spread, each in parts.items()]
    return torch.stack([each.to(sums[0].device) for each in sums]).sum()


def _local(leaf: "DTensor") -> "tuple[Tensor, Spread | None]":
    """Returns the part on this rank, and over which dimensions of which mesh the other parts lie."""
    if any(placement.is_partial() for placement in leaf.placements):
        from torch.distributed.tensor import Replicate

        leaf = leaf.redistribute(placements=[Replicate() if each.is_partial() else each for each in leaf.placements])
    dims = tuple(k for k, placement in enumerate(leaf.placements) if not placement.is_replicate())
    return leaf.to_local(), (leaf.device_mesh, dims) if dims else None


def _sum_over_ranks(value: Tensor, spread: "Spread | None") -> Tensor:
    if spread is None:
        return value
    mesh, dims = spread
    for dim in dims:
        value = _all_reduce(value, mesh.get_group(dim))
    return value


def _all_reduce(value: Tensor, group: "ProcessGroup") -> Tensor:
    import torch.distributed._functional_collectives as collectives

    summed: Tensor = collectives.wait_tensor(collectives.all_reduce(value, "sum", group))  # type: ignore[no-untyped-call]
    return summed
