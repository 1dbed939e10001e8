"""The processes that torchrun started: each trains some of the seeds, and the first one speaks and writes for all."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import optree
import torch
import torch.distributed as dist
from torch import Tensor

from funcsam.studies import devices
from funcsam.studies.errors import StudyError

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others. One with a member more takes longer over an epoch by that member's time; one
that died is noticed at once, by its closed connection and by torchrun."""


class Ranks(NamedTuple):
    """One of the processes that train together; alone, where there are no others.

    All of them call the methods that send something, in the same order.

    Attributes:
        device: Where this process trains.
        rank: Its number, from 0.
        size: How many there are.
        local: Its number on its machine, from 0.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, reads and writes."""
        return self.rank == 0

    def share(self, seeds: int, copies: int = 1, rank: int | None = None) -> list[int]:
        """Lists the members of a process, this one if none is named: consecutive seeds, and all copies of these.

        The first processes have one seed more than the last where they cannot have the same number.

        >>> [Ranks(torch.device("cpu"), rank, 2).share(3, copies=2) for rank in range(2)]
        [[0, 1, 3, 4], [2, 5]]
        """
        rank = self.rank if rank is None else rank
        least, more = divmod(seeds, self.size)
        begin = rank * least + min(rank, more)
        own = range(begin, begin + least + (rank < more))
        return [copy * seeds + seed for copy in range(copies) for seed in own]

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Tells of each flag whether it is set on any process; the same answer everywhere."""
        if self.size == 1:
            return flags
        said = torch.tensor(flags, dtype=torch.int32, device=self.device if self.device.type == "cuda" else "cpu")
        with _all_there():
            dist.all_reduce(said, dist.ReduceOp.MAX)
            return tuple(bool(flag) for flag in said.tolist())

    def gathered(self, tree: T) -> list[T]:
        """Returns what each process has, tensors on the CPU; on all but the first process an empty list."""
        if self.size == 1:
            return [tree]
        parts: Any = [None] * self.size if self.first else None
        with _all_there():
            dist.gather_object(_on_cpu(tree), parts)
        self.agree(False)  # nobody leaves, and closes its connections, before everything has arrived
        return parts or []

    def of_first(self, tree: T) -> T:
        """Returns what the first process has, tensors on the CPU where there are several."""
        if self.size == 1:
            return tree
        sent: Any = [_on_cpu(tree) if self.first else None]
        with _all_there():
            dist.broadcast_object_list(sent)
        return sent[0]  # type: ignore[no-any-return]

    def in_turn(self, make: Callable[[], T]) -> T:
        """Makes something on the first process of every machine, and then on the others, which find what it downloaded.

        Raises:
            StudyError: On all processes, if it is raised on any.
        """
        if self.size == 1:
            return make()
        made: list[T] = []
        for turn in (self.local == 0, self.local != 0):
            complaint = None
            if turn:
                try:
                    made.append(make())
                except StudyError as error:
                    complaint = str(error)
            found: list[str | None] = [None] * self.size
            with _all_there():
                dist.all_gather_object(found, complaint)
            for text in filter(None, found):
                raise StudyError(text)
        return made[0]


@contextlib.contextmanager
def together(device: str, seeds: int) -> Iterator[Ranks]:
    """Joins the processes that torchrun started, if it did; on GPUs each takes one.

    Args:
        device: Where to train; `cuda` is the GPU of a process's own number.
        seeds: How many seeds there are to share.

    Raises:
        StudyError: If there are fewer seeds than processes, or no such device.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if count == 1:
        yield Ranks(devices.named(device))
        return
    if seeds < count:
        raise StudyError(f"compare: `--seeds` must be at least the number of processes, {count}, got {seeds}.")
    if device.startswith("cuda:"):
        raise StudyError(f"compare: `--device` must be cuda where every process takes a GPU of its own, got {device}.")
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    own = devices.named(f"cuda:{local}" if device == "cuda" else device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    with _all_there():
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(own, rank, count, local)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split()))[:80]  # gloo begins with a place in its source
        raise StudyError(
            f"compare: every process must go on to the end, got one that did not ({reason}). "
            "The same command with --resume goes on from the last checkpoints."
        ) from None


def _on_cpu(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, tree)
