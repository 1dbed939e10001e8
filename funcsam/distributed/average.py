"""Averages over processes: where one stands in the chain says which SAM it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from funcsam import checks, levels, shards, tree
from funcsam.transform import Aux, GradsFn, Kept, State, Transform

if dist.is_available():  # some builds of torch are without
    import torch.distributed._functional_collectives as collectives
    from torch.distributed.device_mesh import DeviceMesh

P = TypeVar("P")
Ranks = Any
Group = Any
"""A process group, a one-dimensional `DeviceMesh`, or `None` for all processes."""
Rule = Literal["mean", "first", "local"]


def _group(where: str, group: Group) -> Ranks:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{where}: torch.distributed must be initialised. Start the processes with torchrun and call "
            "`torch.distributed.init_process_group` first."
        )
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    return dist.group.WORLD if group is None else group


def _buckets(leaves: Sequence[Tensor], limit: int) -> list[list[int]]:
    """Lists the positions of leaves that travel together: of one type and device, and up to a size."""
    open_: dict[Any, list[int]] = {}
    sizes: dict[Any, int] = {}
    buckets = []
    for position, leaf in enumerate(leaves):
        kind, size = (leaf.dtype, leaf.device), leaf.numel() * leaf.element_size()
        if kind not in open_ or sizes[kind] + size > limit:
            open_[kind], sizes[kind] = [], 0
            buckets.append(open_[kind])
        open_[kind].append(position)
        sizes[kind] += size
    return buckets


def _sum(leaves: Sequence[Tensor], group: Ranks, limit: int) -> list[Tensor]:
    """Adds leaves up over the group; every bucket is under way before the first is waited for."""
    buckets = _buckets(leaves, limit)
    moving = [
        collectives.all_reduce(torch.cat([leaves[k].reshape(-1) for k in bucket]), "sum", group) for bucket in buckets
    ]
    total: list[Tensor] = list(leaves)
    for bucket, sent in zip(buckets, moving, strict=True):
        arrived = _arrived(sent)
        parts = torch.split(arrived, [leaves[k].numel() for k in bucket])
        for k, part in zip(bucket, parts, strict=True):
            total[k] = part.view(leaves[k].shape)
    return total


def _arrived(sent: Tensor) -> Tensor:
    """Waits for a message; if it does not come, says so in words that name the cause."""
    if torch.compiler.is_compiling():
        return collectives.wait_tensor(sent)  # type: ignore[no-any-return, no-untyped-call]
    with _together():
        return collectives.wait_tensor(sent)  # type: ignore[no-any-return, no-untyped-call]


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2][:80]
        raise RuntimeError(
            "all_reduce_mean: every rank of the group must take part within the time-out of `init_process_group`, "
            f"got no answer from one that failed, ended or is stuck ({reason}). Look at the logs of the other ranks."
        ) from error


def _averaged(x: P, group: Ranks, limit: int) -> P:
    """Averages floating-point leaves; others stay as they are."""
    leaves, spec = tree.flatten_any(x)
    tensors = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    moving = [k for k in tensors if leaves[k].is_floating_point() or leaves[k].is_complex()]
    total = _sum([leaves[k] / group.size() for k in moving], group, limit)
    for k, mean in zip(moving, total, strict=True):
        leaves[k] = mean.to(leaves[k].dtype)
    return tree.unflatten(spec, leaves, x)


def _first(x: P, group: Ranks, limit: int) -> P:
    """Takes the leaves of the first rank."""
    leaves, spec = tree.flatten_any(x)
    mine = dist.get_rank(group) == 0
    moving = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    plain = [leaves[k].to(torch.uint8) if leaves[k].dtype is torch.bool else leaves[k] for k in moving]
    total = _sum([leaf if mine else torch.zeros_like(leaf) for leaf in plain], group, limit)
    for k, new in zip(moving, total, strict=True):
        leaves[k] = new.to(leaves[k].dtype)
    return tree.unflatten(spec, leaves, x)


def all_reduce_mean(group: Group = None, aux: Rule = "mean", bucket_bytes: int = 2**25) -> Transform:
    """Averages gradients over the processes of a group.

    Every rank must hold the same params, and keeps them bit for bit: what comes out is the same everywhere. The loss
    must be a mean over the examples of a rank. Where ranks have differently many, as in an uneven last batch, multiply
    the loss of a rank by `n * ranks / total`, with `n` its number of examples and `total` that of all ranks; its value
    in `aux` is then right, too. Gradients travel in buckets, one under way while the next is filled. States of
    transforms to the left in the chain are averaged with them.

    What is not finite on one rank is not finite on any after the average, so that `apply_if_finite` and
    `dynamic_loss_scale` around the chain skip the same steps everywhere. If a rank fails, the others get an error:
    at once where its connection breaks, otherwise after the time-out of `torch.distributed.init_process_group`.

    With a `DeviceMesh` whose dimensions are `("across", "within")` nodes,
    `chain(all_reduce_mean(mesh["within"]), sam(rho), all_reduce_mean(mesh["across"]))` takes one ascent per node.

    Args:
        group: A process group, a one-dimensional `DeviceMesh`, or `None` for all processes.
        aux: What becomes of the `aux` of the loss (its value, buffers): `"mean"` averages floating-point leaves,
            `"first"` takes those of the first rank, `"local"` leaves to each rank its own.
        bucket_bytes: Size of a bucket.

    Raises:
        ValueError: If `aux` is unknown, or on `init`, if the params of the ranks differ.
        TypeError: On `init`, if params are sharded: `gather` has their gradients averaged already.
        RuntimeError: If torch.distributed is not initialised, under a `torch.func` transform, or if a rank is missing.

    References:
        Foret et al., 2021, section 3 and footnote 5: one ascent per accelerator.
    """
    if aux not in ("mean", "first", "local"):
        raise ValueError(f'all_reduce_mean: `aux` must be "mean", "first" or "local", got {aux!r}.')
    checks.count("all_reduce_mean", bucket_bytes=bucket_bytes)

    def init(params: Any) -> State:
        _alike(params, _group("all_reduce_mean", group))
        return ()

    def kept(found: Aux, ranks: Ranks) -> Aux:
        if isinstance(found, Kept):
            return Kept(_averaged(found.states, ranks, bucket_bytes), kept(found.aux, ranks))
        if aux == "local":
            return found
        return (_averaged if aux == "mean" else _first)(found, ranks, bucket_bytes)

    def update(params: P, grads_fn: GradsFn, state: State, *batch: Any) -> tuple[P, State, Aux]:
        if not torch.compiler.is_compiling() and not levels.eager():
            raise RuntimeError(
                "all_reduce_mean: must not run under `vmap` or another transform of torch.func, got one. "
                "Put it outside of them."
            )
        ranks = _group("all_reduce_mean", group)
        grads, found = grads_fn(params, *batch)
        return _averaged(grads, ranks, bucket_bytes), state, kept(found, ranks)

    return Transform(init, update)


def _alike(params: Any, group: Ranks) -> None:
    for path, leaf in zip(checks.paths(params), tree.flatten(params)[0], strict=True):
        if shards.sharded(leaf):
            raise TypeError(
                f"all_reduce_mean: `params` must not be sharded, got a DTensor at {path or 'the root'}. "
                "Their gradients are averaged where the loss brings them together with `distributed.gather`."
            )
    leaves = [leaf for leaf in tree.flatten(params)[0] if not leaf.is_meta and leaf.numel()]
    if not leaves or not levels.eager():
        return
    own = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
    mine = torch.stack([part for leaf in own for part in (leaf.double().sum(), leaf.double().square().sum())])
    theirs = [torch.empty_like(mine) for _ in range(group.size())]
    with _together():
        dist.all_gather(theirs, mine, group=group)
    for rank, other in enumerate(theirs):
        if not torch.equal(other.nan_to_num(), theirs[0].nan_to_num()):
            raise ValueError(
                f"all_reduce_mean: `params` must be the same on every rank, got others on rank {rank} of the group. "
                "Start with `params = broadcast(params)`."
            )


def mean(x: P, group: Group = None) -> P:
    """Averages a tree over the ranks of a group: the value of a loss, buffers.

    Args:
        x: A tree of tensors, of the same structure and shapes on every rank. Leaves that are not floating-point stay.
        group: As in `all_reduce_mean`.
    """
    return _averaged(x, _group("mean", group), 2**25)


def broadcast(x: P, group: Group = None) -> P:
    """Returns the tree of the first rank on every rank of a group.

    Args:
        x: A tree of tensors, params and buffers at the start of a run, of the same structure and shapes on every rank.
        group: As in `all_reduce_mean`.
    """
    return _first(x, _group("broadcast", group), 2**25)
