"""Autograd graphs: by what else than its arguments the answer of a loss can be differentiated."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from funcsam.core import frames, levels, tree
from funcsam.core.types import P, Params


def sequence_number() -> int:
    """Returns the sequence number of the next autograd node: nodes that are made later have at least this number."""
    return 0 if torch.compiler.is_compiling() else torch._C._autograd._get_sequence_nr()


def inner_leaf(x: Tensor) -> Tensor:
    """Returns a new leaf for one evaluation; other evaluations treat it as a value."""
    leaf = x.detach().requires_grad_()
    leaf._funcsam_inner = True  # type: ignore[attr-defined]
    return leaf


_LEAF: type = vars(torch._C._functions)["AccumulateGrad"]


def count_leaves(target: Tensor) -> int:
    """Counts the leaves of a graph that require grad; quicker than `differentiable`, which says what they are."""
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


def detach_values(outputs: P, params: Params, since: int) -> P:
    """Detaches what a step computed after a sequence number, unless it can be differentiated by more than values."""
    if not frames.captures_are_values():
        return outputs
    found, spec = tree.flatten_any(outputs)
    tracked = [x for x in map(levels.unwrapped, filter(torch.is_tensor, found)) if x.requires_grad]
    if not tracked:
        return outputs
    inputs = [levels.unwrapped(leaf) for leaf in tree.flatten(params)[0]]
    if differentiable(tracked, inputs, since, any(x.requires_grad for x in inputs), True):
        return outputs
    return tree.unflatten(spec, [x.detach() if isinstance(x, Tensor) else x for x in found], outputs)


def differentiable(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], since: int, given: bool, captures_are_values: bool
) -> bool:
    """Tells whether outputs can be differentiated by their inputs, or by what the loss captures.

    Args:
        outputs: Tensors that require grad.
        inputs: What they were computed from.
        since: The sequence number at which their computation began; the graph before it is not searched.
        given: Whether they can be differentiated by the inputs; only other tensors are searched for.
        captures_are_values: Whether an `nn.Parameter` that the loss captures is a value, as in a step.

    Raises:
        RuntimeError: In a step, if the loss captures such a value and something else is differentiated.
    """
    input_ids = {id(x) for x in inputs}
    seen = {x.grad_fn for x in (*inputs, *outputs)}
    nodes: list[Node] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    nodes += [get_gradient_edge(x).node for x in outputs if x.grad_fn is None and x.requires_grad]
    found, parameter = given, None
    while nodes:
        node = nodes.pop()
        edges = node.next_functions
        if edges and node._sequence_nr() >= since:
            new = [each for each, _ in edges if each is not None and each not in seen]
            seen.update(new)
            nodes += new
        elif edges:
            found = True  # made before this evaluation
        elif (variable := getattr(node, "variable", None)) is not None and id(variable) not in input_ids:
            if hasattr(variable, "_funcsam_inner"):
                continue
            if isinstance(variable, nn.Parameter):
                parameter = variable
            else:
                found = True
    if parameter is None:
        return found
    if captures_are_values and found:
        raise RuntimeError(
            "update: a step that is differentiated must not capture an nn.Parameter that requires grad, got one of "
            f"shape {tuple(parameter.shape)}. Freeze it, `requires_grad_(False)`, if it is a value; differentiate by "
            "`torch.func.grad` if not."
        )
    return found or not captures_are_values
