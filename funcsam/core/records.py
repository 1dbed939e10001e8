"""Objects that record the call that made them: it is their `repr`, and they are copied and pickled by it."""

import copy
import functools
import inspect
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, ParamSpec, Self, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

from funcsam.core.types import Tree

Q = ParamSpec("Q")
M = TypeVar("M")
Record: TypeAlias = tuple[Callable[..., object], tuple[object, ...], dict[str, object]]
"""A factory, and the positional and keyword arguments that it was given."""


def public_module(module: str) -> str:
    """Returns the public module of what a private module defines; files name it, so private modules may move."""
    package, inside, *_ = *module.split("."), ""
    if package != "funcsam":
        return module
    return package if inside in ("", "core", "transforms", "family", "optimizers") else f"{package}.{inside}"


class Recorded:
    """An object that records the factory that made it, and its arguments. Without a factory, its class is recorded."""

    _record: Record
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        cls.__signature__ = inspect.signature(cls.__init__.__get__(object()))  # not that of `__new__`

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Records the call of the class."""
        instance = super().__new__(cls)
        instance._record = (cls, args, kwargs)
        return instance

    @property
    def _name(self) -> str:
        return self._record[0].__name__

    def __repr__(self) -> str:
        return _format_call(self._name, list(named_arguments(*self._record)))

    def __reduce__(self) -> tuple[object, ...]:
        for name, value in named_arguments(*self._record):
            for leaf in entries(value):
                _check_pickles(self._name, name, leaf)
        return _call, self._record

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        def copied(leaf: object) -> object:  # a process group cannot be copied, and a number need not be
            deep = isinstance(leaf, Tensor | Recorded) or callable(leaf)
            return copy.deepcopy(leaf, memo) if deep else leaf

        factory, *arguments = self._record
        record: Tree = tuple(arguments)
        instance: Self = _call(factory, *optree.tree_map(copied, record))
        return instance


def factory(make: Callable[Q, M]) -> Callable[Q, M]:
    """Records on the new object that a function returns the function and its arguments."""

    @functools.wraps(make)
    def recorded(*args: Q.args, **kwargs: Q.kwargs) -> M:
        instance = make(*args, **kwargs)
        record: Tree = instance  # a `Recorded`; a schedule is typed as the function that it is
        record._record = (recorded, args, kwargs)  # not bound to names yet: the compiler cannot do that
        return instance

    recorded.__module__ = public_module(make.__module__)
    return recorded


def _call(factory: Callable[..., Tree], args: tuple[object, ...], kwargs: dict[str, object]) -> Tree:
    return factory(*args, **kwargs)


def named_arguments(
    factory: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> Iterator[tuple[str, object]]:
    """Yields arguments with their names; those of `*rest` with the name `*rest`."""
    signature = inspect.signature(factory)
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"*{name}", each) for each in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def entries(x: object) -> list[object]:
    """Lists the entries of nested dicts, lists and tuples; of anything else, the object itself."""
    if isinstance(x, Mapping):
        x = list(x.values())
    elif not isinstance(x, list | tuple):
        return [x]
    return [entry for part in x for entry in entries(part)]


def equal(one: Recorded, other: Recorded) -> bool:
    """Tells whether two objects were made by the same factory from equal arguments."""
    return one._record[0] is other._record[0] and _equal(_all_arguments(one), _all_arguments(other))


def _all_arguments(instance: Recorded) -> list[object]:
    """Returns the arguments in the order of the signature, defaults included."""
    factory, args, kwargs = instance._record
    bound = inspect.signature(factory).bind(*args, **kwargs)
    bound.apply_defaults()
    return list(bound.arguments.values())


def _equal(x: object, y: object) -> bool:
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_equal, x, y))
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y))
    return bool(x == y)


def _check_pickles(where: str, name: str, leaf: object) -> None:
    if isinstance(leaf, Tensor | Recorded):  # their own errors say what is wrong
        return
    try:
        pickle.dumps(leaf)
    except Exception as error:
        if _cloudpickle_runs():
            return
        raise pickle.PicklingError(
            f"{where}: `{name}` must be something that pickle can save, got {_format(leaf)}. "
            "Define functions with `def` at the top level of a module."
        ) from error


def _cloudpickle_runs() -> bool:
    """Tells whether cloudpickle is running, which saves functions that pickle cannot save."""
    return any(frame.f_globals.get("__name__", "").endswith("cloudpickle") for frame, _ in traceback.walk_stack(None))


def _format_call(name: str, arguments: list[tuple[str, object]]) -> str:
    formatted = (_format(value) if key.startswith("*") else f"{key}={_format(value)}" for key, value in arguments)
    return f"{name}({', '.join(formatted)})"


def _format(x: object) -> str:
    if isinstance(x, Tensor):
        return _format_tensor(x)
    if isinstance(x, functools.partial):
        return _format_call("partial", [*(("*", each) for each in (x.func, *x.args)), *x.keywords.items()])
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return _format_call(type(x).__name__, list(zip(x._fields, x, strict=True)))
    if isinstance(x, dict):
        return "{" + ", ".join(f"{key!r}: {_format(value)}" for key, value in x.items()) + "}"
    if isinstance(x, list):
        return f"[{', '.join(map(_format, x))}]"
    if isinstance(x, tuple):
        return f"({', '.join(map(_format, x))}{',' if len(x) == 1 else ''})"
    return getattr(x, "__name__", None) or repr(x)


def _format_tensor(x: Tensor) -> str:
    try:
        return f"tensor({x.item():.6g})"
    except (RuntimeError, ValueError):  # of several entries, on `meta`, or a batch inside `vmap`
        return f"tensor(shape={tuple(x.shape)})"
