"""Averages over processes: where one stands in the chain says which SAM it is."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor

from funcsam.core import checks, levels, shards, tree
from funcsam.core.records import factory
from funcsam.core.transform import Carried, Transform
from funcsam.core.types import Aux, P, PairedGradsFn, Params, State, Tree

if dist.is_available():  # some builds of torch are without
    import torch.distributed._functional_collectives  # registers the operators
    from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | DeviceMesh | None"
"""A process group, a one-dimensional `DeviceMesh`, or `None` for all processes."""
Rule = Literal["mean", "first", "local"]
BUCKET = 2**25
"""Bytes of a bucket: 32 MiB. Those of `DistributedDataParallel` have 25 MiB."""


def _group(where: str, group: Group) -> "ProcessGroup":
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{where}: torch.distributed must be initialised. Start the processes with torchrun and call "
            "`torch.distributed.init_process_group` first."
        )
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    return dist.distributed_c10d._get_default_group() if group is None else group


class _Message(NamedTuple):
    """A tree to exchange.

    Attributes:
        tree: What this rank has.
        rule: What every rank is to have.
    """

    tree: Tree
    rule: Rule


def _buckets(kinds: Sequence[Hashable], leaves: Sequence[Tensor], limit: int) -> list[list[int]]:
    """Lists the positions of leaves that are sent together: of one kind, and up to a size."""
    open_: dict[Hashable, list[int]] = {}
    sizes: dict[Hashable, int] = {}
    buckets = []
    for position, (kind, leaf) in enumerate(zip(kinds, leaves, strict=True)):
        size = leaf.numel() * leaf.element_size()
        if kind not in open_ or sizes[kind] + size > limit:
            open_[kind], sizes[kind] = [], 0
            buckets.append(open_[kind])
        open_[kind].append(position)
        sizes[kind] += size
    return buckets


def _exchange(parts: Sequence[_Message], group: "ProcessGroup", limit: int) -> list[Tree]:
    """Averages trees, or takes those of the first rank, in the same buckets."""
    flat = [tree.flatten_any(part.tree) for part in parts]
    exchanged = [
        (n, k, part.rule)
        for n, part in enumerate(parts)
        for k, leaf in enumerate(flat[n][0])
        if isinstance(leaf, Tensor) and _is_exchanged(leaf, part.rule)
    ]
    leaves = [flat[n][0][k] for n, k, _ in exchanged]
    for (n, k, _), new in zip(
        exchanged, _exchange_leaves(leaves, [rule for *_, rule in exchanged], group, limit), strict=True
    ):
        flat[n][0][k] = new
    return [tree.unflatten(spec, own, part.tree) for part, (own, spec) in zip(parts, flat, strict=True)]


def _is_exchanged(leaf: Tensor, rule: Rule) -> bool:
    return rule == "first" or (rule == "mean" and (leaf.is_floating_point() or leaf.is_complex()))


def _exchange_leaves(
    leaves: Sequence[Tensor], rules: Sequence[Rule], group: "ProcessGroup", limit: int
) -> list[Tensor]:
    """Exchanges leaves by their rules; every bucket is sent before the first is waited for."""
    kinds = [(leaf.dtype, leaf.device, rule) for leaf, rule in zip(leaves, rules, strict=True)]
    buckets = _buckets(kinds, leaves, limit)
    started = [_start([leaves[k] for k in bucket], rules[bucket[0]], group) for bucket in buckets]
    total: list[Tensor] = list(leaves)
    for bucket, sent in zip(buckets, started, strict=True):
        parts = torch.split(_wait(sent), [leaves[k].numel() for k in bucket])
        for k, part in zip(bucket, parts, strict=True):
            total[k] = part.view(leaves[k].shape).to(leaves[k].dtype)
    return total


def _start(leaves: Sequence[Tensor], rule: Rule, group: "ProcessGroup") -> Tensor:
    """Starts to send a bucket. Under the compiler, torch's own wrapper would wait for it at once."""
    bucket = torch.cat([leaf.reshape(-1) for leaf in leaves])
    if rule == "mean":
        bucket = bucket / group.size()
    else:
        bucket = bucket.to(torch.uint8) if bucket.dtype is torch.bool else bucket
        bucket = bucket if dist.get_rank(group) == 0 else torch.zeros_like(bucket)
    sent: Tensor = torch.ops._c10d_functional.all_reduce(bucket, "sum", group.group_name)
    return sent


