"""The loss around a solution, and between two solutions: the numbers behind pictures of loss landscapes.

    directions = fs.landscape.directions(params, seed=0)
    ts = torch.linspace(-1, 1, 41)
    losses = fs.landscape.grid(loss_fn, params, directions, ts, ts, buffers, x, y)
    losses = fs.landscape.line(loss_fn, params, others, torch.linspace(0, 1, 41), buffers, x, y)

**Two solutions side by side.** Give both the same seed: they get the same Gaussian draw, each scaled to its own
filters. A network with batch normalisation computes the same function if a filter is multiplied by ten; a ReLU network
does if one layer is multiplied and the next is divided by ten. So a step of fixed length means something else to each
of two solutions; a step of one filter norm means the same.

**Batch normalisation** has no running statistics for weights that were moved, so `loss_fn` says which ones are taken:

- those of the batch, by a module in training mode: `fs.nn.loss_fn(model.train(), loss)`. The picture is of the loss
  that training descends; it does not change with the size of a filter that is normalised, and batches should be large.
  For `line` this is the only right choice: statistics interpolated between two solutions, or taken from one, fit no
  point between them. Put dropout into evaluation mode, as a picture of random numbers says nothing.
- those of the solution, by a module in evaluation mode: `fs.nn.loss_fn(model.eval(), loss)`. The picture is of the
  network as deployed, and as Li et al. draw it; the loss also rises because the statistics go stale, and that part of
  it is not sharpness.

Buffers that a loss returns are dropped: evaluations leave no trace.
"""

from collections.abc import Callable, Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from funcsam.core import checks, frames, graphs, levels, tree
from funcsam.core.types import Loss, P, Params

__all__ = ["directions", "filter_normalize", "grid", "line"]

Coordinates = Tensor | Sequence[float]
"""A tensor of shape `(n,)` or a sequence of numbers, which are exact in the precision of the params."""
Progress = Callable[[int], object]
"""Is told how many points were evaluated since the last call."""


def filter_normalize(direction: P, params: P) -> P:
    """Gives each filter of a direction the norm of the same filter of the params: `d <- d / ||d|| ||w||`.

    A filter is one entry along the first axis: what makes one output channel of a convolution, a row of the weight of a
    linear layer, the vector of one word of an embedding. (In a transposed convolution that axis counts inputs.) Leaves
    of one axis or none, which are biases and the scales of normalisation layers, get zero, and so does a filter of
    zeros.

    Args:
        direction: A tree like `params`: a random draw, a gradient, an eigenvector.
        params: The solution.

    Raises:
        ValueError: If the structures or shapes differ.

    >>> filter_normalize({"w": torch.tensor([[1.0, 1.0], [0.0, -5.0]])}, {"w": torch.tensor([[2.0, 0.0], [0.6, 0.8]])})
    {'w': tensor([[ 1.4142,  1.4142],
            [ 0.0000, -1.0000]])}

    References:
        Li et al., 2018, section 4 (filter-wise normalisation). arXiv 1712.09913.
    """
    checks.same("filter_normalize", "direction", direction, params)
    return tree.map(_normalize_filters, direction, params)


def _normalize_filters(direction: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        return torch.zeros_like(direction)
    return direction * (_filter_norms(weight) * tree.reciprocal(_filter_norms(direction)))


def _filter_norms(x: Tensor) -> Tensor:
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    return tree.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True, dtype=wide)


