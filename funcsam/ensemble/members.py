"""Stacked trees: one entry per member along the first axis."""

from collections.abc import Callable, Sequence

import optree
import torch
from torch import Tensor, nn

from funcsam import nn as modules
from funcsam.core import checks, tree
from funcsam.core.types import P, Tree


def _not_empty(where: str, kind: str, given: Sequence[object]) -> None:
    if not len(given):
        raise ValueError(f"{where}: `{kind}s` must have at least one {kind}, got none.")


def _seeded(build: Callable[[], nn.Module], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return modules.split(build())


def init(build: Callable[[], nn.Module], seeds: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Builds one module per seed and stacks their tensors. Only one module exists at a time.

    The generators of the caller are left as they were.

    Args:
        build: Builds a module, the same one for the same random numbers.
        seeds: Member `k` is what `torch.manual_seed(seeds[k]); build()` gives.

    Returns:
        `(params, buffers)` as `nn.split` returns them; every leaf has a leading axis of `len(seeds)`.

    Raises:
        ValueError: If there are no seeds, or two modules differ in their names or shapes.
    """
    checks.function("init", build=build)
    _not_empty("init", "seed", seeds)
    first = _seeded(build, seeds[0])
    leaves, spec = tree.flatten(first)
    stacked = [leaf.new_empty((len(seeds), *leaf.shape)) for leaf in leaves]
    for k, seed in enumerate(seeds):
        built = _seeded(build, seed) if k else first
        checks.same("init", f"build() for seed {seed}", built, first, f"build() for seed {seeds[0]}")
        for whole, leaf in zip(stacked, tree.flatten(built)[0], strict=True):
            whole[k] = leaf
    return tree.unflatten(spec, stacked, first)


def stack(members: Sequence[P]) -> P:
    """Puts trees side by side: every leaf gets a leading axis, one entry per member.

    Raises:
        ValueError: If there are no members, or they differ in structure or shapes.

    >>> stack([{"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}])
    {'w': tensor([1., 2.])}
    """
    _not_empty("stack", "member", members)
    for k, each in enumerate(members):
        checks.same("stack", f"members[{k}]", each, members[0], "members[0]")
    spec = tree.flatten(members[0])[1]
    leaves = zip(*(tree.flatten(each)[0] for each in members), strict=True)
    return tree.unflatten(spec, [torch.stack(each) for each in leaves], members[0])


def unstack(stacked: P) -> list[P]:
    """Undoes `stack`.

    >>> unstack({"w": torch.tensor([1.0, 2.0])})
    [{'w': tensor(1.)}, {'w': tensor(2.)}]
    """
    return [member(stacked, k) for k in range(size(stacked))]


def member(stacked: P, index: int) -> P:
    """Takes one member out, as a copy.

    Raises:
        ValueError: If there is no such member.
    """
    count = size(stacked)
    if not -count <= index < count:
        raise ValueError(f"member: `index` must be less than the {count} members, got {index}.")
    leaves, spec = tree.flatten(stacked)
    return tree.unflatten(spec, [leaf[index].clone() for leaf in leaves], stacked)


def size(stacked: Tree, where: str = "size", what: str = "stacked") -> int:
    """Returns the number of members.

    Raises:
        ValueError: If a leaf has no leading axis, or two differ in its length.
    """
    checks.tensors(where, what, stacked)
    sizes: dict[int, str] = {}
    for path, leaf in zip(checks.paths(stacked), optree.tree_leaves(stacked), strict=True):
        if not leaf.ndim:
            raise ValueError(
                f"{where}: `{what}` must have one entry per member along the first axis, got () at {path}."
            )
        sizes.setdefault(leaf.shape[0], path)
    if len(sizes) != 1:
        got = " and ".join(f"{n} at {path}" for n, path in list(sizes.items())[:2]) or "no leaves"
        raise ValueError(f"{where}: `{what}` must have one number of members, got {got}.")
    return next(iter(sizes))


def bootstrap(examples: int, seeds: Sequence[int]) -> Tensor:
    """Draws for every member as many examples as there are, with replacement.

    Args:
        examples: Number of training examples.
        seeds: One per member; the same seed draws the same.

    Returns:
        Indices, int64 of shape `(members, examples)`, on the CPU: `x[bootstrap(...)]` are the members' own training
        sets.

    Raises:
        ValueError: If there are no examples or no seeds.

    References:
        Breiman, 1996 (bagging predictors).
    """
    checks.count("bootstrap", examples=examples)
    _not_empty("bootstrap", "seed", seeds)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randint(examples, (examples,), generator=each, device="cpu") for each in generators])
