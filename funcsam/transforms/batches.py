"""Slices of a batch: gradient accumulation, m-sharpness, and an ascent on part of the batch."""

import math
from collections.abc import Callable

import optree
import torch
from torch import Tensor

from funcsam.core import checks, levels, tree
from funcsam.core.records import factory
from funcsam.core.slices import Batch, taken_apart
from funcsam.core.transform import Transform, check_transform
from funcsam.core.types import Aux, InDims, P, PairedGradsFn, State, Tree


def _mean(parts: list[tuple[float, Tree]]) -> Tree:
    """Averages the floating-point and complex leaves of trees by their weights; other leaves are those of the first."""
    leaves, spec = tree.flatten_any(parts[0][1])
    total = [parts[0][0] * _wide(x) if _averaged(x) else x for x in leaves]
    for weight, part in parts[1:]:
        pairs = zip(total, tree.flatten_any(part)[0], strict=True)
        total = [sum_ + weight * _wide(x) if _averaged(x) else sum_ for sum_, x in pairs]
    done = [sum_.to(x.dtype) if _averaged(x) else sum_ for sum_, x in zip(total, leaves, strict=True)]
    return optree.tree_unflatten(spec, done)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _averaged(x: object) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _mean_over_axis(stacked: Tree) -> Tree:
    """Averages floating-point and complex leaves over the leading axis; of other leaves it returns the first entry."""
    leaves, spec = tree.flatten_any(stacked)
    means = [x.mean(0) if _averaged(x) else x if tree.empty(x) else x[0].clone() for x in leaves]
    return optree.tree_unflatten(spec, means)


@factory
def microbatch(inner: Transform, m: int, in_dims: InDims = 0, chunk_size: int | None = None) -> Transform:
    """Applies a transform to `m` slices of the batch and averages the results.

    `chain(microbatch(identity(), m), sam(rho), ...)` is gradient accumulation: SAM on the gradient of the whole batch.
    `chain(microbatch(sam(rho), m), ...)` is m-sharpness: one ascent per slice.

    The loss must be a mean over the examples. Updates, and the floating-point leaves of `aux` and of the states, are
    averaged over the slices, weighted by their sizes where `m` does not divide the batch. Other leaves (counters) are
    those of the first slice. So running statistics change by the mean over the slices, and `num_batches_tracked` grows
    by one.

    Args:
        inner: The transform that is applied to each slice.
        m: Number of slices, at least 1. A slice is a range of examples; sizes differ by one example at most.
        in_dims: The axis of the examples for each argument of the batch, as in `torch.vmap`: `(None, 0, 0)` for
            `(buffers, x, y)`.
        chunk_size: Number of slices that `vmap` computes at once; `None` is all. 1 is a plain loop, which needs the
            memory of one slice and works for modules that `vmap` cannot batch.

    Raises:
        TypeError: If `inner` is not a `Transform`, or what is to be sliced is not a tensor.
        ValueError: If there are fewer examples than slices, or `in_dims` does not fit the batch.

    >>> import torch
    >>> from funcsam.core.transform import identity
    >>> tx = microbatch(identity(), 2)
    >>> grads_fn = torch.func.grad(lambda w, x: (w * x).mean())
    >>> tx.update(torch.tensor(1.0), grads_fn, (), torch.tensor([1.0, 2.0, 6.0]))[0]
    tensor(3.)

    References:
        Foret et al., 2021, section 4.1 (m-sharpness).
    """
    check_transform("microbatch", inner=inner)
    checks.count("microbatch", m=m)
    checks.chunk_size("microbatch", chunk_size)

    def update(params: P, grads_fn: PairedGradsFn, state: State, *batch: object) -> tuple[P, State, Aux]:
        whole = taken_apart("microbatch", batch, in_dims)
        if m == 1:
            return inner.update_unchecked(params, grads_fn, state, *batch)
        if whole.size < m:
            raise ValueError(f"microbatch: the batch must have at least {m} examples, one per slice, got {whole.size}.")

        def one(*leaves: Tree) -> Tree:
            return inner.update_unchecked(params, grads_fn, state, *whole.put(leaves))

        answer: tuple[P, State, Aux] = _mean(
            [
                (count * size / whole.size, _at_once(one, whole, start, count, size))
                for start, count, size in _chunks(whole.size, m, chunk_size)
            ]
        )
        return answer

    return Transform(inner.init_unchecked, update, object, lambda state: [(inner, state)])


def _chunks(examples: int, m: int, chunk_size: int | None) -> list[tuple[int, int, int]]:
    """Lists `(first example, number of slices, examples per slice)` of each chunk that is computed at once."""
    size, longer = divmod(examples, m)
    chunks, start = [], 0
    for count, each in ((longer, size + 1), (m - longer, size)):
        for done in range(0, count, chunk_size or m):
            now = min(chunk_size or m, count - done)
            chunks.append((start, now, each))
            start += now * each
    return chunks


def _at_once(one: Callable[..., Tree], whole: Batch, start: int, count: int, size: int) -> Tree:
    """Returns the mean over `count` slices of `size` examples each."""
    part = whole.part(start, count * size)
    if count == 1:
        return one(*part)
    axes = [None if axis is None else axis % leaf.ndim for leaf, axis in zip(part, whole.axes, strict=True)]
    sliced = [x if axis is None else x.unflatten(axis, (count, size)) for x, axis in zip(part, axes, strict=True)]

    def of_slice(*parts: Tensor) -> Tree:
        rest = iter(parts)
        return one(*[x if axis is None else next(rest) for x, axis in zip(sliced, axes, strict=True)])

    batched = [x for x, axis in zip(sliced, axes, strict=True) if axis is not None]
    in_dims = tuple(axis for axis in axes if axis is not None)
    with levels.batching():
        return _mean_over_axis(torch.vmap(of_slice, in_dims=in_dims, randomness="different")(*batched))


@factory
def ascent_batch(fraction: float, in_dims: InDims = 0) -> Transform:
    """Evaluates gradients on the first examples of the batch only.

    At the front of an ascent chain it makes the ascent cheaper than the descent:
    `sharpness_aware(chain(ascent_batch(0.25), normalize(), scale(rho)))` costs 1.25 gradients a step instead of 2. The
    `aux` of the params is then that of these examples.

    Args:
        fraction: Share of the batch, in (0, 1], rounded up to whole examples.
        in_dims: The axis of the examples for each argument of the batch, as in `microbatch`.

    Raises:
        TypeError: If `fraction` is not a number.
        ValueError: If `fraction` is out of range, or `in_dims` does not fit the batch.

    >>> import torch
    >>> tx = ascent_batch(0.5)
    >>> tx.update(torch.tensor(1.0), torch.func.grad(lambda w, x: (w * x).mean()), (), torch.tensor([1.0, 3.0]))[0]
    tensor(1.)
    """
    if isinstance(fraction, bool) or not isinstance(fraction, float | int):
        raise TypeError(f"ascent_batch: `fraction` must be a number, got {type(fraction).__name__}.")
    if not 0 < fraction <= 1:
        raise ValueError(f"ascent_batch: `fraction` must be in (0, 1], got {fraction}.")

    def update(params: P, grads_fn: PairedGradsFn, state: State, *batch: object) -> tuple[P, State, Aux]:
        whole = taken_apart("ascent_batch", batch, in_dims)
        grads, aux = grads_fn(params, *whole.put(whole.part(0, math.ceil(fraction * whole.size))))
        return grads, state, aux

    return Transform(lambda params: (), update, ())
