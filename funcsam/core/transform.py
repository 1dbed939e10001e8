"""The algebra: transforms act on gradient functions, and a chain is their composition.

    grads_fn(params, *batch) -> (grads, aux)                       what `torch.func.grad_and_value` returns
    update(params, grads_fn, state, *batch) -> (updates, state, aux)

Probes leave no trace: `aux` and the states of all upstream transforms are those of the first evaluation a transform
asks for. What later evaluations return beside gradients is dropped.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from funcsam.core import checks, frames, graphs, kernels, states, tree
from funcsam.core.records import Recorded, entries, factory
from funcsam.core.states import StateClass
from funcsam.core.types import (
    Aux,
    CheckedGradsFn,
    GradsFn,
    Init,
    P,
    PairedGradsFn,
    Params,
    PlainUpdate,
    ScalableGradsFn,
    State,
    Tree,
    Update,
)

Inside: TypeAlias = Callable[[State], Iterable[tuple["Transform", State]]]


class _Checked(CheckedGradsFn):
    """A user's grads_fn, whose answers are checked and brought to the form `(grads, aux)`."""

    def __init__(self, grads_fn: GradsFn[Params]) -> None:
        checks.function("update", grads_fn=grads_fn)
        self.grads_fn = grads_fn

    def scaled(self, factor: Tensor) -> "_Checked | None":
        return _Checked(self.grads_fn.scaled(factor)) if _scalable(self.grads_fn) else None

    def __call__(self, params: P, /, *batch: object) -> tuple[P, Aux]:
        since = graphs.sequence_number()
        answer: Tree = graphs.detach_values(self.grads_fn(params, *batch), params, since)
        leaves, spec = tree.flatten(params)
        pair = isinstance(answer, tuple) and len(answer) == 2
        grads, found = tree.flatten(answer[0]) if pair else ([], None)
        if pair and found == spec:
            return _dense(leaves, grads, answer[0], params), answer[1]
        grads, found = tree.flatten(answer)
        if found == spec:  # a pair (P, A) can never have the structure P
            return _dense(leaves, grads, answer, params), ()
        if pair:
            checks.same("update", "grads", answer[0], params)
        raise TypeError(
            "update: `grads_fn` must return `(grads, aux)`, or `grads` with the structure of `params`, "
            f"got {type(answer).__name__} {found}."
        )


def _scalable(grads_fn: object) -> TypeGuard[ScalableGradsFn]:
    return hasattr(grads_fn, "scaled")  # `isinstance` with a Protocol takes 6 microseconds


def _dense(leaves: list[Tensor], grads: list[Tensor], whole: P, params: P) -> P:
    """Checks that gradients have the shapes of the params, and makes sparse ones dense."""
    if any(not isinstance(g, Tensor) or g.shape != w.shape for g, w in zip(grads, leaves, strict=True)):
        checks.same("update", "grads", whole, params)
    if all(g.layout is torch.strided for g in grads):
        return whole
    return tree.unflatten(tree.flatten(whole)[1], map(kernels.dense, grads), whole)


