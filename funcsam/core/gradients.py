"""From a loss to a grads_fn."""

import contextlib
from collections.abc import Sequence
from typing import Literal, TypeGuard

import optree
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from funcsam.core import checks, frames, graphs, kernels, levels, tree
from funcsam.core.types import Aux, CheckedGradsFn, Loss, P, Params, ScopedLoss

Backend = Literal["auto", "func", "autograd"]


def grad_and_value(loss_fn: Loss, has_aux: bool = False, backend: Backend = "auto") -> "GradAndValue":
    """Returns the function that computes gradients and value of a loss: the contract of `torch.func.grad_and_value`.

    Args:
        loss_fn: `loss_fn(params, *batch)` returns the loss, a real tensor of shape (), or `(loss, aux)`.
        has_aux: Whether `loss_fn` returns `(loss, aux)`; `aux` is a pytree of tensors.
        backend: `"func"` is `torch.func.grad_and_value`: it composes with `vmap`, `torch.func.grad` and
            `torch.compile`. `"autograd"` is `torch.autograd.grad`: less overhead in eager code on small models,
            activation checkpointing, DTensors. `"auto"` takes autograd in plain eager code and func elsewhere, also in
            inference mode.

    Returns:
        `grads_fn(params, *batch) -> (grads, loss)`, or `(grads, (loss, aux))` with `has_aux`. A leaf that the loss does
        not depend on has gradient zero. Like that of `torch.func.grad_and_value`, the answer has a graph where grad
        mode is on and something requires grad: a param, the batch, what the loss captures. A step detaches params
        that are leaves, see `Transform.update`.

    Raises:
        ValueError: If `backend` is unknown.
        TypeError: On a call, if `loss_fn` does not return what `has_aux` says, or `aux` holds anything but tensors.

    >>> grads_fn = grad_and_value(lambda params, x: (params["w"] * x) ** 2)
    >>> grads_fn({"w": torch.tensor(3.0)}, torch.tensor(2.0))
    ({'w': tensor(24.)}, tensor(36.))
    """
    checks.function("grad_and_value", loss_fn=loss_fn)
    checks.choice("grad_and_value", ("auto", "func", "autograd"), backend=backend)
    return GradAndValue(loss_fn, has_aux, backend)


class GradAndValue(CheckedGradsFn):
    """What `grad_and_value` returns."""

    def __init__(self, loss_fn: Loss, has_aux: bool, backend: Backend, factor: Tensor | None = None) -> None:
        self.loss_fn, self.has_aux, self.backend, self.factor = loss_fn, has_aux, backend, factor
        self._needs_graph = False  # that the last evaluation needed a graph: the next builds one at once

    def __repr__(self) -> str:
        name = getattr(self.loss_fn, "__qualname__", None) or repr(self.loss_fn)
        return f"grad_and_value({name}, has_aux={self.has_aux}, backend={self.backend!r})"

    def scaled(self, factor: Tensor) -> "GradAndValue":
        """Returns the function whose gradients are those of `factor` times the loss; the value stays the loss."""
        return GradAndValue(self.loss_fn, self.has_aux, self.backend, factor)

    def __call__(self, params: P, /, *batch: object) -> tuple[P, Aux]:
        """Returns `(grads, loss)`, or `(grads, (loss, aux))` with `has_aux`."""
        leaves, spec = tree.flatten(params)
        plain = levels.eager() and not _in_inference_mode(leaves)
        if self.backend == "autograd" and not plain and not torch.compiler.is_compiling():
            where = "in inference mode" if levels.eager() else "under `torch.func` transforms"
            raise RuntimeError(
                f'grad_and_value: the "autograd" backend does not work {where}. Set `backend` to "auto" or "func".'
            )
        with levels.fresh():
            if self.backend == "autograd" or (self.backend == "auto" and plain):
                found, loss, aux = _by_autograd(self, leaves, spec, params, batch)
                grads = tree.unflatten(spec, found, params)
            else:
                grads, loss, aux = _by_func(self, params, batch)
        return grads, (loss, aux) if self.has_aux else loss

    def evaluate(self, loss_fn: Loss, params: Params, batch: tuple[object, ...]) -> tuple[Tensor, tuple[Tensor, Aux]]:
        """Evaluates the loss and checks what it returns; returns the tensor to differentiate, and `(loss, aux)`."""
        answer = loss_fn(params, *batch)
        if self.has_aux and not (isinstance(answer, tuple) and len(answer) == 2):
            got = type(answer).__name__
            raise TypeError(f"grad_and_value: with `has_aux` `loss_fn` must return `(loss, aux)`, got {got}.")
        loss, aux = answer if self.has_aux else (answer, ())
        if self.has_aux:
            checks.tensors("grad_and_value", "aux", aux)
        if not isinstance(loss, Tensor) or loss.ndim or loss.is_complex():
            got = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            hint = "" if self.has_aux or not isinstance(loss, tuple) else " If it returns `(loss, aux)`, set `has_aux`."
            raise TypeError(f"grad_and_value: the loss must be a real tensor of shape (), got {got}.{hint}")
        return loss if self.factor is None else loss * self.factor, (loss, aux)


