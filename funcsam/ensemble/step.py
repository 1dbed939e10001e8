"""One step of many models at once."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, TypeVar

import optree
import torch
from torch import Tensor, nn

from funcsam.core import checks, levels, tree
from funcsam.core.records import factory
from funcsam.core.slices import taken_apart
from funcsam.core.states import misfit
from funcsam.core.transform import Transform
from funcsam.core.types import Aux, InDims, P, PairedGradsFn, Params, State, Tree
from funcsam.ensemble.members import size, stack

T = TypeVar("T")
Randomness = Literal["same", "different", "error"]


@factory
def vectorize(
    tx: Transform | Callable[..., Transform],
    hyper: Mapping[str, Tree] | None = None,
    in_dims: InDims = 0,
    chunk_size: int | None = None,
    randomness: Randomness = "different",
) -> Transform:
    """Applies a transform to every member of an ensemble at once.

    `init`, `update` and `step` take stacked trees, and the `grads_fn` of one member. Each member takes the step it
    would take alone: what happens to one, NaN included, does not reach the others.

    Args:
        tx: A transform, or with `hyper` a function that makes one.
        hyper: Hyperparameters that differ between the members, stacked: `{"rho": torch.tensor([0.05, 0.1])}` for
            `lambda rho: chain(sam(rho), sgd(0.1))`. A sweep is one run.
        in_dims: The axis of the members for each argument of the batch, as in `torch.vmap`: 0 for buffers and for
            batches of their own, `None` for a batch that they share. A shared tensor that comes back in `aux` as it
            was given (a frozen base) stays one tensor; shared buffers that are written to come back one per member.
        chunk_size: How many members are computed at once; `None` takes all. Fewer take less memory for activations; 1
            takes them in a plain loop, for modules that `vmap` cannot batch and for activation checkpointing.
        randomness: Whether members draw different random numbers (dropout masks), the same, or none.

    Raises:
        TypeError: If `tx` is not a `Transform`, or with `hyper` not a function.
        ValueError: If the numbers of members differ.

    >>> import torch
    >>> from funcsam import sgd
    >>> tx = vectorize(lambda lr: sgd(lr), {"lr": torch.tensor([0.5, 0.25])})
    >>> w = torch.tensor([2.0, 2.0])
    >>> tx.step(w, torch.func.grad(lambda w: 0.5 * w**2), tx.init(w))[0]
    tensor([1.0000, 1.5000])
    """
    if hyper is None and not isinstance(tx, Transform):
        hint = " Give `hyper` for a function that makes one." if callable(tx) else ""
        raise TypeError(f"vectorize: `tx` must be a Transform, got {type(tx).__name__}.{hint}")
    if hyper is not None:
        if isinstance(tx, Transform):
            raise TypeError("vectorize: `tx` must be a function from `hyper` to a Transform, got a Transform.")
        checks.function("vectorize", tx=tx)
        size(dict(hyper), "vectorize", "hyper")
    checks.chunk_size("vectorize", chunk_size)
    checks.choice("vectorize", ("same", "different", "error"), randomness=randomness)
    numbers = dict(hyper or {})
    options: dict[str, Tree] = {"chunk_size": chunk_size, "randomness": randomness}

    def make(numbers: dict[str, Tree]) -> Transform:
        transform = tx if isinstance(tx, Transform) else tx(**numbers)
        if not isinstance(transform, Transform):
            raise TypeError(f"vectorize: `tx` must return a Transform, got {type(transform).__name__}.")
        return transform

    def members(params: Params) -> None:
        size((params, numbers) if numbers else params, "vectorize", "params")

    def start(params: Params) -> State:
        members(params)
        state = torch.vmap(lambda numbers, params: make(numbers).init_unchecked(params), **options)(numbers, params)
        # What does not depend on the params comes out expanded: one entry, stride 0. The next step would be compiled
        # again, for a tensor that is not expanded.
        return optree.tree_map(lambda leaf: leaf.contiguous(), state)

    def update(params: P, grads_fn: PairedGradsFn, state: State, *batch: object) -> tuple[P, State, Aux]:
        members(params)
        _check_stacked(params, state)
        if isinstance(in_dims, tuple) and len(in_dims) != len(batch):
            got = f"{len(in_dims)} for {len(batch)}"
            raise ValueError(f"vectorize: `in_dims` must have one entry per argument of the batch, got {got}.")

        def one(numbers: dict[str, Tree], params: P, state: State, *batch: object) -> tuple[P, State, Aux]:
            transform = make(numbers)
            transform.check_state(state)
            return transform.update_unchecked(params, grads_fn, state, *batch)

        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(batch)
        given, axes = (numbers, params, state, *batch), (0, 0, 0, *dims)
        shared = _shared_tensors(batch, dims)
        if chunk_size == 1 and randomness != "same":
            answers = one_by_one("vectorize", one, given, axes)
            updates, new = stack([answer[:2] for answer in answers])
            return updates, new, _stack_aux([answer[2] for answer in answers], shared)
        if not shared:
            with levels.batching():
                answer: tuple[P, State, Aux] = torch.vmap(one, in_dims=axes, **options)(*given)
            return answer
        structures: list[tuple[optree.PyTreeSpec, list[Tensor | None]]] = []

        def without_shared(*given: Tree) -> tuple[P, State, list[Tensor]]:
            updates, new, aux = one(*given)
            leaves, spec = tree.flatten_any(aux)
            same_as_given = [shared.get(_memory_of(leaf)) for leaf in leaves]
            structures.append((spec, same_as_given))
            return updates, new, [leaf for leaf, same in zip(leaves, same_as_given, strict=True) if same is None]

        with levels.batching():
            updates, new, not_shared = torch.vmap(without_shared, in_dims=axes, **options)(*given)
        spec, same_as_given = structures[0]
        return updates, new, optree.tree_unflatten(spec, _put_back(same_as_given, not_shared))

    return Transform(start, update, object)


def _check_stacked(params: Params, state: State) -> None:
    count = next((leaf.shape[0] for leaf in optree.tree_leaves(params)), 0)
    got = misfit(state, lambda leaf: isinstance(leaf, Tensor) and leaf.shape[:1] == (count,))
    if got is not None:
        raise ValueError(
            f"vectorize: `state` must hold tensors with one entry for each of the {count} members along the first "
            f"axis, got {got}. Make it with `init`."
        )


def one_by_one(where: str, one: Callable[..., T], given: tuple[Tree, ...], in_dims: tuple[InDims, ...]) -> list[T]:
    """Does what `vmap` does, one member after the other."""
    whole = taken_apart(where, given, in_dims)
    pairs = list(zip(whole.leaves, whole.axes, strict=True))
    answers = []
    for k in range(whole.size):
        own = [leaf if axis is None else leaf.select(axis, k) for leaf, axis in pairs]
        answers.append(one(*whole.put(own)))
    return answers


def _shared_tensors(batch: tuple[Tree, ...], dims: tuple[Tree, ...]) -> dict[Hashable, Tensor]:
    """Lists the tensors that the members share; what comes out as it went in stays one tensor.

    None under the compiler, where all that comes out of a module is new.
    """
    shared: dict[Hashable, Tensor] = {}
    if torch.compiler.is_compiling():
        return shared
    for argument, dim in zip(batch, dims, strict=True):
        if isinstance(dim, int):
            continue
        leaves = optree.tree_leaves(argument, is_leaf=tree.empty, none_is_leaf=True)
        try:
            axes = optree.broadcast_prefix(dim, argument, is_leaf=tree.empty, none_is_leaf=True)
        except ValueError as error:
            raise ValueError(f"vectorize: `in_dims` must fit the batch, got {dims}: {error}") from None
        pairs = zip(leaves, axes, strict=True)
        shared |= {_memory_of(leaf): leaf for leaf, axis in pairs if axis is None and isinstance(leaf, Tensor)}
    return shared


def _memory_of(x: Tree) -> Hashable:
    """Returns what two tensors have in common if they are views of the same memory, such as `x` and `x.detach()`."""
    wrapped = type(x) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x)
    if wrapped or x.layout is not torch.strided:
        return id(x)
    place = x.untyped_storage()._cdata, x.storage_offset()
    return *place, x.shape, x.stride(), x.dtype, x.is_conj(), x.is_neg()


def _put_back(same_as_given: list[Tensor | None], not_shared: Sequence[Tree]) -> list[Tree]:
    rest = iter(not_shared)
    return [next(rest) if same is None else same for same in same_as_given]


def _stack_aux(auxes: list[Aux], shared: dict[Hashable, Tensor]) -> Aux:
    """Stacks the `aux` of all members, but for what they share."""
    if not shared:
        return stack(auxes)
    for k, aux in enumerate(auxes):
        checks.same("vectorize", f"aux of member {k}", aux, auxes[0], "aux of member 0")
    rows = [tree.flatten(aux)[0] for aux in auxes]
    found = [{_memory_of(leaf) for leaf in column} for column in zip(*rows, strict=True)]
    same_as_given = [shared.get(next(iter(each))) if len(each) == 1 else None for each in found]
    not_shared = stack([[leaf for leaf, same in zip(row, same_as_given, strict=True) if same is None] for row in rows])
    return tree.unflatten(tree.flatten(auxes[0])[1], _put_back(same_as_given, not_shared), auxes[0])