class Transform(Recorded):
    """A pair of pure functions that turns the gradients of a function into updates.

    Its `repr` is the call that made it, `chain(sam(rho=0.05), sgd(lr=0.1))`, by which it is copied and pickled, too.

    Args:
        init: `init(params) -> state`, a pytree of tensors whose structure depends on the params alone.
        update: `update(params, grads_fn, state, *batch) -> (updates, state, aux)`. Updates have the structure of the
            params and are *added* to them.
        state: Class of the states that `init` returns, a NamedTuple, or `()` if there are none; others are refused.
            `None` refuses states that hold anything but tensors, `object` refuses nothing.
        inside: `inside(state)` returns pairs of a transform inside this one and its state, which are checked, too.
        probes: Whether `update` asks for gradients at other points than the params, as `sam` does.

    A transform that applies another one (a combinator, such as `masked`) uses these attributes of the inner transform,
    because its arguments have been checked already:

    Attributes:
        init_unchecked: `init` without checks of the params.
        update_unchecked: `update` without checks; its `grads_fn` must return `(grads, aux)`.
        parts: The transforms that a chain is made of; of any other transform, a tuple of itself.

    Raises:
        TypeError: If an argument is of the wrong type.
    """

    def __init__(
        self,
        init: Init,
        update: Update,
        state: StateClass = None,
        inside: Inside | None = None,
        probes: bool = False,
    ) -> None:
        checks.function("Transform", init=init, update=update)
        if not (state is None or isinstance(state, type) or (isinstance(state, tuple) and not state)):
            raise TypeError(f"Transform: `state` must be a class, () or None, got {type(state).__name__}.")
        self.init_unchecked = init
        self.update_unchecked = update
        self._state = state
        self._inside = inside
        self._probes = probes
        self.parts: tuple[Transform, ...] = (self,)

    def init(self, params: Params) -> State:
        """Returns the state before the first step.

        Raises:
            TypeError: If a leaf is not a floating-point or complex tensor.
        """
        checks.params("init", params)
        return self.init_unchecked(params)

    def update(self, params: P, grads_fn: GradsFn[P], state: State, *batch: object) -> tuple[P, State, Aux]:
        """Returns `(updates, state, aux)`; `aux` is what `grads_fn` returned at the params, `()` for a bare gradient.

        Params that are leaves and require grad, such as those of a module, are detached, so that a step does not extend
        their graph. Under `torch.func` and in the loss of a `grad_and_value` they are differentiated. Hyperparameters,
        and params that are not leaves, are differentiated everywhere.

        Args:
            params: A pytree of tensors.
            grads_fn: `grads_fn(params, *batch)` returns `(grads, aux)` or `grads`.
            state: What `init` or the last `update` returned.
            *batch: Passed on to `grads_fn`.

        Raises:
            TypeError: If `grads_fn` is not a function, or returns something else.
            ValueError: If gradients or state do not fit the params.
        """
        return self._checked_update(tree.detached(params, "update"), grads_fn, state, batch)

    def check_state(self, state: State) -> None:
        """Raises unless the state has the class that this transform names, and so for every transform inside.

        Raises:
            ValueError: If it has not.
        """
        problem = states.problem(state, self._state)
        if problem is not None:
            raise ValueError(f"{self._name}: `state` must be {problem}. Make it with `init`.")
        if self._inside is not None:
            for transform, inner_state in self._inside(state):
                transform.check_state(inner_state)

    def prober(self) -> "Transform | None":
        """Returns a transform that probes: this one, or one among its arguments; `None` if none is known to."""
        if self._probes:
            return self
        inside = [leaf for leaf in entries(self._record[1:]) if isinstance(leaf, Transform)]
        return next((found for found in (each.prober() for each in inside) if found is not None), None)

    def step(self, params: P, grads_fn: GradsFn[P], state: State, *batch: object) -> tuple[P, State, Aux]:
        """Updates and applies the updates; returns `(params, state, aux)`."""
        params = tree.detached(params)
        updates, state, aux = self._checked_update(params, grads_fn, state, batch)
        return tree.add(params, updates, tree.UPDATES), state, aux

    def _checked_update(
        self, params: P, grads_fn: GradsFn[P], state: State, batch: tuple[object, ...]
    ) -> tuple[P, State, Aux]:
        self.check_state(state)
        checked = grads_fn if isinstance(grads_fn, CheckedGradsFn) else _Checked(grads_fn)
        with frames.in_step():
            return self.update_unchecked(params, checked, state, *batch)


def check_transform(where: str, **named: object) -> None:
    """Raises unless every value is a `Transform`."""
    for name, value in named.items():
        if not isinstance(value, Transform):
            raise TypeError(f"{where}: `{name}` must be a Transform, got {type(value).__name__}.")


def apply_updates(params: P, updates: P) -> P:
    """Returns `params + updates` in the dtypes of the params.

    Raises:
        ValueError: If the updates do not have the structure and the shapes of the params.

    >>> apply_updates({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([-1.0, 1.0])})
    {'w': tensor([0., 3.])}
    """
    return tree.add(tree.detached(params, "apply_updates"), updates, tree.UPDATES)


