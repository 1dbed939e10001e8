"""A module's tensors as trees, and back."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from funcsam.nn.layout import Named, initialised, tensors

M = TypeVar("M", bound=nn.Module)


def split(model: nn.Module) -> tuple[Named, Named]:
    """Splits a module into what is trained and what is not, by name.

    A tensor that has several names (tied weights, shared submodules) is listed under the first. The trees are copies:
    the module does not see what is done to them. To train LoRA factors, freeze the base (`base.requires_grad_(False)`)
    before: the factors are then the params, and the base lies in the buffers, which a step does not copy.

    Args:
        model: Any module; parameters count as trained where they require grad.

    Returns:
        `(params, buffers)`; `buffers` holds the buffers and the frozen parameters.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If the module is not initialised yet (`LazyLinear` and its like).

    >>> params, buffers = split(nn.BatchNorm1d(2))
    >>> sorted(params), sorted(buffers)
    (['bias', 'weight'], ['num_batches_tracked', 'running_mean', 'running_var'])
    """
    initialised("split", model)
    params = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    return params, frozen | {name: b.detach().clone() for name, b in model.named_buffers()}


def load(model: M, *trees: Mapping[str, Tensor]) -> M:
    """Copies params and buffers into a module, and returns it.

    Args:
        model: The module; its tensors keep their storage, device and dtype.
        *trees: Tensors by name: `params`, `buffers`, or both. What they do not name stays as it is.

    Raises:
        ValueError: If a name is not in the module or a shape differs. Nothing has been written then.

    >>> load(nn.Linear(1, 1), {"weight": torch.tensor([[2.0]])}).weight.item()
    2.0
    """
    initialised("load", model)
    own = dict(tensors(model))
    for name, tensor in ((name, tensor) for each in trees for name, tensor in each.items()):
        if name not in own:
            raise ValueError(f"load: `model` must have every name of the trees, got none at {name}.")
        if tensor.shape != own[name].shape:
            got = f"{tuple(tensor.shape)} for {tuple(own[name].shape)}"
            raise ValueError(f"load: the trees must have the shapes of `model`, got {got} at {name}.")
    with torch.no_grad():
        for each in trees:
            for name, tensor in each.items():
                own[name].copy_(tensor)
    return model
