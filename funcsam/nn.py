"""Modules to pure functions and back.

    params, buffers = fs.nn.split(model)
    loss_fn = fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y))
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True)
    state = tx.init(params)
    for x, y in batches:
        params, state, (loss, buffers) = tx.step(params, grads_fn, state, buffers, x, y)
    fs.nn.load(model, params, buffers)

Buffers go in with the batch and come out as `aux`, so that running statistics are those of the pass at the params:
probes leave no trace in them, whatever the type of the module that writes them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from funcsam import checks, levels, tree

M = TypeVar("M", bound=nn.Module)
Named = dict[str, Tensor]
Loss = Callable[..., Any]
"""`loss(model, *batch)` returns the loss of a module, a tensor of shape (), or with `has_aux` `(loss, aux)`."""


def _module(where: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: `model` must be a torch.nn.Module, got {type(model).__name__}.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"{where}: `model` must be initialised, got an uninitialised tensor at {name}. "
                "Run one batch through the model first."
            )


def split(model: nn.Module) -> tuple[Named, Named]:
    """Splits a module into what is trained and what is not, by name.

    A tensor that has several names (tied weights, shared submodules) is listed under the first. The trees are copies:
    the module does not see what becomes of them.

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
    _module("split", model)
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
    _module("load", model)
    own = dict(_tensors(model))
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


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


class _Place(NamedTuple):
    """Where a module keeps a tensor: under a name of `_Loss`, which is a key of a dict of one of its modules."""

    path: str
    store: dict[str, Any]
    key: str


class _Loss(nn.Module):
    """A module and what is made of it, as one module, so that the loss is computed while the tensors are in place."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Any) -> Any:
        return self.loss(self.model, *batch)


class _NoBatchNorm(TorchFunctionMode):
    """Refuses what torch gets wrong: its batching rule of batch normalisation loses a term of the second derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm):
            raise RuntimeError(
                "loss_fn: batch normalisation must not be differentiated through `vmap`, got a hyper-gradient of "
                "vectorised steps, which torch computes wrongly. Use `chunk_size=1`, or `vmap` the hyper-gradient."
            )
        return func(*args, **(kwargs or {}))


class ModuleLoss:
    """What `loss_fn` returns."""

    def __init__(self, model: nn.Module, loss: Loss, has_aux: bool) -> None:
        self.model, self.loss, self.has_aux = model, loss, has_aux
        self._whole = _Loss(model, loss)
        self._names = {name for name, _ in model.named_buffers()}
        self._places = _places(model)

    def __call__(self, params: Named, buffers: Named, *batch: Any) -> tuple[Tensor, Any]:
        """Returns `(loss, buffers)`, or with `has_aux` `(loss, (buffers, aux))`; the buffers are new ones."""
        if not torch.compiler.is_compiling():
            with self.held(again=False) as evaluate:
                return evaluate(params, buffers, *batch)
        values = params | self._fresh(params, buffers, batch)
        places = {place.path: value for name, value in values.items() for place in self._places[name]}
        answer = torch.func.functional_call(self._whole, places, batch, tie_weights=False)
        return self._answer(answer, {name: places[self._places[name][0].path] for name in buffers})

    @contextlib.contextmanager
    def held(self, again: bool = True) -> Iterator[Callable[..., tuple[Tensor, Any]]]:
        """Gives the same function for code that is not compiled, and leaves the tensors in the module until the end.

        Args:
            again: Whether parts of the module may run again before that, as activation checkpointing does in the
                backward pass: with the values that the forward pass had, and without a second trace in the buffers.
        """
        before: list[tuple[_Place, Any]] = []

        def put(values: Mapping[str, Tensor]) -> None:
            for name, value in values.items():
                for place in self._places[name]:
                    before.append((place, place.store[place.key]))
                    place.store[place.key] = value

        def evaluate(params: Named, buffers: Named, *batch: Any) -> tuple[Tensor, Any]:
            fresh = self._fresh(params, buffers, batch)
            put(params)
            put(fresh)
            with _NoBatchNorm() if levels.differentiates_vmap(params.values()) else contextlib.nullcontext():
                answer = self.loss(self.model, *batch)
            first = {name: self._places[name][0] for name in buffers}
            after = {name: place.store[place.key] for name, place in first.items()}
            if again:
                put({name: buffers[name].clone() for name in self._names})
            return self._answer(answer, after)

        try:
            yield evaluate
        finally:
            for place, value in reversed(before):
                place.store[place.key] = value

    def _fresh(self, params: Named, buffers: Named, batch: tuple[Any, ...]) -> Named:
        """Returns copies of the buffers that the module may write to."""
        for what, given in (("params", params), ("buffers", buffers)):
            if not isinstance(given, dict):
                raise TypeError(
                    f"loss_fn: `{what}` must be a dict of tensors by name, got {type(given).__name__}. "
                    "The arguments are (params, buffers, *batch); `split` makes the first two."
                )
            if not given.keys() <= self._places.keys():
                name = next(name for name in given if name not in self._places)
                raise ValueError(f"loss_fn: `{what}` must hold names of the module, got {name}.")
        if not self._names <= buffers.keys():
            name = next(name for name in sorted(self._names) if name not in buffers)
            raise ValueError(f"loss_fn: `buffers` must hold every buffer of the module, got none for {name}.")
        if not self._names or not levels.vectorizing():
            return {name: buffer.clone() for name, buffer in buffers.items()}
        always = _always(params, batch)
        return {
            name: torch.where(always, buffer, buffer) if name in self._names else buffer.clone()
            for name, buffer in buffers.items()
        }

    def _answer(self, answer: Any, buffers: Named) -> tuple[Tensor, Any]:
        if not self.has_aux:
            return answer, buffers
        if not (isinstance(answer, tuple) and len(answer) == 2):
            got = type(answer).__name__
            raise TypeError(f"loss_fn: with `has_aux` `loss` must return `(loss, aux)`, got {got}.")
        return answer[0], (buffers, answer[1])


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """Lists for each name where the modules keep that tensor: in several places if it is tied."""
    names = {id(tensor): name for name, tensor in _tensors(model)}
    places: dict[str, list[_Place]] = {name: [] for name in names.values()}
    for prefix, module in model.named_modules(prefix="model"):
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    places[names[id(tensor)]].append(_Place(f"{prefix}.{key}", store, key))
    return places


