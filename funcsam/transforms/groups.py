"""Parameter groups: different transforms for different leaves."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import optree
import torch

from funcsam.core import checks, masks, tree
from funcsam.core.records import factory
from funcsam.core.states import kind_of
from funcsam.core.transform import Transform, check_transform, identity, lift
from funcsam.core.types import Aux, Mask, P, PairedGradsFn, Params, State, Tree

L = TypeVar("L", bound=Hashable)
Labels: TypeAlias = Tree
"""A tree or a prefix tree of labels, or a function of path and leaf that returns one."""


def _identical(xs: Sequence[object], ys: Sequence[object]) -> bool:
    return len(xs) == len(ys) and all(x is y for x, y in zip(xs, ys, strict=True))


class _Group:
    """The leaves that have one label. A tree of the group is a tree of all leaves with `()` for each other leaf."""

    def __init__(self, labels: Sequence[Hashable], label: Hashable) -> None:
        self.chosen = [each == label for each in labels]

    def take(self, whole: Tree) -> Tree:
        """Returns the tree of the group."""
        leaves, spec = tree.flatten(whole)
        return optree.tree_unflatten(spec, [x if on else () for x, on in zip(leaves, self.chosen, strict=True)])

    def put(self, part: Tree, whole: P) -> P:
        """Returns the tree `whole` with the leaves of the group replaced by those of `part`."""
        new = iter(optree.tree_leaves(part))
        leaves, spec = tree.flatten(whole)
        return tree.unflatten(spec, [next(new) if on else x for x, on in zip(leaves, self.chosen, strict=True)], whole)


@factory
def partition(labels: Labels, transforms: Mapping[L, Transform]) -> Transform:
    """Applies a different transform to each group of leaves.

    The gradient at the params is computed once and shared. A transform that probes perturbs the leaves of its group
    only: one more evaluation for each such group. Norms are taken over the group. For one ascent of all leaves, put it
    in front: `chain(sam(rho), partition(...))`.

    Args:
        labels: A label for every leaf: a tree, a prefix tree, or a function of path and leaf, e.g.
            `lambda path, leaf: "matrix" if leaf.ndim > 1 else "vector"`.
        transforms: The transform of each label. `freeze()` keeps a group fixed.

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

    def spread(params: Params) -> list[L]:
        found: list[L] = masks.spread(labels, params)
        for position, label in enumerate(found):
            if label not in transforms:
                path = checks.paths(params)[position]
                raise ValueError(f"partition: `transforms` must have every label, got none for {label!r} at {path}.")
        return found

    return _partition(spread, transforms)


def _partition(spread: Callable[[Params], list[L]], transforms: Mapping[L, Transform]) -> Transform:
    def groups(params: Params) -> dict[L, _Group]:
        labels = spread(params)
        return {label: _Group(labels, label) for label in transforms if label in labels}

    def init(params: Params) -> State:
        return {label: transforms[label].init_unchecked(group.take(params)) for label, group in groups(params).items()}

    def update(params: P, grads_fn: PairedGradsFn, state: State, *batch: object) -> tuple[P, State, Aux]:
        parts = groups(params)
        if not isinstance(state, dict) or state.keys() != parts.keys():
            got = f"{sorted(map(str, state))}" if isinstance(state, dict) else kind_of(state)
            wanted = f"{sorted(map(str, parts))}"
            raise ValueError(f"{whole._name}: `state` must have the labels {wanted}, got {got}. Make it with `init`.")
        grads, aux = grads_fn(params, *batch)
        updates, new = grads, {}
        for label, group in parts.items():
            part, part_grads_fn = group.take(params), _group_grads_fn(group, params, grads_fn, batch, grads)
            part, new[label], _ = transforms[label].update_unchecked(part, part_grads_fn, state[label], *batch)
            updates = group.put(part, updates)
        return updates, new, aux

    def inside(state: State) -> Iterable[tuple[Transform, State]]:
        if not isinstance(state, dict):
            return ()
        return [(transforms[label], each) for label, each in state.items() if label in transforms]

    whole = Transform(init, update, object, inside)
    return whole


def _group_grads_fn(
    group: _Group, params: P, grads_fn: PairedGradsFn, batch: tuple[object, ...], grads: P
) -> PairedGradsFn:
    """Returns the grads_fn of a group; at the params, and on the whole batch, the gradients are known already."""
    known, _ = tree.flatten_any((group.take(params), batch))

    def evaluate(part: Params, *args: object) -> tuple[Params, Aux]:
        if _identical(known, tree.flatten_any((part, args))[0]):
            return group.take(grads), ()
        found, _ = grads_fn(group.put(part, params), *args)
        return group.take(found), ()

    return evaluate


@factory
def masked(inner: Transform, mask: Mask) -> Transform:
    """Applies a transform where the mask is True; elsewhere gradients pass on unchanged, as in optax.

    `masked(sam(rho), mask)` perturbs the leaves where the mask is True; the norm of their perturbation is `rho`. The
    perturbation of the other leaves is exactly zero, and the rest of the chain gets their gradient at the params. Use
    `freeze` to keep params fixed, and in an ascent chain to mask the perturbation alone:
    `sharpness_aware(chain(freeze(others), normalize(), scale(rho)))`.

    Args:
        inner: The transform that is applied.
        mask: A prefix tree of booleans, or a function of path and leaf.

    Raises:
        TypeError: If `inner` is not a `Transform`, or the mask holds anything but booleans.
    """
    check_transform("masked", inner=inner)
    return _partition(lambda params: masks.masks(mask, params), {True: inner, False: identity()})


@factory
def freeze(mask: Mask = None) -> Transform:
    """Replaces gradients by zero where the mask is True: at the end of a chain those params stay as they are.

    In an ascent chain the perturbation of those params is exactly zero.

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