def directions(params: P, seed: int = 0) -> tuple[P, P]:
    """Draws two filter-normalised Gaussian directions.

    The draw depends on the seed and the shapes alone, not on dtype or device: two solutions of one network get the same
    draw, each scaled to its own filters. The two directions are not made orthogonal, as they are not by Li et al.: the
    cosine between draws of n numbers is about `1 / sqrt(n)`, and a correction would end the exactness of the norms.

    Args:
        params: The solution.
        seed: Where the generator starts.

    Returns:
        Two trees like `params`.

    Raises:
        TypeError: If `seed` is not a whole number, or a leaf not a floating-point or complex tensor.
        ValueError: If no leaf has filters.

    >>> d, _ = directions({"w": torch.tensor([[3.0], [4.0]]), "b": torch.ones(2)})
    >>> d["w"].abs(), d["b"]
    (tensor([[3.],
            [4.]]), tensor([0., 0.]))

    References:
        Li et al., 2018, section 4. arXiv 1712.09913.
    """
    checks.integer("directions", seed=seed)
    checks.params("directions", params)
    if not any(leaf.ndim >= 2 for leaf in tree.flatten(params)[0]):
        raise ValueError(
            "directions: `params` must have a leaf of two axes or more, got none. "
            "Without filters every direction is zero."
        )
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(leaf: Tensor) -> Tensor:
        dtype = torch.complex64 if leaf.is_complex() else torch.float32
        return torch.randn(leaf.shape, generator=generator, dtype=dtype, device="cpu").to(leaf.device, leaf.dtype)

    first, second = (filter_normalize(tree.map(draw, params), params) for _ in range(2))
    return first, second


def grid(
    loss_fn: Loss,
    params: P,
    directions: tuple[P, P],
    xs: Coordinates,
    ys: Coordinates,
    *batch: object,
    chunk_size: int = 1,
    progress: Progress | None = None,
) -> Tensor:
    """Evaluates the loss on a plane through the params: `L(w + x d_0 + y d_1)` for every `x` and `y`.

    Where the data do not fit into one batch, average the grids of several (with batch statistics: of large ones).

    Args:
        loss_fn: `loss_fn(params, *batch)` returns the loss, a tensor of shape (), or a pair of it and `aux`, which is
            dropped. It must not draw random numbers.
        params: The solution.
        directions: Two trees like `params`.
        xs: Steps along the first direction.
        ys: Steps along the second.
        *batch: What `loss_fn` is called with.
        chunk_size: How many points are evaluated at once, by `vmap`; 1 takes them in a plain loop. Memory grows with
            it. On a CPU 1 is the fastest, because kernels are slower where every point has weights of its own. On an
            accelerator that one point does not fill, larger values are faster.
        progress: Is called with the number of points just done, `len(xs) len(ys)` in all.

    Returns:
        The losses in float32 at least, shape `(len(ys), len(xs))`: row `i` and column `j` belong to `ys[i]` and
        `xs[j]`, as in a picture.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If directions do not fit the params, there are no coordinates, or the loss is not of shape ().

    >>> w, d = torch.tensor([1.0, 2.0]), (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    >>> grid(lambda w: (w**2).sum(), w, d, [-1.0, 0.0], [-2.0, 0.0, 1.0])
    tensor([[ 0.,  1.],
            [ 4.,  5.],
            [ 9., 10.]])
    """
    if not (isinstance(directions, tuple | list) and len(directions) == 2):
        got = len(directions) if isinstance(directions, tuple | list) else type(directions).__name__
        raise ValueError(f"grid: `directions` must be a pair of trees, got {got}.")
    for k, direction in enumerate(directions):
        checks.same("grid", f"directions[{k}]", direction, params)
    params = tree.detached(params, "grid")
    columns, rows = (_coordinates("grid", name, each, params) for name, each in (("xs", xs), ("ys", ys)))

    def point(x: Tensor, y: Tensor) -> P:
        return tree.add(tree.add(params, tree.scale(x, directions[0])), tree.scale(y, directions[1]))

    points = (columns.repeat(len(rows)), rows.repeat_interleave(len(columns)))
    losses = _at_least_float32(_evaluate("grid", loss_fn, point, points, batch, chunk_size, progress))
    return losses.view(len(rows), len(columns))


