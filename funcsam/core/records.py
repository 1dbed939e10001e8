"""Objects that know how they were made, and are shown, copied and pickled by their factory and its arguments."""

import copy
import functools
import inspect
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, Self, TypeVar

import optree
import torch
from torch import Tensor

Q = ParamSpec("Q")
M = TypeVar("M")


def home(module: str) -> str:
    """Returns the public module that a private one belongs to: where files that hold its objects look for them."""
    package, inside, *_ = *module.split("."), ""
    if package != "funcsam":
        return module
    return package if inside in ("", "core", "transforms", "family", "optimizers") else f"{package}.{inside}"


class Recorded:
    """An object that remembers its factory and what that was given. Without a factory, it is its class."""

    _record: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Records the call of the class."""
        made = super().__new__(cls)
        made._record = (cls, args, kwargs)
        return made

    @property
    def _name(self) -> str:
        return self._record[0].__name__

    def __repr__(self) -> str:
        return _call(self._name, list(named(*self._record)))

    def __reduce__(self) -> tuple[Any, ...]:
        for name, value in named(*self._record):
            for leaf in leaves(value):
                _check_pickles(self._name, name, leaf)
        return _made, self._record

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        def copied(leaf: Any) -> Any:  # a process group cannot be copied, and numbers need not be
            own = isinstance(leaf, Tensor | Recorded) or callable(leaf)
            return copy.deepcopy(leaf, memo) if own else leaf

        factory, *given = self._record
        arguments: Any = tuple(given)
        args, kwargs = optree.tree_map(copied, arguments)
        return factory(*args, **kwargs)


def factory(make: Callable[Q, M]) -> Callable[Q, M]:
    """Records on what a function returns, a new `Recorded` object, the function and its arguments."""

    @functools.wraps(make)
    def recorded(*args: Q.args, **kwargs: Q.kwargs) -> M:
        made: Any = make(*args, **kwargs)
        made._record = (recorded, args, kwargs)  # bound to names when they are asked for: the compiler cannot do that
        return made  # type: ignore[no-any-return]

    recorded.__module__ = home(make.__module__)
    return recorded


def _made(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return factory(*args, **kwargs)


def named(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
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


def leaves(x: Any) -> list[Any]:
    """Lists what dicts, lists and tuples hold."""
    if isinstance(x, Mapping):
        x = list(x.values())
    elif not isinstance(x, list | tuple):
        return [x]
    return [leaf for part in x for leaf in leaves(part)]


def equal(one: Recorded, other: Recorded) -> bool:
    """Tells whether two objects were made by the same factory of equal arguments."""
    (factory, *_), (theirs, *_) = one._record, other._record
    return factory is theirs and _equal(_bound(one), _bound(other))


def _bound(made: Recorded) -> list[Any]:
    factory, args, kwargs = made._record
    bound = inspect.signature(factory).bind(*args, **kwargs)
    bound.apply_defaults()
    return list(bound.arguments.values())


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_equal, x, y))
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y))
    return bool(x == y)


def _check_pickles(where: str, name: str, leaf: Any) -> None:
    if isinstance(leaf, Tensor | Recorded):  # which say themselves what is wrong with them
        return
    try:
        pickle.dumps(leaf)
    except Exception as error:
        if _by_value():
            return
        raise pickle.PicklingError(
            f"{where}: `{name}` must be something that pickle can save, got {_shown(leaf)}. "
            "Define functions with `def` at the top level of a module."
        ) from error


def _by_value() -> bool:
    """Tells whether cloudpickle is at work, which saves functions that pickle cannot."""
    return any(frame.f_globals.get("__name__", "").endswith("cloudpickle") for frame, _ in traceback.walk_stack(None))


def _call(name: str, given: list[tuple[str, Any]]) -> str:
    shown = (_shown(value) if key.startswith("*") else f"{key}={_shown(value)}" for key, value in given)
    return f"{name}({', '.join(shown)})"


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        return _shown_tensor(x)
    if isinstance(x, functools.partial):
        return _call("partial", [*(("*", each) for each in (x.func, *x.args)), *x.keywords.items()])
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return _call(type(x).__name__, list(zip(x._fields, x, strict=True)))
    if isinstance(x, dict):
        return "{" + ", ".join(f"{key!r}: {_shown(value)}" for key, value in x.items()) + "}"
    if isinstance(x, list):
        return f"[{', '.join(map(_shown, x))}]"
    if isinstance(x, tuple):
        return f"({', '.join(map(_shown, x))}{',' if len(x) == 1 else ''})"
    return getattr(x, "__name__", None) or repr(x)


def _shown_tensor(x: Tensor) -> str:
    try:
        return f"tensor({x.item():.6g})"
    except (RuntimeError, ValueError):  # of several entries, on `meta`, or a batch inside `vmap`
        return f"tensor(shape={tuple(x.shape)})"