@factory
def lift(init: Init, update: PlainUpdate, state: StateClass = None) -> Transform:
    """Makes a `Transform` from a gradient transformation as optax users write it.

    Args:
        init: `init(params) -> state`.
        update: `update(grads, state, params) -> (updates, state)`.
        state: Class of the states, `()` or `None`, as in `Transform`.

    Raises:
        TypeError: If an argument is of the wrong type.

    >>> import torch
    >>> halve = lift(lambda params: (), lambda grads, state, params: (tree.scale(0.5, grads), state))
    >>> halve.update(torch.tensor(3.0), torch.func.grad(lambda w: w * w), ())
    (tensor(3.), (), ())
    """
    checks.function("lift", init=init, update=update)

    def lifted(params: P, grads_fn: PairedGradsFn, state: State, *batch: object) -> tuple[P, State, Aux]:
        grads, aux = grads_fn(params, *batch)
        updates, state = update(grads, state, params)
        return updates, state, aux

    return Transform(init, lifted, state)


class Carried(NamedTuple):
    """What a transform returns in the place of `aux` to the transforms downstream of it, which pass it on unchanged.

    Attributes:
        extra: A tree of tensors. In a chain the new states upstream; in `dynamic_loss_scale` 1 if an evaluation was
            finite, and 0 if not. Where processes average `aux`, they average this too.
        aux: The `aux` of the user's `grads_fn`.
    """

    extra: Tree
    aux: Aux


def _downstream(part: Transform, state: State, grads_fn: PairedGradsFn) -> PairedGradsFn:
    """Returns the grads_fn of the transform downstream of `part`; its `aux` carries the new states."""

    def upstream(params: P, *batch: object) -> tuple[P, Carried]:
        updates, new, (states, aux) = part.update_unchecked(params, grads_fn, state, *batch)
        return updates, Carried((*states, new), aux)

    return upstream


def chain(*transforms: Transform) -> Transform:
    """Composes transforms: gradients flow in at the left, updates come out at the right.

    The `grads_fn` of a transform is the gradient function of the user with all transforms to its left applied, at the
    params and at every probe. Chains are flat and associative, `chain(t)` is `t`, and `chain()` is `identity()`.

    Returns:
        A `Transform` whose state is a tuple of the states of its parts.

    Raises:
        TypeError: If an argument is not a `Transform`.
    """
    for position, transform in enumerate(transforms):
        if not isinstance(transform, Transform):
            raise TypeError(
                f"chain: `transforms` must be Transforms, got {type(transform).__name__} at position {position}."
            )
    parts = tuple(part for transform in transforms for part in transform.parts)
    if len(parts) == 1:
        return parts[0]

    def init(params: Params) -> State:
        return tuple(part.init_unchecked(params) for part in parts)

    def inside(state: State) -> Iterable[tuple[Transform, State]]:
        if type(state) is not tuple or len(state) != len(parts):
            got = f"{len(state)} states" if type(state) is tuple else states.kind_of(state)
            raise ValueError(
                f"{composition._name}: `state` must be a tuple of {len(parts)} states, one per transform, got {got}. "
                "Make it with `init`."
            )
        return zip(parts, state, strict=True)

    def update(params: Params, grads_fn: PairedGradsFn, state: State, *batch: object) -> tuple[Params, State, Aux]:
        def first(params: P, *batch: object) -> tuple[P, Carried]:
            grads, aux = grads_fn(params, *batch)
            return grads, Carried((), aux)

        composed: PairedGradsFn = first
        for part, part_state in zip(parts, state, strict=True):
            composed = _downstream(part, part_state, composed)
        updates, (states, aux) = composed(params, *batch)
        return updates, states, aux

    composition = Transform(init, update, object, inside) if parts else Transform(init, update, ())
    composition.parts, composition._record = parts, (chain, transforms, {})
    return composition


@factory
def identity() -> Transform:
    """Passes gradients on unchanged: the unit of `chain`."""
    return chain()
