"""Checkpoints of trees, sharded or not, that are written by some number of processes and read by another."""

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from funcsam.core import checks, tree
from funcsam.core.types import P, Tree

Folder = str | os.PathLike[str]


def save(folder: Folder, x: Tree) -> None:
    """Writes a tree with `torch.distributed.checkpoint`; every rank writes its shards. All ranks must call it.

    Leaves that are not DTensors must be equal on every rank; one of them writes. A checkpoint is never replaced, as a
    run that is killed while it writes would lose both: give every checkpoint a folder of its own.

    Args:
        folder: Where to write, on a file system that all ranks see.
        x: A tree of tensors, such as `(params, buffers, state)`.

    Raises:
        ValueError: If the folder holds a checkpoint.
        TypeError: If a leaf is no tensor.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, {"w": torch.arange(3.0)})
    ...     load(folder, {"w": torch.zeros(3)})
    {'w': tensor([0., 1., 2.])}
    """
    checks.tensors("save", "x", x)
    if _metadata(folder).exists():
        raise ValueError(f"save: `folder` must not hold a checkpoint, got {folder}. Give every one its own folder.")
    _call_dcp("save", _named(x), folder)


def load(folder: Folder, like: P) -> P:
    """Reads what `save` wrote, on any number of ranks. All ranks must call it.

    Args:
        folder: Where it was written.
        like: A tree of the same structure and shapes, e.g. `(params, buffers, tx.init(params))` of a fresh start; its
            devices, dtypes and placements are those of what is returned. It does not change.

    Raises:
        ValueError: If the folder holds no checkpoint, or that of another tree.
    """
    if not _metadata(folder).exists():
        raise ValueError(f"load: `folder` must hold a whole checkpoint, got {folder}.")
    wanted = {name: torch.empty_like(leaf) for name, leaf in _named(like).items()}
    _check({name: tuple(leaf.shape) for name, leaf in wanted.items()}, _shapes(folder))
    _call_dcp("load", wanted, folder)
    return tree.unflatten(tree.flatten(like)[1], wanted.values(), like)


def _named(x: Tree) -> dict[str, Tensor]:
    names = [path or "the root" for path in checks.paths(x)]
    return dict(zip(names, tree.flatten(x)[0], strict=True))


def _metadata(folder: Folder) -> Path:
    return Path(folder) / ".metadata"  # torch writes it last


def _call_dcp(name: str, leaves: dict[str, Tensor], folder: Folder) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():  # one process alone is fine
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        getattr(dcp, name)(leaves, checkpoint_id=folder)


def _shapes(folder: Folder) -> dict[str, tuple[int, ...]]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(leaf.size) if hasattr(leaf, "size") else () for name, leaf in saved.items()}


def _check(wanted: dict[str, tuple[int, ...]], saved: dict[str, tuple[int, ...]]) -> None:
    for name in sorted({*wanted, *saved}):
        if name not in wanted or name not in saved:
            side = "`like`" if name in wanted else "the checkpoint"
            raise ValueError(f"load: `like` must have the leaves that were saved, got {name} in {side} only.")
        if wanted[name] != saved[name]:
            raise ValueError(
                f"load: `like` must have the shapes that were saved, got {wanted[name]} for {saved[name]} at {name}."
            )