def _wait(sent: Tensor) -> Tensor:
    """Waits for a message; if it does not come, says so in words that name the cause."""
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.wait_tensor(sent)  # type: ignore[no-any-return]
    with _naming_the_cause():
        return torch.ops._c10d_functional.wait_tensor(sent)  # type: ignore[no-any-return]


@contextmanager
def _naming_the_cause() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2][:80]
        raise RuntimeError(
            "distributed: every rank of the group must take part within the time-out of `init_process_group`, "
            f"got no answer from one that failed, ended or is stuck ({reason}). Look at the logs of the other ranks."
        ) from error


@factory
def all_reduce_mean(group: Group = None, aux: Rule = "mean", bucket_bytes: int = BUCKET) -> Transform:
    """Averages gradients over the processes of a group.

    Every rank must hold the same params, and keeps them bit for bit: what comes out is the same everywhere. The loss
    must be a mean over the examples of a rank. Where ranks have differently many, as in an uneven last batch, multiply
    the loss of a rank by `n * ranks / total`, with `n` its number of examples and `total` that of all ranks; its value
    in `aux` is then right, too. Gradients are sent in buckets, one on its way while the next is filled. States of
    transforms to the left in the chain are averaged with them.

    What is not finite on one rank is not finite on any after the average, so that `apply_if_finite` and
    `dynamic_loss_scale` around the chain skip the same steps everywhere. If a rank fails, the others get an error:
    at once where its connection breaks, otherwise after the time-out of `torch.distributed.init_process_group`.

    With a `DeviceMesh` whose dimensions are `("across", "within")` nodes,
    `chain(all_reduce_mean(mesh["within"]), sam(rho), all_reduce_mean(mesh["across"]))` takes one ascent per node.

    Args:
        group: A process group, a one-dimensional `DeviceMesh`, or `None` for all processes.
        aux: How the `aux` of the loss (its value, buffers) is combined: `"mean"` averages floating-point leaves,
            `"first"` takes those of the first rank, `"local"` leaves to each rank its own.
        bucket_bytes: Size of a bucket.

    Raises:
        ValueError: If `aux` is unknown, or on `init`, if the params of the ranks differ.
        TypeError: On `init`, if params are sharded: `gather` has their gradients averaged already.
        RuntimeError: If torch.distributed is not initialised, under a `torch.func` transform, or if a rank is missing.

    References:
        Foret et al., 2021, section 3 and footnote 5: one ascent per accelerator.
    """
    checks.choice("all_reduce_mean", ("mean", "first", "local"), aux=aux)
    checks.count("all_reduce_mean", bucket_bytes=bucket_bytes)

    def init(params: Params) -> State:
        _check_equal(params, _group("all_reduce_mean", group))
        return ()

    def update(params: P, grads_fn: PairedGradsFn, state: State, *batch: object) -> tuple[P, State, Aux]:
        if not torch.compiler.is_compiling() and not levels.eager():
            raise RuntimeError(
                "all_reduce_mean: must not run under `vmap` or another transform of torch.func, got one. "
                "Put it outside of them."
            )
        grads, found = grads_fn(params, *batch)
        parts = [_Message(grads, "mean")]
        while isinstance(found, Carried):
            parts.append(_Message(found.extra, "mean"))
            found = found.aux
        parts.append(_Message(found, aux))
        grads, *states, found = _exchange(parts, _group("all_reduce_mean", group), bucket_bytes)
        for each in reversed(states):
            found = Carried(each, found)
        return grads, state, found

    return Transform(init, update, ())


def _check_equal(params: Params, group: "ProcessGroup") -> None:
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
    wide = [leaf.to(levels.widest(leaf.device)) for leaf in own]
    sums = torch.stack([part for leaf in wide for part in (leaf.sum(), leaf.square().sum())])
    of_ranks = [torch.empty_like(sums) for _ in range(group.size())]
    with _naming_the_cause():
        dist.all_gather(of_ranks, sums, group=group)
    for rank, other in enumerate(of_ranks):
        if not torch.equal(other.nan_to_num(), of_ranks[0].nan_to_num()):
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
    return _exchange_one(x, "mean", _group("mean", group))


def broadcast(x: P, group: Group = None) -> P:
    """Returns the tree of the first rank on every rank of a group.

    Args:
        x: A tree of tensors, params and buffers at the start of a run, of the same structure and shapes on every rank.
        group: As in `all_reduce_mean`.
    """
    return _exchange_one(x, "first", _group("broadcast", group))


def _exchange_one(x: P, rule: Rule, group: "ProcessGroup") -> P:
    (new,) = _exchange([_Message(x, rule)], group, BUCKET)
    return cast(P, new)
