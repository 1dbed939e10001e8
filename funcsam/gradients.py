"""From a loss to a grads_fn."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import optree
import torch
from torch import Tensor

from funcsam import checks, levels, tree

P = TypeVar("P")
Loss = Callable[..., Any]
Backend = Literal["auto", "func", "autograd"]


def grad_and_value(loss_fn: Loss, has_aux: bool = False, backend: Backend = "auto") -> "GradAndValue":
    """Returns the function that computes gradients and value of a loss: the contract of `torch.func.grad_and_value`.

    Args:
        loss_fn: `loss_fn(params, *batch)` returns the loss, a real tensor of shape (), or `(loss, aux)`.
        has_aux: Whether `loss_fn` returns `(loss, aux)`; `aux` is a pytree of tensors.
        backend: `"func"` is `torch.func.grad_and_value`: it composes with `vmap`, `torch.func.grad` and
            `torch.compile`. `"autograd"` is `torch.autograd.grad` on detached leaves: less overhead in eager code on
            small models, activation checkpointing, DTensors. `"auto"` takes autograd in plain eager code and func
            elsewhere.

    Returns:
        `grads_fn(params, *batch) -> (grads, loss)`, or `(grads, (loss, aux))` with `has_aux`. A leaf that the loss does
        not depend on has gradient zero.

    Raises:
        ValueError: If `backend` is unknown.
        TypeError: On a call, if `loss_fn` does not return what `has_aux` says, or `aux` holds anything but tensors.

    >>> grads_fn = grad_and_value(lambda params, x: (params["w"] * x) ** 2)
    >>> grads_fn({"w": torch.tensor(3.0)}, torch.tensor(2.0))
    ({'w': tensor(24.)}, tensor(36.))
    """
    checks.function("grad_and_value", loss_fn=loss_fn)
    if backend not in ("auto", "func", "autograd"):
        raise ValueError(f'grad_and_value: `backend` must be "auto", "func" or "autograd", got {backend!r}.')
    return GradAndValue(loss_fn, has_aux, backend)


class GradAndValue:
    """What `grad_and_value` returns.

    Attributes:
        exact: That an answer is `(grads, aux)` with dense gradients in the structure of the params: no need to look.
    """

    exact = True

    def __init__(self, loss_fn: Loss, has_aux: bool, backend: Backend, factor: Tensor | None = None) -> None:
        self.loss_fn, self.has_aux, self.backend, self.factor = loss_fn, has_aux, backend, factor

    def scaled(self, factor: Tensor) -> "GradAndValue":
        """Returns the function whose gradients are those of `factor` times the loss; the value stays the loss."""
        return GradAndValue(self.loss_fn, self.has_aux, self.backend, factor)

    def __call__(self, params: P, *batch: Any) -> tuple[P, Any]:
        """Returns `(grads, loss)`, or `(grads, (loss, aux))` with `has_aux`."""
        if self.backend == "autograd" or (self.backend == "auto" and levels.eager()):
            grads, loss, aux = _autograd(self, params, batch)
        else:
            grads, loss, aux = _func(self, params, batch)
        return grads, (loss, aux) if self.has_aux else loss

    def evaluate(self, loss_fn: Loss, params: Any, batch: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor, Any]]:
        """Returns what is differentiated, and with it the loss and aux; checks what the user's function returned."""
        answer = loss_fn(params, *batch)
        if self.has_aux and not (isinstance(answer, tuple) and len(answer) == 2):
            got = type(answer).__name__
            raise TypeError(f"grad_and_value: with `has_aux` `loss_fn` must return `(loss, aux)`, got {got}.")
        loss, aux = answer if self.has_aux else (answer, ())
        checks.tensors("grad_and_value", "aux", aux)
        if not isinstance(loss, Tensor) or loss.ndim or loss.is_complex():
            got = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            hint = "" if self.has_aux or not isinstance(loss, tuple) else " If it returns `(loss, aux)`, set `has_aux`."
            raise TypeError(f"grad_and_value: the loss must be a real tensor of shape (), got {got}.{hint}")
        return loss if self.factor is None else loss * self.factor, (loss, aux)


def _func(fn: GradAndValue, params: P, batch: tuple[Any, ...]) -> tuple[P, Tensor, Any]:
    if not tree.flatten(params)[0]:
        return params, *fn.evaluate(fn.loss_fn, params, batch)[1]
    differentiate = torch.func.grad(lambda params, *batch: fn.evaluate(fn.loss_fn, params, batch), has_aux=True)
    grads, (loss, aux) = differentiate(params, *batch)
    leaves, spec = tree.flatten(grads)
    if any(g.layout is not torch.strided for g in leaves):
        grads = tree.unflatten(spec, map(_dense, leaves), params)
    return grads, loss, aux


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout is torch.strided else grad.to_dense()


def _autograd(fn: GradAndValue, params: P, batch: tuple[Any, ...]) -> tuple[P, Tensor, Any]:
    if not torch.compiler.is_compiling() and not levels.eager():
        raise RuntimeError(
            'grad_and_value: the "autograd" backend does not work under `torch.func` transforms. '
            'Set `backend` to "auto" or "func".'
        )
    leaves, spec = tree.flatten(params)
    with torch.enable_grad(), getattr(fn.loss_fn, "held", lambda: nullcontext(fn.loss_fn))() as loss_fn:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        target, (loss, aux) = fn.evaluate(loss_fn, tree.unflatten(spec, leaves, params), batch)
        if target.requires_grad and leaves:
            grads = tuple(map(_dense, torch.autograd.grad(target, leaves, materialize_grads=True)))
        else:
            grads = tuple(torch.zeros_like(leaf) for leaf in leaves)
    aux = optree.tree_map(Tensor.detach, aux)
    return tree.unflatten(spec, grads, params), loss.detach(), aux