def _always(params: Named, batch: tuple[Any, ...]) -> Tensor:
    """Returns True, batched as the inputs are: under `vmap` what a module writes to must be batched as they are."""
    inputs = [leaf for leaf in tree.flatten((params, batch))[0] if isinstance(leaf, Tensor)]
    nothing = [leaf.reshape(-1)[:0].ne(0).any() for leaf in inputs]
    found = torch.zeros((), dtype=torch.bool, device=nothing[0].device if nothing else None)
    for each in nothing:
        found = found | each.to(found.device)
    return ~found


def loss_fn(model: nn.Module, loss: Loss, has_aux: bool = False) -> ModuleLoss:
    """Makes the loss of a module a pure function, `loss_fn(params, buffers, *batch) -> (loss, buffers)`.

    Nothing in the module changes: it is evaluated with the given tensors in the place of its own, and what it writes to
    its buffers (running statistics of any kind) goes to copies that are returned. It is evaluated in the mode it is in,
    `model.train()` or `model.eval()`. What is in neither tree is taken from the module itself, and not trained: a large
    frozen part that should not be copied at every evaluation can be left out of `buffers`.

    Args:
        model: The module. One on the device `meta` will do if both trees are complete.
        loss: `loss(model, *batch)` returns the loss, e.g. `lambda model, x, y: F.cross_entropy(model(x), y)`. Autocast
            and activation checkpointing go in here.
        has_aux: Whether `loss` returns `(loss, aux)`; the function then returns `(loss, (buffers, aux))`.

    Returns:
        A function for `grad_and_value(..., has_aux=True)`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the module is not initialised yet; on a call, if a name is unknown or a buffer is missing.

    >>> model = nn.BatchNorm1d(1)
    >>> params, buffers = split(model)
    >>> loss, new = loss_fn(model, lambda model, x: model(x).sum())(params, buffers, torch.tensor([[0.0], [2.0]]))
    >>> new["running_mean"], buffers["running_mean"]
    (tensor([0.1000]), tensor([0.]))
    """
    _module("loss_fn", model)
    checks.function("loss_fn", loss=loss)
    return ModuleLoss(model, loss, has_aux)


def predict(model: nn.Module, params: Named, buffers: Named, *inputs: Any) -> Any:
    """Returns the output of a module in evaluation mode, with the given tensors in the place of its own.

    Dropout is off and normalisation uses its running statistics; the mode the module is in, its tensors and the given
    ones stay as they are.

    Args:
        model: The module.
        params: Tensors by name, as in `split`.
        buffers: Likewise.
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