def _in_inference_mode(leaves: Sequence[Tensor]) -> bool:
    """Tells whether plain autograd records nothing: in inference mode, and for tensors that were made in it."""
    return torch.is_inference_mode_enabled() or any(map(Tensor.is_inference, leaves))


def _by_func(fn: GradAndValue, params: P, batch: tuple[object, ...]) -> tuple[P, Tensor, Aux]:
    if not tree.flatten(params)[0]:
        return params, *fn.evaluate(fn.loss_fn, params, batch)[1]
    differentiate = torch.func.grad(lambda params, *batch: fn.evaluate(fn.loss_fn, params, batch), has_aux=True)
    since = graphs.sequence_number()
    grads, (loss, aux) = differentiate(params, *batch)
    leaves, spec = tree.flatten(grads)
    if any(g.layout is not torch.strided for g in leaves):
        grads = tree.unflatten(spec, _dense(leaves, leaves), params)
    return graphs.detach_values((grads, loss, aux), params, since)


Answer = tuple[Sequence[Tensor], Tensor, Aux]
"""The gradients of the leaves, the loss and aux."""


def _by_autograd(
    fn: GradAndValue, leaves: list[Tensor], spec: optree.PyTreeSpec, params: Params, batch: tuple[object, ...]
) -> Answer:
    given = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (*leaves, *batch))
    if not (given or fn._needs_graph):
        answer = _without_graph(fn, leaves, spec, params, batch)
        if answer is not None:
            return answer
        fn._needs_graph = True
    return _with_graph(fn, leaves, spec, params, batch, given)


def _without_graph(
    fn: GradAndValue, leaves: list[Tensor], spec: optree.PyTreeSpec, params: Params, batch: tuple[object, ...]
) -> Answer | None:
    """Returns an answer without a graph, or `None` if the loss captures something that must be differentiated."""
    searches = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    captures_are_values = frames.captures_are_values()
    with torch.enable_grad(), frames.in_loss(), _loss_in_force(fn.loss_fn, False) as loss_fn:
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        since = graphs.sequence_number()
        target, (loss, aux) = fn.evaluate(loss_fn, tree.unflatten(spec, inputs, params), batch)
        grads = _grads(target, inputs)
        tracked = _tracked(target, aux)
        more = searches and (len(tracked) > 1 or graphs.count_leaves(target) != sum(g is not None for g in grads))
        if more and graphs.differentiable(tracked, inputs, since, False, captures_are_values):
            return None
    return _dense(grads, leaves), loss.detach(), optree.tree_map(_detached, aux) if fn.has_aux else aux


def _with_graph(
    fn: GradAndValue,
    leaves: list[Tensor],
    spec: optree.PyTreeSpec,
    params: Params,
    batch: tuple[object, ...],
    given: bool,
) -> Answer:
    """Returns an answer that has a graph if an argument (`given`) or a tensor that the loss captures requires grad."""
    searches = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    captures_are_values = frames.captures_are_values()
    with torch.enable_grad(), frames.in_loss(), _loss_in_force(fn.loss_fn, True) as loss_fn:
        inputs = [leaf.view_as(leaf) if leaf.requires_grad else graphs.inner_leaf(leaf) for leaf in leaves]
        since = graphs.sequence_number()
        target, (loss, aux) = fn.evaluate(loss_fn, tree.unflatten(spec, inputs, params), batch)
        differentiable = given
        if searches:
            tracked = _tracked(target, aux)
            differentiable = graphs.differentiable(tracked, inputs, since, given, captures_are_values)
        grads = _grads(target, inputs, differentiable)
    if not differentiable:
        loss, aux = loss.detach(), optree.tree_map(_detached, aux)
    return _dense(grads, leaves), loss, aux


def _grads(target: Tensor, inputs: list[Tensor], create_graph: bool = False) -> Sequence[Tensor | None]:
    if not (inputs and target.requires_grad):
        return [None] * len(inputs)
    if type(target) is not Tensor or torch.compiler.is_compiling():
        return torch.autograd.grad(target, inputs, create_graph=create_graph, allow_unused=True)
    # `torch.autograd.grad` without its checks, which take a tenth of the time of a small network's backward pass.
    found: tuple[Tensor | None, ...] = _engine_run_backward(
        (target,), (torch.ones_like(target),), create_graph, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return found


def _dense(grads: Sequence[Tensor | None], leaves: list[Tensor]) -> list[Tensor]:
    pairs = zip(grads, leaves, strict=True)
    return [torch.zeros_like(x) if g is None else kernels.dense(g) for g, x in pairs]


def _tracked(target: Tensor, aux: Aux) -> list[Tensor]:
    """Returns the loss, and the leaves of aux that require grad."""
    return [target, *(x for x in optree.tree_leaves(aux) if x.requires_grad)]


def _detached(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _loss_in_force(loss_fn: Loss, differentiated: bool) -> contextlib.AbstractContextManager[Loss]:
    return loss_fn.in_force(differentiated=differentiated) if _scoped(loss_fn) else contextlib.nullcontext(loss_fn)


def _scoped(loss_fn: Loss) -> TypeGuard[ScopedLoss]:
    return hasattr(loss_fn, "in_force")  # `isinstance` with a Protocol takes 6 microseconds at each evaluation
