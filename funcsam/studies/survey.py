"""The loss around two solutions of a study, and between them: what pictures of landscapes show.

landscape = survey.around(network, {"sgd": (params, buffers), "sam": (others, their_buffers)}, x, y, title)
paths = pictures.write(out, landscape)
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import funcsam as fs
from funcsam.studies.errors import StudyError

RADIUS = 1.0
"""Half the side of the pictures, in norms of a filter."""
POINTS = 31
"""Points along a side."""
STATISTICS = "batch-norm statistics taken from them at every point"


class Landscape(NamedTuple):
    """The loss around two solutions, and on the line between them.

    Attributes:
        names: What the two are called.
        xs: Steps along the first direction, in norms of a filter, shape `(n,)`.
        ys: Steps along the second, shape `(m,)`.
        losses: One grid each, shape `(2, m, n)`; the solutions are at `x = y = 0`.
        centres: The losses of the solutions, shape `(2,)`.
        ts: Places on the line, 0 the first solution and 1 the second, shape `(k,)`.
        line: The losses there, shape `(k,)`.
        errors: Fractions of a test set that are wrong there, shape `(k,)`, or `None`.
        title: What was trained, in one line.
        caption: What was evaluated and how, in one line.
    """

    names: tuple[str, str]
    xs: Tensor
    ys: Tensor
    losses: Tensor
    centres: Tensor
    ts: Tensor
    line: Tensor
    errors: Tensor | None
    title: str
    caption: str


@contextlib.contextmanager
def _batch_statistics(network: nn.Module) -> Iterator[bool]:
    """Lets batch normalisation take, and return as buffers, the statistics of the batch; all else is evaluated.

    Yields:
        Whether there is any.
    """
    modes = [(module, module.training) for module in network.modules()]
    norms = [module for module, _ in modes if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        network.eval()
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        yield bool(norms)
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def work(points: int = POINTS, test: bool = False) -> int:
    """Returns how many evaluations `around` takes, for a progress bar."""
    return 2 * points**2 + (2 if test else 1) * _places(points)


def _places(points: int) -> int:
    return 6 * (points // 4 or 1) + 1


def around(
    network: nn.Module,
    solutions: Mapping[str, tuple[Any, Any]],
    x: Tensor,
    y: Tensor,
    title: str,
    test: tuple[Tensor, Tensor] | None = None,
    radius: float = RADIUS,
    points: int = POINTS,
    seed: int = 0,
    chunk_size: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Landscape:
    """Evaluates the cross-entropy around two solutions of one network, and on the line between them.

    Batch normalisation takes the statistics of `x` at every point, as running statistics fit the solutions alone; test
    errors are those of the network with the statistics of `x`, too. Dropout is off.

    Args:
        network: The module; it is left as it was.
        solutions: Two, by name: `(params, buffers)` each.
        x: What the loss is evaluated on, as one batch.
        y: Their labels, those that were trained on.
        title: What was trained, in one line.
        test: Test inputs and labels.
        radius: Half the side of the square, in norms of a filter.
        points: Points along a side, an odd number.
        seed: Where the directions come from.
        chunk_size: Points at once, see `fs.landscape.grid`.
        progress: Is called with the number of evaluations just done, `work(points, test is not None)` in all.

    Raises:
        StudyError: If there are not two solutions, or the numbers make no sense.
    """
    if len(solutions) != 2:
        raise StudyError(f"landscape: the solutions must be two, got {len(solutions)}.")
    if points < 3 or not points % 2:
        raise StudyError(
            f"landscape: `--points` must be odd and at least 3, got {points}. The solution is the point in the middle."
        )
    if not 0 < radius < math.inf:
        raise StudyError(f"landscape: `--radius` must be finite and positive, got {radius}.")
    steps = torch.linspace(-radius, radius, points)
    steps[points // 2] = 0.0
    quarter = _places(points) // 6
    ts = torch.arange(-quarter, 5 * quarter + 1) / (4 * quarter)  # 0 and 1 are among them, exactly
    loss_fn = fs.nn.loss_fn(network, lambda network, x, y: F.cross_entropy(network(x), y))
    how: dict[str, Any] = {"chunk_size": chunk_size, "progress": progress}
    (first, buffers), (second, _) = solutions.values()

    def wrong(params: Any, buffers: Any, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> Tensor:
        _, fitting = loss_fn(params, buffers, x, y)
        logits: Tensor = fs.nn.predict(network, params, fitting, test_x)
        return torch.ne(logits.argmax(-1), test_y).float().mean()

    with _batch_statistics(network) as normalised:
        grids = [
            fs.landscape.grid(loss_fn, params, fs.landscape.directions(params, seed), steps, steps, own, x, y, **how)
            for params, own in solutions.values()
        ]
        line = fs.landscape.line(loss_fn, first, second, ts, buffers, x, y, **how)
        errors = fs.landscape.line(wrong, first, second, ts, buffers, x, y, *test, **how) if test else None
    losses = torch.stack(grids).cpu().double()
    caption = f"loss on {len(x)} training examples" + (f", {STATISTICS}" if normalised else "")
    caption += f"; on the line also errors on {len(test[0])} test examples" if test else ""
    names = tuple(solutions)
    return Landscape(
        (names[0], names[1]),
        steps,
        steps,
        losses,
        losses[:, points // 2, points // 2],
        ts,
        line.cpu().double(),
        None if errors is None else errors.cpu().double(),
        title,
        caption,
    )
