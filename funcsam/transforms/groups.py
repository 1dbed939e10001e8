"""Parameter groups: different transforms for different leaves."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import optree
import torch

from funcsam.core import checks, masks, tree
from funcsam.core.records import factory
from funcsam.core.transform import Transform, identity, kind_of, lift
from funcsam.core.types import Aux, Mask, P, PairedGradsFn, Params, State

Labels = Any
"""A tree or a prefix tree of labels, or a function of path and leaf that returns one."""


def _same(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
    return len(xs) == len(ys) and all(x is y for x, y in zip(xs, ys, strict=True))


class _Group:
    """The leaves that have one label. Its trees are those of all leaves with `()` in the place of the others."""

    def __init__(self, labels: Sequence[Hashable], label: Hashable) -> None:
        self.chosen = [each == label for each in labels]

    def of(self, whole: Any) -> Any:
        """Returns the part of a tree that belongs to the group."""
        leaves, spec = tree.flatten(whole)
        return optree.tree_unflatten(spec, [x if on else () for x, on in zip(leaves, self.chosen, strict=True)])

    def put(self, part: Any, whole: P) -> P:
        """Returns a tree with the leaves of the group replaced."""
        mine = iter(optree.tree_leaves(part))
        leaves, spec = tree.flatten(whole)
        return tree.unflatten(spec, [next(mine) if on else x for x, on in zip(leaves, self.chosen, strict=True)], whole)


@factory
def partition(labels: Labels, transforms: Mapping[Any, Transform]) -> Transform:
    """Applies to each group of leaves a transform of its own.

    The gradient at the params is computed once and shared. A transform that probes moves its own group only, while the
    others stay at the params: one more evaluation for each such group. Norms are taken over the group; where one
    ascent should know all leaves, put it in front: `chain(sam(rho), partition(...))`.

    Args:
        labels: A label for every leaf: a tree, a prefix tree, or a function of path and leaf, e.g.
            `lambda path, leaf: "matrix" if leaf.ndim > 1 else "vector"`.
        transforms: The transform of each label. `freeze()` leaves a group as it is.

    Returns:
        A `Transform` whose state is a dict of the states of the groups, by label.

    Raises:
        TypeError: If a value is not a `Transform`.
        ValueError: If a label has no transform, or the labels do not fit the params.

    >>> import torch
    >>> from funcsam.transforms.scaling import scale
    >>> tx = partition({"w": "fast", "b": "slow"}, {"fast": scale(-1.0), "slow": scale(-0.5)})
    >>> w = {"w": torch.tensor(1.0), "b": torch.tensor(1.0)}
    >>> tx.update(w, torch.func.grad(lambda w: 2 * w["w"] + 2 * w["b"]), tx.init(w))[0]
    {'w': tensor(-2.), 'b': tensor(-1.)}
    """
    for label, transform in transforms.items():
        if not isinstance(transform, Transform):
            got = f"{type(transform).__name__} for {label!r}"
            raise TypeError(f"partition: `transforms` must hold Transforms, got {got}.")

    def spread(params: Params) -> list[Any]:
        found = masks.spread(labels, params)
        for position, label in enumerate(found):
            if label not in transforms:
                path = checks.paths(params)[position]
                raise ValueError(f"partition: `transforms` must have every label, got none for {label!r} at {path}.")
        return found

    return _partition(spread, transforms)


def _partition(spread: Callable[[Any], list[Any]], transforms: Mapping[Any, Transform]) -> Transform:
    def groups(params: Params) -> dict[Any, _Group]:
        labels = spread(params)
        return {label: _Group(labels, label) for label in transforms if label in labels}

    def init(params: Params) -> State:
        return {label: transforms[label].init_unchecked(group.of(params)) for label, group in groups(params).items()}

    def update(params: P, grads_fn: PairedGradsFn, state: State, *batch: object) -> tuple[P, State, Aux]:
        parts = groups(params)
        if not isinstance(state, dict) or state.keys() != parts.keys():
            got = f"{sorted(map(str, state))}" if isinstance(state, dict) else kind_of(state)
            wanted = f"{sorted(map(str, parts))}"
            raise ValueError(f"{whole._name}: `state` must have the labels {wanted}, got {got}. Make it with `init`.")
        grads, aux = grads_fn(params, *batch)
        updates, new = grads, {}
        for label, group in parts.items():
            part, own = group.of(params), _own(group, params, grads_fn, batch, grads)
            moved, new[label], _ = transforms[label].update_unchecked(part, own, state[label], *batch)
            updates = group.put(moved, updates)
        return updates, new, aux

    def inside(state: State) -> Iterable[tuple[Transform, State]]:
        if not isinstance(state, dict):
            return ()
        return [(transforms[label], own) for label, own in state.items() if label in transforms]

    whole = Transform(init, update, object, inside)
    return whole


def _own(group: _Group, params: P, grads_fn: PairedGradsFn, batch: tuple[object, ...], grads: P) -> PairedGradsFn:
    """What a group sees as its grads_fn; at the params, and on the whole batch, the answer is known."""
    here, _ = tree.flatten_any((group.of(params), batch))

    def evaluate(part: Any, *args: Any) -> tuple[Params, Aux]:
        if _same(here, tree.flatten_any((part, args))[0]):
            return group.of(grads), ()
        found, _ = grads_fn(group.put(part, params), *args)
        return group.of(found), ()

    return evaluate


@factory
def masked(inner: Transform, mask: Mask) -> Transform:
    """Applies a transform where the mask is True; elsewhere gradients pass on unchanged, as in optax.

    `masked(sam(rho), mask)` perturbs the leaves of the mask only, by `rho` in their own norm. The others get a
    perturbation of exactly zero, and what follows in the chain updates them with their gradient at the params. Params
    that are not to move at all are the business of `freeze`; so is a mask on a perturbation alone,
    `sharpness_aware(chain(freeze(others), normalize(), scale(rho)))`.

    Args:
        inner: What is applied.
        mask: A prefix tree of booleans, or a function of path and leaf.

    Raises:
        TypeError: If `inner` is not a `Transform`, or the mask holds anything but booleans.
    """
    if not isinstance(inner, Transform):
        raise TypeError(f"masked: `inner` must be a Transform, got {type(inner).__name__}.")
    return _partition(lambda params: masks.masks(mask, params), {True: inner, False: identity()})


@factory
def freeze(mask: Mask = None) -> Transform:
    """Replaces gradients by zero where the mask is True: at the end of a chain those params stay as they are.

    In an ascent chain it gives those params a perturbation of exactly zero.

    Args:
        mask: A prefix tree of booleans, or a function of path and leaf. `None` freezes every leaf.

    Raises:
        TypeError: If the mask holds anything but booleans.
    """

    def update(grads: Params, state: State, params: Params) -> tuple[Params, State]:
        leaves, spec = tree.flatten(grads)
        frozen = zip(leaves, masks.masks(mask, params), strict=True)
        return tree.unflatten(spec, [torch.zeros_like(g) if on else g for g, on in frozen], grads), state

    return lift(lambda params: (), update, ())
