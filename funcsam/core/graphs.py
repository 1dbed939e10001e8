"""Which graph the answer of a loss has: by what it can be differentiated, beside its arguments."""

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from funcsam.core import levels, tree
from funcsam.core.types import Params


def clock() -> int:
    """Returns a number that the autograd nodes made from now on reach at least."""
    return 0 if torch.compiler.is_compiling() else torch._C._autograd._get_sequence_nr()


def value(x: Tensor) -> Tensor:
    """Returns a new leaf by which only the evaluation differentiates that made it."""
    leaf = x.detach().requires_grad_()
    leaf._funcsam_value = True  # type: ignore[attr-defined]
    return leaf


_LEAF: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


def leaves(target: Tensor) -> int:
    """Counts the leaves that a graph ends in: a quick look, to see whether there are more than there should be."""
    if target.grad_fn is None:
        return int(target.requires_grad)
    seen, nodes, count = set(), [target.grad_fn], 0
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                if type(node) is _LEAF:
                    count += 1
                else:
                    nodes.append(node)
    return count


def settled(outputs: Any, params: Params, since: int) -> Any:
    """Detaches what was computed in a step, since some time, if nothing but values can be differentiated in it."""
    if not levels.stepping():
        return outputs
    found = [x for x in optree.tree_leaves(outputs) if isinstance(x, Tensor)]
    tracked = [x for x in map(levels.raw, found) if x.requires_grad]
    if not tracked:
        return outputs
    inputs = [levels.raw(leaf) for leaf in tree.flatten(params)[0]]
    if captured(tracked, inputs, since, any(x.requires_grad for x in inputs), True):
        return outputs
    return optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)


def captured(outputs: Sequence[Tensor], inputs: Sequence[Tensor], since: int, given: bool, stepping: bool) -> bool:
    """Tells whether outputs can be differentiated by their inputs, if these are `given` to be, or by anything else.

    In a step `nn.Parameter`s are values.

    Raises:
        RuntimeError: In a step, if there are such values beside something that is differentiated.
    """
    own = {id(x) for x in inputs}
    seen = {x.grad_fn for x in (*inputs, *outputs)}
    nodes: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    nodes += [get_gradient_edge(x).node for x in outputs if x.grad_fn is None and x.requires_grad]
    found, parameter = given, None
    while nodes:
        node = nodes.pop()
        behind = node.next_functions
        if behind and node._sequence_nr() >= since:
            new = [each for each, _ in behind if each is not None and each not in seen]
            seen.update(new)
            nodes += new
        elif behind:
            found = True  # made before
        elif (variable := getattr(node, "variable", None)) is not None and id(variable) not in own:
            if hasattr(variable, "_funcsam_value"):
                continue
            if isinstance(variable, nn.Parameter):
                parameter = variable
            else:
                found = True
    if parameter is None:
        return found
    if stepping and found:
        raise RuntimeError(
            "update: a step that is differentiated must not capture an nn.Parameter that requires grad, got one of "
            f"shape {tuple(parameter.shape)}. Freeze it, `requires_grad_(False)`, if it is a value; differentiate by "
            "`torch.func.grad` if not."
        )
    return found or not stepping
