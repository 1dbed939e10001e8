"""Many models at once: stacked trees, one entry per member along the first axis, and one vectorised step.

    params, buffers = fs.ensemble.init(build, seeds=range(16))
    tx = fs.ensemble.vectorize(fs.chain(fs.sam(0.05), fs.sgd(0.1)), in_dims=(0, None, None))
    state = tx.init(params)
    params, state, (loss, buffers) = tx.step(params, grads_fn, state, buffers, x, y)
    logits = fs.ensemble.predict(model, params, buffers, x)

`grads_fn` and `model` are those of one member. `torch.save` and `torch.load` keep an ensemble, whose trees hold nothing
but tensors; `fs.nn.load(build(), *fs.ensemble.member((params, buffers), 3))` is one of its members as a plain module.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funcsam import checks, levels, tree
from funcsam import nn as modules
from funcsam.batches import taken_apart
from funcsam.records import factory
from funcsam.transform import Aux, GradsFn, State, Transform, misfit

P = TypeVar("P")
Randomness = Literal["same", "different", "error"]


def _seeded(build: Callable[[], nn.Module], seed: int) -> tuple[Any, Any]:
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
    if not len(seeds):
        raise ValueError("init: `seeds` must have at least one seed, got none.")
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
    if not len(members):
        raise ValueError("stack: `members` must have at least one member, got none.")
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


def size(stacked: Any, where: str = "size", what: str = "stacked") -> int:
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


@factory
def vectorize(
    tx: Transform | Callable[..., Transform],
    hyper: Mapping[str, Any] | None = None,
    in_dims: Any = 0,
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

    >>> from funcsam.optimizers import sgd
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
    if chunk_size is not None:
        checks.count("vectorize", chunk_size=chunk_size)
    if randomness not in ("same", "different", "error"):
        raise ValueError(f'vectorize: `randomness` must be "same", "different" or "error", got {randomness!r}.')
    numbers = dict(hyper or {})
    across: dict[str, Any] = {"chunk_size": chunk_size, "randomness": randomness}

    def made(numbers: dict[str, Any]) -> Transform:
        transform = tx if isinstance(tx, Transform) else tx(**numbers)
        if not isinstance(transform, Transform):
            raise TypeError(f"vectorize: `tx` must return a Transform, got {type(transform).__name__}.")
        return transform

    def members(params: Any) -> None:
        size((params, numbers) if numbers else params, "vectorize", "params")

    def start(params: Any) -> State:
        members(params)
        state = torch.vmap(lambda numbers, params: made(numbers)._init(params), **across)(numbers, params)
        # What does not depend on the params comes out as one entry seen many times; a compiled step would be traced
        # again once it is written out.
        return optree.tree_map(lambda leaf: leaf.contiguous(), state)

    def update(params: P, grads_fn: GradsFn, state: State, *batch: Any) -> tuple[P, State, Aux]:
        members(params)
        _check_stacked(params, state)
        if isinstance(in_dims, tuple) and len(in_dims) != len(batch):
            got = f"{len(in_dims)} for {len(batch)}"
            raise ValueError(f"vectorize: `in_dims` must have one entry per argument of the batch, got {got}.")

        def one(numbers: Any, params: P, state: State, *batch: Any) -> tuple[P, State, Aux]:
            transform = made(numbers)
            transform._check(state)
            return transform._update(params, grads_fn, state, *batch)

        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(batch)
        given, axes = (numbers, params, state, *batch), (0, 0, 0, *dims)
        shared = _shared(batch, dims)
        if chunk_size == 1 and randomness != "same":
            answers = _looped("vectorize", one, given, axes)
            updates, new = stack([answer[:2] for answer in answers])
            return updates, new, _joined([answer[2] for answer in answers], shared)
        if not shared:
            with levels.batching():
                answer: tuple[P, State, Aux] = torch.vmap(one, in_dims=axes, **across)(*given)
            return answer
        seen: list[Any] = []

        def apart(*given: Any) -> Any:
            updates, new, aux = one(*given)
            leaves, spec = tree.flatten_any(aux)
            kept = [shared.get(_address(leaf)) for leaf in leaves]
            seen.append((spec, kept))
            return updates, new, [leaf for leaf, same in zip(leaves, kept, strict=True) if same is None]

        with levels.batching():
            updates, new, moving = torch.vmap(apart, in_dims=axes, **across)(*given)
        spec, kept = seen[0]
        return updates, new, optree.tree_unflatten(spec, _filled(kept, moving))

    return Transform(start, update, object)


def _check_stacked(params: Any, state: State) -> None:
    count = next((leaf.shape[0] for leaf in optree.tree_leaves(params)), 0)
    got = misfit(state, lambda leaf: isinstance(leaf, Tensor) and leaf.shape[:1] == (count,))
    if got is not None:
        raise ValueError(
            f"vectorize: `state` must hold tensors with one entry for each of the {count} members along the first "
            f"axis, got {got}. Make it with `init`."
        )


def _looped(where: str, one: Callable[..., Any], given: tuple[Any, ...], in_dims: tuple[Any, ...]) -> list[Any]:
    """Does what `vmap` does, one member after the other."""
    whole = taken_apart(where, given, in_dims)
    pairs = list(zip(whole.leaves, whole.axes, strict=True))
    answers = []
    for k in range(whole.size):
        own = [leaf if axis is None else leaf.select(axis, k) for leaf, axis in pairs]
        answers.append(one(*whole.put(own)))
    return answers


def _shared(batch: tuple[Any, ...], dims: tuple[Any, ...]) -> dict[Any, Tensor]:
    """Lists the tensors that the members share; what comes out as it went in stays one tensor.

    None under the compiler, where all that comes out of a module is new.
    """
    shared: dict[Any, Tensor] = {}
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
        shared |= {_address(leaf): leaf for leaf, axis in pairs if axis is None and isinstance(leaf, Tensor)}
    return shared


def _address(x: Any) -> Any:
    """Returns what two tensors have in common if they are views of the same memory, such as `x` and `x.detach()`."""
    wrapped = type(x) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x)
    if wrapped or x.layout is not torch.strided:
        return id(x)
    place = x.untyped_storage()._cdata, x.storage_offset()
    return *place, x.shape, x.stride(), x.dtype, x.is_conj(), x.is_neg()


def _filled(kept: list[Tensor | None], moving: Sequence[Any]) -> list[Any]:
    rest = iter(moving)
    return [next(rest) if same is None else same for same in kept]


def _joined(auxes: list[Any], shared: dict[Any, Tensor]) -> Any:
    """Stacks the `aux` of all members, but for what they share."""
    if not shared:
        return stack(auxes)
    for k, aux in enumerate(auxes):
        checks.same("vectorize", f"aux of member {k}", aux, auxes[0], "aux of member 0")
    rows = [tree.flatten(aux)[0] for aux in auxes]
    found = [{_address(leaf) for leaf in column} for column in zip(*rows, strict=True)]
    kept = [shared.get(next(iter(each))) if len(each) == 1 else None for each in found]
    moving = stack([[leaf for leaf, same in zip(row, kept, strict=True) if same is None] for row in rows])
    return tree.unflatten(tree.flatten(auxes[0])[1], _filled(kept, moving), auxes[0])


def predict(
    model: nn.Module, params: Any, buffers: Any, *inputs: Any, in_dims: Any = None, chunk_size: int | None = None
) -> Any:
    """Returns the outputs of all members in evaluation mode, shape `(members, ...)`.

    Args:
        model: The module of one member.
        params: Stacked, as `init` returns them.
        buffers: Likewise.
        *inputs: What the module is called with.
        in_dims: The axis of the members for each input, as in `torch.vmap`; `None` for inputs that they share.
        chunk_size: How many members are computed at once; `None` takes all, 1 takes them in a plain loop.

    Returns:
        The output of the module with an axis for the members in front of every tensor, in the same tuples, lists,
        dicts, dataclasses and containers known to `torch.utils._pytree`; `None` stays `None`.

    Raises:
        TypeError: If the module returns anything else.
        ValueError: If the numbers of members differ.
    """
    size((params, buffers), "predict", "params")
    if chunk_size is not None:
        checks.count("predict", chunk_size=chunk_size)
    dims = (0, 0, *(in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(inputs)))
    seen: list[Callable[[Iterator[Tensor]], Any]] = []

    def one(params: Any, buffers: Any, *inputs: Any) -> list[Tensor]:
        tensors, put = _outputs(modules.predict(model, params, buffers, *inputs))
        seen.append(put)
        return tensors

    given = (params, buffers, *inputs)
    if chunk_size == 1:
        tensors = stack(_looped("predict", one, given, dims))
    else:
        with levels.batching():
            tensors = torch.vmap(one, in_dims=dims, chunk_size=chunk_size)(*given)
    return seen[0](iter(tensors))


def _outputs(output: Any) -> tuple[list[Tensor], Callable[[Iterator[Tensor]], Any]]:
    """Lists the tensors in what a module returns, with a function that puts others in their place.

    Neither `vmap` nor optree knows the outputs of all modules, such as those with `None` in the place of a tensor.
    """
    if isinstance(output, Tensor):
        return [output], next
    leaves, spec = pytree.tree_flatten(output)
    if len(leaves) == 1 and leaves[0] is output:
        return _single(output)
    parts = [_outputs(leaf) for leaf in leaves]
    return [x for tensors, _ in parts for x in tensors], lambda rest: pytree.tree_unflatten(
        [put(rest) for _, put in parts], spec
    )


def _single(output: Any) -> tuple[list[Tensor], Callable[[Iterator[Tensor]], Any]]:
    if output is None:
        return [], lambda rest: None
    if not dataclasses.is_dataclass(output):
        raise TypeError(
            "predict: `model` must return tensors, alone or in tuples, lists, dicts and dataclasses, "
            f"got {type(output).__name__}."
        )
    tensors, put = _outputs({field.name: getattr(output, field.name) for field in dataclasses.fields(output)})

    def filled(rest: Iterator[Tensor]) -> Any:
        new = copy.copy(output)
        for name, value in put(rest).items():
            object.__setattr__(new, name, value)  # which a frozen dataclass takes, too
        return new

    return tensors, filled


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
    if not len(seeds):
        raise ValueError("bootstrap: `seeds` must have at least one seed, got none.")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randint(examples, (examples,), generator=each, device="cpu") for each in generators])


def average(logits: Tensor) -> Tensor:
    """Returns the logarithm of the members' mean probabilities, shape `(examples, classes)`.

    `torch.nn.functional.nll_loss(average(logits), labels)` is the ensemble's negative log-likelihood. Like the other
    metrics it is computed and returned in float32, of float64 logits in float64.

    Args:
        logits: Shape `(members, examples, classes)`, of any floating-point dtype.

    Raises:
        TypeError: If `logits` is not a floating-point tensor.
        ValueError: If it has another shape, or holds nothing.

    >>> average(torch.tensor([[[0.0, 0.0]], [[100.0, 0.0]]])).exp()
    tensor([[0.7500, 0.2500]])

    References:
        Lakshminarayanan et al., 2017, section 2.4.
    """
    return _average(_wide("average", logits, 3))


def _average(logits: Tensor) -> Tensor:
    return torch.logsumexp(F.log_softmax(logits, -1), 0) - math.log(len(logits))


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the negative log-likelihood of the members' mean probabilities, in nats per example, shape ().

    Args:
        logits: Shape `(members, examples, classes)`, of any floating-point dtype.
        labels: Whole numbers from 0 to `classes - 1`, shape `(examples,)`. On a device other than the CPU and under
            `torch.func` and `torch.compile` their range is left to torch: looking at it would make the device wait.

    Raises:
        TypeError: If `logits` is not a floating-point tensor, or `labels` is not one of whole numbers.
        ValueError: If a shape is another, there are no examples, or a label is out of range.

    >>> nll(torch.tensor([[[0.0, 0.0]]]), torch.tensor([0]))
    tensor(0.6931)
    """
    logits = _wide("nll", logits, 3)
    _labels("nll", labels, logits)
    return -_average(logits).gather(1, labels.long()[:, None]).mean()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Returns the expected calibration error, in [0, 1], shape (): how far confidence is from accuracy.

    `sum_b |B_b| / n |accuracy(B_b) - confidence(B_b)|`, where bin `b` holds the examples whose largest probability lies
    in `((b - 1) / bins, b / bins]`.

    Args:
        logits: Shape `(examples, classes)`, of any floating-point dtype: logits or log-probabilities, such as `average`
            returns.
        labels: As in `nll`; where their range is not looked at, a label that no class has counts as a miss.
        bins: Number of bins, at least 1.

    Raises:
        TypeError: As `nll`.
        ValueError: As `nll`, or if `bins` is less than 1.

    References:
        Guo et al., 2017, equations 2, 3 and 5.
    """
    logits = _wide("calibration_error", logits, 2)
    _labels("calibration_error", labels, logits)
    checks.count("calibration_error", bins=bins)
    confidence, choice = F.softmax(logits, -1).max(-1)
    gap = (choice == labels).to(confidence.dtype) - confidence
    # Divided by Python: some devices multiply by 1 / bins instead, and then 3 / 10 is another number than 0.3.
    upper = [k / bins for k in range(1, bins + 1)]
    place = torch.bucketize(confidence, torch.tensor(upper, dtype=confidence.dtype, device=confidence.device))
    inside = place.clamp(max=bins - 1)[:, None] == torch.arange(bins, device=confidence.device)
    return (inside * gap[:, None]).sum(0).abs().sum() / len(labels)


def disagreement(logits: Tensor) -> Tensor:
    """Returns how often two members predict different classes, the mean over examples and pairs, in [0, 1], shape ().

    Args:
        logits: Shape `(members, examples, classes)`, of two members at least and any floating-point dtype.

    Raises:
        TypeError: If `logits` is not a floating-point tensor.
        ValueError: If it has another shape, or holds nothing or a single member.

    >>> disagreement(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]]))
    tensor(0.6667)

    References:
        Fort et al., 2019, section 4 (disagreement of predictions).
    """
    logits = _wide("disagreement", logits, 3)
    members, _, classes = logits.shape
    if members < 2:
        raise ValueError(f"disagreement: `logits` must be those of at least 2 members, got {members}.")
    votes = (logits.argmax(-1, keepdim=True) == torch.arange(classes, device=logits.device)).sum(0)
    differ = members**2 - (votes**2).sum(-1)  # ordered pairs, counted in whole numbers: none is exactly 0
    return differ.to(logits.dtype).mean() / (members * (members - 1))


def _wide(where: str, logits: Tensor, ndim: int) -> Tensor:
    """Checks logits, and returns them in float32, or in float64 if they are."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{where}: `logits` must be a floating-point tensor, got {got}.")
    if logits.ndim != ndim:
        wanted = "(members, examples, classes)" if ndim == 3 else "(examples, classes)"
        raise ValueError(f"{where}: `logits` must have shape {wanted}, got {tuple(logits.shape)}.")
    if not logits.numel():
        each = "one member, example and class" if ndim == 3 else "one example and class"
        raise ValueError(f"{where}: `logits` must have at least {each}, got shape {tuple(logits.shape)}.")
    return logits if logits.dtype is torch.float64 else logits.float()


def _labels(where: str, labels: Tensor, logits: Tensor) -> None:
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype is torch.bool
    ):
        got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{where}: `labels` must be a tensor of whole numbers, got {got}.")
    *_, examples, classes = logits.shape
    if labels.shape != (examples,):
        raise ValueError(f"{where}: `labels` must have shape ({examples},), got {tuple(labels.shape)}.")
    if not levels.eager() or labels.device.type != "cpu":
        return
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(f"{where}: `labels` must be from 0 to {classes - 1}, got {outside[0].item()}.")
