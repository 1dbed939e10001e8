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
import operator
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from funcsam import checks, levels, tree

_C: Any = torch._C
_NOTHING = contextlib.nullcontext()

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
    the module does not see what becomes of them. To train LoRA factors, freeze the base (`base.requires_grad_(False)`)
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


class _Layout:
    """Which tensors a module has and where it keeps them.

    Attributes:
        places: The places of each name: several if the tensor is tied.
        buffers: The names of the buffers.
        ndims: The number of axes of each tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        names = {id(tensor): name for name, tensor in _tensors(model)}
        self.places: dict[str, list[_Place]] = {name: [] for name in names.values()}
        self.buffers = {name for name, _ in model.named_buffers()}
        self.ndims = {name: tensor.ndim for name, tensor in _tensors(model)}
        for prefix, module in model.named_modules(prefix="model"):
            for store in (module._parameters, module._buffers):
                for key, tensor in store.items():
                    if tensor is not None:
                        self.places[names[id(tensor)]].append(_Place(f"{prefix}.{key}", store, key))


class _Contents:
    """What the modules of a model hold: tells, for a small part of a forward pass, whether any of it was changed."""

    def __init__(self, model: nn.Module) -> None:
        # A scripted module keeps nothing in dicts, and stays as it is.
        modules = [each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)]
        stores: list[dict[str, Any]] = [
            store for each in modules for store in (each._modules, each._parameters, each._buffers)
        ]
        self.full, self.empty = [store for store in stores if store], [store for store in stores if not store]
        self.sizes, self.keys, self.values = self._read()

    def _read(self) -> tuple[list[int], list[str], list[Any]]:
        values = chain.from_iterable(map(dict.values, self.full))
        return list(map(len, self.full)), list(chain.from_iterable(self.full)), list(values)

    def changed(self) -> bool:
        sizes, keys, values = self._read()
        same = sizes == self.sizes and keys == self.keys and all(map(operator.is_, values, self.values))
        return not same or any(self.empty)


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


@contextlib.contextmanager
def _no_hooks(message: str) -> Iterator[None]:
    """Refuses saved-tensor hooks that are set inside; those around it stay: they run all of the evaluation again."""
    autograd: Any = torch._C._autograd
    autograd._saved_tensors_hooks_disable(message, False)
    try:
        yield
    finally:
        autograd._saved_tensors_hooks_enable()


def _hooks_would_differ(params: Named, buffers: Named, batch: tuple[Any, ...]) -> bool:
    """Tells whether a graph is recorded here and hooks are allowed; `torch.func.grad` refuses them itself."""
    if not torch.is_grad_enabled() or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return False
    given = (*params.values(), *buffers.values(), *tree.flatten(batch)[0])
    return any(isinstance(leaf, Tensor) and _innermost(leaf)[0].requires_grad for leaf in given)


class ModuleLoss:
    """What `loss_fn` returns."""

    def __init__(self, model: nn.Module, loss: Loss, has_aux: bool) -> None:
        self.model, self.loss, self.has_aux = model, loss, has_aux
        self._whole = _Loss(model, loss)
        self._contents, self._layout = _Contents(model), _Layout(model)

    def __call__(self, params: Named, buffers: Named, *batch: Any) -> tuple[Tensor, Any]:
        """Returns `(loss, buffers)`, or with `has_aux` `(loss, (buffers, aux))`.

        What the module wrote to comes back as a new tensor, what it did not as the tensor that was given.
        """
        if not torch.compiler.is_compiling():
            with self.held(again=False) as evaluate:
                return evaluate(params, buffers, *batch)
        layout = _Layout(self.model)
        _check(layout, params, buffers)
        values = params | _copies(layout, params, buffers, batch)
        own = dict(self.model.named_parameters())
        values |= {name: own[name].detach() for name in layout.places if name not in values}
        places = {place.path: value for name, value in values.items() for place in layout.places[name]}
        with levels.uncached() if parametrize._cache_enabled else contextlib.nullcontext():
            answer = torch.func.functional_call(self._whole, places, batch, tie_weights=False)
        return self._answer(answer, {name: places[layout.places[name][0].path] for name in buffers})

    @contextlib.contextmanager
    def held(self, again: bool = True, differentiated: bool = False) -> Iterator[Callable[..., tuple[Tensor, Any]]]:
        """Gives the same function for code that is not compiled, and leaves the tensors in the module until the end.

        Args:
            again: Whether parts of the module may run again before that, as activation checkpointing does in the
                backward pass: with the values that the forward pass had, and without a second trace in the buffers.
            differentiated: Whether the backward pass is itself differentiated: what runs again for that comes too late.

        Raises:
            RuntimeError: On a call, if parts of the module would run again after the end.
        """
        before: list[tuple[_Place, Any]] = []
        layout = self._now()

        def put(values: Mapping[str, Tensor]) -> None:
            for name, value in values.items():
                for place in layout.places[name]:
                    before.append((place, place.store[place.key]))
                    place.store[place.key] = value

        def evaluate(params: Named, buffers: Named, *batch: Any) -> tuple[Tensor, Any]:
            eager = levels.eager()
            _check(layout, params, buffers)
            copies = _copies(layout, params, buffers, batch)
            marks = {} if eager else {name: _mark(copy) for name, copy in copies.items()}
            put(params)
            put(copies)
            if len(params) + len(copies) < len(layout.places):
                rest = layout.places.keys() - params.keys() - copies.keys()
                put({name: first.store[first.key].detach() for name in rest for first in layout.places[name][:1]})
            late = _DIFFERENTIATED if differentiated else None if again else _INSIDE
            refuse = late and _hooks_would_differ(params, buffers, batch)
            with (
                _NoBatchNorm() if not eager and levels.differentiates_vmap(params.values()) else _NOTHING,
                _no_hooks(late) if late and refuse else _NOTHING,
            ):
                answer = self.loss(self.model, *batch)
            after = {}
            for name, copy in copies.items():
                first = layout.places[name][0]
                value = first.store[first.key]
                own = copy if eager else _innermost(copy)[0]
                same = value is copy and _is_lazy(own) and _mark(copy) == (marks.get(name) or _mark(buffers[name]))
                after[name] = buffers[name] if same else value
            if again and after:
                put({name: _copy(buffers[name]) for name, value in after.items() if value is not buffers[name]})
            return self._answer(answer, after)

        try:
            with levels.uncached() if parametrize._cache_enabled else _NOTHING:
                yield evaluate
        finally:
            for place, value in reversed(before):
                place.store[place.key] = value

    def _now(self) -> _Layout:
        """Returns the layout of the module as it is now: parts of it may have been replaced since the last call."""
        if self._contents.changed():
            self._contents, self._layout = _Contents(self.model), _Layout(self.model)
        return self._layout

    def _answer(self, answer: Any, buffers: Named) -> tuple[Tensor, Any]:
        if not self.has_aux:
            return answer, buffers
        if not (isinstance(answer, tuple) and len(answer) == 2):
            got = type(answer).__name__
            raise TypeError(f"loss_fn: with `has_aux` `loss` must return `(loss, aux)`, got {got}.")
        return answer[0], (buffers, answer[1])


_INSIDE = (
    "loss_fn: activation checkpointing must be differentiated by `grad_and_value(loss_fn, has_aux=True)`, "
    "got a backward pass that starts when the tensors have left the module. "
    "Give `loss_fn` itself to `grad_and_value`, not a function that calls it."
)
_DIFFERENTIATED = (
    "loss_fn: activation checkpointing must not be differentiated twice, got a backward pass that is differentiated. "
    "Leave checkpointing out of `loss` and of the module."
)


def _check(layout: _Layout, params: Named, buffers: Named) -> None:
    """Raises unless the trees fit the module."""
    trees = (("params", params), ("buffers", buffers))
    for what, given in trees:
        if not isinstance(given, dict):
            raise TypeError(
                f"loss_fn: `{what}` must be a dict of tensors by name, got {type(given).__name__}. "
                "The arguments are (params, buffers, *batch); `split` makes the first two."
            )
        if any(name not in layout.ndims for name in given):
            name = next(name for name in given if name not in layout.ndims)
            raise ValueError(
                f"loss_fn: `{what}` must hold names of the module, got {name}. "
                "If the module has changed, `split` it again."
            )
    if not layout.buffers <= buffers.keys():
        name = next(name for name in sorted(layout.buffers) if name not in buffers)
        raise ValueError(
            f"loss_fn: `buffers` must hold every buffer of the module, got none for {name}. "
            "If the module has changed, `split` it again."
        )
    if both := params.keys() & buffers.keys():
        raise ValueError(f"loss_fn: `params` and `buffers` must not share a name, got {min(both)} in both.")
    for what, given in trees:
        for name, tensor in given.items():
            if tensor.ndim > layout.ndims[name]:
                _members(layout, what, name, tensor)


def _members(layout: _Layout, what: str, name: str, tensor: Tensor) -> None:
    """Raises if a tensor has one more axis than that of the module: those of all members of an ensemble."""
    place = layout.places[name][0]
    own = place.store[place.key]
    if tensor.shape[1:] == own.shape:
        raise ValueError(
            f"loss_fn: `{what}` must have the shapes of the module, "
            f"got {tuple(tensor.shape)} for {tuple(own.shape)} at {name}. If these are those of all members of an "
            "ensemble, which shared buffers that are written to become, give them `in_dims` 0; "
            "if the module has changed, `split` it again."
        )


def _copies(layout: _Layout, params: Named, buffers: Named, batch: tuple[Any, ...]) -> Named:
    """Returns copies of the buffers and frozen parameters, which the module may write to."""
    if levels.eager():
        lazy = {name: _lazy(buffer, buffer) for name, buffer in buffers.items()}
        return {name: buffers[name].clone() if copy is None else copy for name, copy in lazy.items()}
    if not layout.buffers or not levels.vectorizing():
        return {name: _copy(buffer) for name, buffer in buffers.items()}
    always = _always(params, buffers, batch)
    return {
        name: _marked(torch.where(always, buffer, buffer)) if name in layout.buffers else _copy(buffer)
        for name, buffer in buffers.items()
    }


def _copy(x: Tensor) -> Tensor:
    """Returns a copy that takes no memory until it is written to, where that is safe."""
    if torch.compiler.is_compiling():
        return x.clone()
    own, batched = (x, False) if levels.eager() else _innermost(x)
    if batched:  # the rule of `vmap` for lazy copies is a loop
        return _marked(x.clone())
    lazy = _lazy(x, own)
    return x.clone() if lazy is None else lazy


def _marked(x: Tensor) -> Tensor:
    """Returns a tensor whose first write will show, as it does for what `_copy` returns."""
    if not torch.compiler.is_compiling():
        own = _innermost(x)[0]
        _lazy(own, own)
    return x


def _lazy(x: Tensor, own: Tensor) -> Tensor | None:
    """Returns a copy that takes memory with the first write, or `None` where that is not safe.

    Args:
        x: A tensor that `vmap` does not batch.
        own: The tensor inside all `torch.func` levels.
    """
    # Only on CPUs: kernels elsewhere (`_foreach` ones on CUDA) write through pointers that they got for reading. Only
    # all of the memory: the first write copies it all.
    try:
        if own.is_cpu and type(own) in (Tensor, nn.Parameter) and own.untyped_storage().nbytes() == own.nbytes:
            return torch._lazy_clone(x)
    except RuntimeError:  # the memory belongs to NumPy or another process, or it is not one piece (sparse)
        pass
    return None


def _innermost(x: Tensor) -> tuple[Tensor, bool]:
    """Returns the tensor inside all `torch.func` levels, and whether one of them is `vmap`."""
    batched = False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        batched |= torch._C._functorch.is_batchedtensor(x)
        x = torch._C._functorch.get_unwrapped(x)
    return x, batched


def _is_lazy(x: Tensor) -> bool:
    """Tells whether a copy has not been written to, also through `.data`; if not, that is not known."""
    return x.is_cpu and _C._is_cow_tensor(x)


def _mark(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...]] | None:
    """Returns what may change without a write: where the memory is and how it is laid out."""
    own, _ = _innermost(x)
    return (_C._data_address(own), own.shape, own.stride()) if _is_lazy(own) else None


def _always(params: Named, buffers: Named, batch: tuple[Any, ...]) -> Tensor:
    """Returns True, batched as the inputs are: under `vmap` what a module writes to must be batched as they are."""
    inputs = [leaf for leaf in tree.flatten((params, batch))[0] if isinstance(leaf, Tensor)]
    nothing = [leaf.reshape(-1)[:0].ne(0).any() for leaf in inputs]
    device = (nothing or list(buffers.values()))[0].device
    found = torch.zeros((), dtype=torch.bool, device=device)
    for each in nothing:
        found = found | each.to(found.device)
    return ~found


def loss_fn(model: nn.Module, loss: Loss, has_aux: bool = False) -> ModuleLoss:
    """Makes the loss of a module a pure function, `loss_fn(params, buffers, *batch) -> (loss, buffers)`.

    Nothing in the module changes: it is evaluated with the given tensors in the place of its own, and what it writes to
    its buffers (running statistics of any kind) goes to copies that are returned. What it does not write to is returned
    as it was given, the same tensor. On devices other than the CPU and under `torch.compile` all of `buffers` is copied
    at every evaluation. What is in neither tree is taken from the module itself as a value, and not trained: a large
    frozen part that should not be copied there can be left out of `buffers`.

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
