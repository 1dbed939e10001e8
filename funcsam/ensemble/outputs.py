"""The outputs of all members of an ensemble."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funcsam import nn as modules
from funcsam.core import checks, levels
from funcsam.core.types import InDims, Params, Tree
from funcsam.ensemble.members import size, stack
from funcsam.ensemble.step import one_by_one

Rebuild: TypeAlias = Callable[[Iterator[Tensor]], Tree]
"""Makes an output of the same structure from other tensors, given in order."""


def predict(
    model: nn.Module,
    params: Params,
    buffers: Params,
    *inputs: object,
    in_dims: InDims = None,
    chunk_size: int | None = None,
) -> Tree:
    """Returns the outputs of all members in evaluation mode, shape `(members, ...)`.

    Args:
        model: The module of one member.
        params: Stacked, as `init` returns them.
        buffers: Stacked, as `init` returns them.
        *inputs: What the module is called with.
        in_dims: The axis of the members for each input, as in `torch.vmap`; `None` for inputs that they share.
        chunk_size: How many members are computed at once; `None` takes all, 1 takes them in a plain loop.

    Returns:
        The output of the module with an axis for the members in front of every tensor, in the same tuples, lists,
        dicts, dataclasses and containers known to `torch.utils._pytree`; `None` stays `None`.

    Raises:
        TypeError: If the module returns anything else.
        ValueError: If the numbers of members differ.
    """
    size((params, buffers), "predict", "params")
    checks.chunk_size("predict", chunk_size)
    dims = (0, 0, *(in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(inputs)))
    rebuilds: list[Rebuild] = []

    def one(params: Params, buffers: Params, *inputs: object) -> list[Tensor]:
        tensors, rebuild = _outputs(modules.predict(model, params, buffers, *inputs))
        rebuilds.append(rebuild)
        return tensors

    given = (params, buffers, *inputs)
    if chunk_size == 1:
        tensors = stack(one_by_one("predict", one, given, dims))
    else:
        with levels.batching():
            tensors = torch.vmap(one, in_dims=dims, chunk_size=chunk_size)(*given)
    return rebuilds[0](iter(tensors))


def _outputs(output: Tree) -> tuple[list[Tensor], Rebuild]:
    """Lists the tensors in what a module returns, with a function that makes the same output from others.

    Neither `vmap` nor optree knows the outputs of all modules, such as those with `None` in the place of a tensor.
    """
    if isinstance(output, Tensor):
        return [output], next
    leaves, spec = pytree.tree_flatten(output)
    if len(leaves) == 1 and leaves[0] is output:
        return _single(output)
    parts = [_outputs(leaf) for leaf in leaves]
    return [x for tensors, _ in parts for x in tensors], lambda rest: pytree.tree_unflatten(
        [rebuild(rest) for _, rebuild in parts], spec
    )


def _single(output: Tree) -> tuple[list[Tensor], Rebuild]:
    if output is None:
        return [], lambda rest: None
    if not dataclasses.is_dataclass(output):
        raise TypeError(
            "predict: `model` must return tensors, alone or in tuples, lists, dicts and dataclasses, "
            f"got {type(output).__name__}."
        )
    tensors, rebuild = _outputs({field.name: getattr(output, field.name) for field in dataclasses.fields(output)})

    def rebuild_dataclass(rest: Iterator[Tensor]) -> Tree:
        new = copy.copy(output)
        for name, value in rebuild(rest).items():
            object.__setattr__(new, name, value)  # which a frozen dataclass takes, too
        return new

    return tensors, rebuild_dataclass
