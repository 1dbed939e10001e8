"""Params that no process holds whole."""

from typing import TYPE_CHECKING

from torch import Tensor

from funcsam.core import shards, tree
from funcsam.core.types import P

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def shard(params: P, mesh: "DeviceMesh") -> P:
    """Spreads params over the processes of a mesh: every leaf along its first axis.

    What a `Transform` makes of them stays spread in the same way: states, perturbations, updates. Norms are global.

    Args:
        params: A tree of tensors, equal on every rank. Leaves of shape () stay whole on every rank.
        mesh: A `DeviceMesh` of one dimension; of several, leaves are spread over the last and copied along the others.

    Returns:
        A tree of DTensors.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    copies: list[Placement] = [Replicate()] * (mesh.ndim - 1)

    def spread(leaf: Tensor) -> Tensor:
        return distribute_tensor(leaf, mesh, [*copies, Shard(0) if leaf.ndim else Replicate()])

    leaves, spec = tree.flatten(params)
    return tree.unflatten(spec, [spread(leaf) for leaf in leaves], params)


def gather(params: P) -> P:
    """Brings sharded params together inside a loss; their gradients come back averaged and spread (ZeRO stage 3).

    The loss of a rank must be a mean over its own examples:

        grads_fn = grad_and_value(lambda params, *batch: loss_fn(gather(params), *batch))

    Every evaluation is then averaged over the ranks, as with `chain(all_reduce_mean(), ...)`: one ascent for all. An
    ascent per rank is not possible with sharded params: no rank could hold its perturbation. `aux` is the rank's
    own; average it with `mean`.

    Args:
        params: A tree of tensors; those that are not DTensors pass.

    Returns:
        The whole tensors, on every rank.

    References:
        Rajbhandari et al., 2020 (ZeRO), section 5.3.
    """
    leaves, spec = tree.flatten(params)
    return tree.unflatten(spec, [_gathered(leaf) if shards.sharded(leaf) else leaf for leaf in leaves], params)


def _gathered(leaf: "DTensor") -> Tensor:
    from torch.distributed.tensor import Partial, Replicate

    dims = leaf.device_mesh.ndim
    whole: Tensor = leaf.redistribute(placements=[Replicate()] * dims).to_local(grad_placements=[Partial("avg")] * dims)
    return whole
