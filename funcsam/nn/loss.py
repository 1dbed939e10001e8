"""The loss of a module as a pure function."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from funcsam.core import checks, levels, tree
from funcsam.core.types import Aux, Tree
from funcsam.nn.copies import copy_all, is_lazy, lazy_copy, mark
from funcsam.nn.layout import Contents, Layout, Named, Place, check, initialised

_NOTHING = contextlib.nullcontext()

ModelLoss: TypeAlias = Callable[..., Tensor | tuple[Tensor, Aux]]
"""`loss(model, *batch)` returns the loss of a module, a tensor of shape (), or with `has_aux` `(loss, aux)`."""


class _ModelAndLoss(nn.Module):
    """Wraps a model and its loss as one module, so that the loss is computed while the tensors are in place."""

    def __init__(self, model: nn.Module, loss: ModelLoss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: object) -> Tensor | tuple[Tensor, Aux]:
        return self.loss(self.model, *batch)


class _NoBatchNorm(TorchFunctionMode):
    """Refuses what torch gets wrong: its batching rule of batch normalisation loses a term of the second derivative."""

    def __torch_function__(
        self,
        func: Callable[..., Tree],
        types: object,
        args: Sequence[Tree] = (),
        kwargs: Mapping[str, Tree] | None = None,
    ) -> Tree:
        if func in (F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm):
            raise RuntimeError(
                "loss_fn: batch normalisation must not be differentiated through `vmap`, got a hyper-gradient of "
                "vectorised steps, which torch computes wrongly. Use `chunk_size=1`, or `vmap` the hyper-gradient."
            )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _no_hooks(message: str) -> Iterator[None]:
    """Refuses saved-tensor hooks that are set inside; those around it stay: they run all of the evaluation again."""
    autograd = torch._C._autograd
    autograd._saved_tensors_hooks_disable(message, False)
    try:
        yield
    finally:
        autograd._saved_tensors_hooks_enable()


def _hooks_would_differ(params: Named, buffers: Named, batch: tuple[object, ...]) -> bool:
    """Tells whether a graph is recorded here and hooks are allowed; `torch.func.grad` refuses them itself."""
    if not torch.is_grad_enabled() or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return False
    given = (*params.values(), *buffers.values(), *tree.flatten(batch)[0])
    return any(isinstance(leaf, Tensor) and levels.unwrapped(leaf).requires_grad for leaf in given)


class ModuleLoss:
    """What `loss_fn` returns."""

    def __init__(self, model: nn.Module, loss: ModelLoss, has_aux: bool) -> None:
        self.model, self.loss, self.has_aux = model, loss, has_aux
        self._model_and_loss = _ModelAndLoss(model, loss)
        self._contents, self._layout = Contents(model), Layout(model)

    def __call__(self, params: Named, buffers: Named, *batch: object) -> tuple[Tensor, Aux]:
        """Returns `(loss, buffers)`, or with `has_aux` `(loss, (buffers, aux))`.

        What the module wrote to comes back as a new tensor, what it did not as the tensor that was given.
        """
        if not torch.compiler.is_compiling():
            with self.in_force(again=False) as evaluate:
                return evaluate(params, buffers, *batch)
        layout = Layout(self.model)
        check(layout, params, buffers)
        values = params | copy_all(layout, params, buffers, batch)
        own = dict(self.model.named_parameters())
        values |= {name: own[name].detach() for name in layout.places if name not in values}
        places = {place.path: value for name, value in values.items() for place in layout.places[name]}
        with levels.uncached() if parametrize._cache_enabled else contextlib.nullcontext():
            answer = torch.func.functional_call(self._model_and_loss, places, batch, tie_weights=False)
        return self._answer(answer, {name: places[layout.places[name][0].path] for name in buffers})

    @contextlib.contextmanager
    def in_force(self, again: bool = True, differentiated: bool = False) -> Iterator[Callable[..., tuple[Tensor, Aux]]]:
        """Gives the same function for code that is not compiled, and leaves the tensors in the module until the end.

        Args:
            again: Whether parts of the module may run again before that, as activation checkpointing does in the
                backward pass: with the values that the forward pass had, and without a second trace in the buffers.
            differentiated: Whether the backward pass is itself differentiated: what runs again for that comes too late.

        Raises:
            RuntimeError: On a call, if parts of the module would run again after the end.
        """
        before: list[tuple[Place, Tree]] = []
        layout = self._current_layout()

        def set_tensors(values: Mapping[str, Tensor]) -> None:
            for name, value in values.items():
                for place in layout.places[name]:
                    before.append((place, place.store[place.key]))
                    place.store[place.key] = value

        def evaluate(params: Named, buffers: Named, *batch: object) -> tuple[Tensor, Aux]:
            eager = levels.eager()
            check(layout, params, buffers)
            copies = copy_all(layout, params, buffers, batch)
            marks = {} if eager else {name: mark(copy) for name, copy in copies.items()}
            set_tensors(params)
            set_tensors(copies)
            if len(params) + len(copies) < len(layout.places):
                rest = layout.places.keys() - params.keys() - copies.keys()
                firsts = [(name, first) for name in rest for first in layout.places[name][:1]]
                set_tensors({name: first.store[first.key].detach() for name, first in firsts})
            message = _TWICE if differentiated else None if again else _TOO_LATE
            refuse = message and _hooks_would_differ(params, buffers, batch)
            with (
                _NoBatchNorm() if not eager and levels.differentiates_vmap(params.values()) else _NOTHING,
                _no_hooks(message) if message and refuse else _NOTHING,
            ):
                answer = self.loss(self.model, *batch)
            after = {}
            for name, copy in copies.items():
                first = layout.places[name][0]
                value = first.store[first.key]
                own = copy if eager else levels.unwrapped(copy)
                same = value is copy and is_lazy(own) and mark(copy) == (marks.get(name) or mark(buffers[name]))
                after[name] = buffers[name] if same else value
            if again and after:
                written = (name for name, value in after.items() if value is not buffers[name])
                set_tensors({name: lazy_copy(buffers[name]) for name in written})
            return self._answer(answer, after)

        try:
            with levels.uncached() if parametrize._cache_enabled else _NOTHING:
                yield evaluate
        finally:
            for place, value in reversed(before):
                place.store[place.key] = value

    def _current_layout(self) -> Layout:
        """Returns the layout of the module as it is now: parts of it may have been replaced since the last call."""
        if self._contents.changed():
            self._contents, self._layout = Contents(self.model), Layout(self.model)
        return self._layout

    def _answer(self, answer: Tree, buffers: Named) -> tuple[Tensor, Aux]:
        if not self.has_aux:
            return answer, buffers
        if not (isinstance(answer, tuple) and len(answer) == 2):
            got = type(answer).__name__
            raise TypeError(f"loss_fn: with `has_aux` `loss` must return `(loss, aux)`, got {got}.")
        return answer[0], (buffers, answer[1])


_TOO_LATE = (
    "loss_fn: activation checkpointing must be differentiated by `grad_and_value(loss_fn, has_aux=True)`, "
    "got a backward pass that starts when the tensors have left the module. "
    "Give `loss_fn` itself to `grad_and_value`, not a function that calls it."
)
_TWICE = (
    "loss_fn: activation checkpointing must not be differentiated twice, got a backward pass that is differentiated. "
    "Leave checkpointing out of `loss` and of the module."
)


def loss_fn(model: nn.Module, loss: ModelLoss, has_aux: bool = False) -> ModuleLoss:
    """Makes the loss of a module a pure function, `loss_fn(params, buffers, *batch) -> (loss, buffers)`.

    Nothing in the module changes: it is evaluated with the given tensors in the place of its own, and what it writes to
    its buffers (running statistics of any kind) goes to copies that are returned. What it does not write to is returned
    as it was given, the same tensor. On devices other than the CPU and under `torch.compile` all of `buffers` is copied
    at every evaluation, and under `vmap` all but frozen parameters that the members share. What is in neither tree is
    taken from the module itself as a value, and not trained: a large frozen part that should not be copied there can be
    left out of `buffers`.

    The module is evaluated as it is at the call, with parts that were replaced since, and in the mode it is in,
    `model.train()` or `model.eval()`. Weights that are parametrised are computed anew, also within
    `parametrize.cached()`.

    Args:
        model: The module. One on the device `meta` will do if both trees are complete.
        loss: `loss(model, *batch)` returns the loss, e.g. `lambda model, x, y: F.cross_entropy(model(x), y)`. Autocast
            and activation checkpointing go in here; with checkpointing the function that is returned must itself be
            given to `grad_and_value`.
        has_aux: Whether `loss` returns `(loss, aux)`; the function then returns `(loss, (buffers, aux))`.

    Returns:
        A function for `grad_and_value(..., has_aux=True)`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the module is not initialised yet; on a call, if a name is unknown or in both trees, a buffer is
            missing, or a tensor has an axis for the members of an ensemble.
        RuntimeError: On a call, if activation checkpointing would run parts again without the given tensors.

    >>> from funcsam.nn import split
    >>> model = nn.BatchNorm1d(1)
    >>> params, buffers = split(model)
    >>> loss, new = loss_fn(model, lambda model, x: model(x).sum())(params, buffers, torch.tensor([[0.0], [2.0]]))
    >>> new["running_mean"], buffers["running_mean"]
    (tensor([0.1000]), tensor([0.]))
    """
    initialised("loss_fn", model)
    checks.function("loss_fn", loss=loss)
    return ModuleLoss(model, loss, has_aux)


def predict(model: nn.Module, params: Named, buffers: Named, *inputs: object) -> Tree:
    """Returns the output of a module in evaluation mode, with the given tensors in the place of its own.

    Dropout is off and normalisation uses its running statistics; the mode the module is in, its tensors and the given
    ones stay as they are.

    Args:
        model: The module.
        params: Tensors by name, as in `split`.
        buffers: Tensors by name, as in `split`.
        *inputs: What the module is called with.

    >>> predict(nn.Linear(1, 1, bias=False), {"weight": torch.tensor([[2.0]])}, {}, torch.tensor([3.0]))
    tensor([6.])
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        evaluate = loss_fn(model, lambda model, *inputs: model(*inputs))
        return evaluate(params, buffers, *inputs)[0]
    finally:
        for module in training:
            module.training = True