def line(
    loss_fn: Loss,
    start: P,
    end: P,
    ts: Coordinates,
    *batch: object,
    chunk_size: int = 1,
    progress: Progress | None = None,
) -> Tensor:
    """Evaluates the loss on the straight line through two solutions: `L((1 - t) a + t b)` for every `t`.

    A low line says that the two lie in one valley. A barrier says less: units of a network can be permuted, and a
    solution is far from its own permutation. Batch normalisation needs the statistics of the batch here, see above.

    Args:
        loss_fn: As in `grid`.
        start: The solution at 0.
        end: The solution at 1.
        ts: Places on the line; those outside of [0, 1] lie beyond the solutions.
        *batch: What `loss_fn` is called with.
        chunk_size: As in `grid`.
        progress: As in `grid`.

    Returns:
        The losses in float32 at least, shape `(len(ts),)`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the solutions differ in structure or shapes, there are no coordinates, or the loss is not of
            shape ().

    >>> line(lambda w: w**2, torch.tensor(1.0), torch.tensor(3.0), [0.0, 0.5, 1.0])
    tensor([1., 4., 9.])

    References:
        Goodfellow et al., 2015 (linear interpolation). arXiv 1412.6544.
    """
    checks.same("line", "end", end, start, "start")
    start, end = tree.detached(start, "line"), tree.detached(end, "line")
    places = _coordinates("line", "ts", ts, start)

    def point(t: Tensor) -> P:
        return tree.add(tree.scale(1 - t, start), tree.scale(t, end))  # not start + t (end - start): exact at both ends

    return _at_least_float32(_evaluate("line", loss_fn, point, (places,), batch, chunk_size, progress))


def _at_least_float32(losses: Tensor) -> Tensor:
    return losses.to(torch.promote_types(losses.dtype, torch.float32))


def _coordinates(where: str, name: str, given: Coordinates, params: Params) -> Tensor:
    """Returns coordinates as a tensor of the params' precision and device."""
    leaves = tree.flatten(params)[0]
    device, dtype = leaves[0].device if leaves else torch.device("cpu"), tree.real_dtype(params)
    if isinstance(given, Tensor):
        if given.is_complex():
            raise TypeError(f"{where}: `{name}` must hold real numbers, got {given.dtype}.")
        values = given.to(device, dtype)
    else:
        values = torch.tensor(_checked_numbers(where, name, given, dtype), dtype=dtype, device=device)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{where}: `{name}` must have shape (n,) with n at least 1, got {tuple(values.shape)}.")
    return values


def _checked_numbers(where: str, name: str, given: Coordinates, dtype: torch.dtype) -> list[float]:
    """Checks a sequence of numbers, which go straight to a dtype: with float32 in between 0.1 would be another one."""
    if not isinstance(given, Iterable):
        got = type(given).__name__
        raise TypeError(f"{where}: `{name}` must be a tensor of shape (n,) or a sequence of numbers, got {got}.")
    numbers = list(given)
    checks.finite(where, **{name: numbers})
    for k, number in enumerate(numbers):
        if callable(number):
            raise TypeError(f"{where}: `{name}` must hold numbers, got {type(number).__name__} at [{k}].")
        if isinstance(number, Real) and abs(float(number)) > torch.finfo(dtype).max:
            raise ValueError(f"{where}: `{name}` must be finite in {dtype}, got {number} at [{k}].")
    return numbers


def _evaluate(
    where: str,
    loss_fn: Loss,
    params_at: Callable[..., Params],
    points: tuple[Tensor, ...],
    batch: tuple[object, ...],
    chunk_size: int,
    progress: Progress | None,
) -> Tensor:
    """Returns the losses at `params_at(*point)` for every point, some points at a time."""
    checks.function(where, loss_fn=loss_fn)
    checks.count(where, chunk_size=chunk_size)

    def loss_at(*point: Tensor) -> Tensor:
        with levels.fresh():
            answer = loss_fn(params_at(*point), *batch)
        loss = answer[0] if isinstance(answer, tuple) and answer else answer
        if not isinstance(loss, Tensor) or loss.ndim:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"{where}: `loss_fn` must return a loss of shape (), or a pair of it and more, got {got}.")
        return loss

    found, since = [], graphs.sequence_number()
    for part in zip(*(torch.split(each, chunk_size) for each in points), strict=True):
        with frames.in_step(), levels.batching():
            losses = torch.vmap(loss_at)(*part) if chunk_size > 1 else loss_at(*(each[0] for each in part))[None]
            found.append(graphs.detach_values(losses, (), since))
        if progress is not None:
            progress(len(part[0]))
    return torch.cat(found)
