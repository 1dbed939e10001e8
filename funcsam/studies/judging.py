"""What is measured of trained models, in evaluation mode and float32, in batches."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import funcsam as fs
from funcsam.studies.problem import Problem, Tensors

SHARPNESS_RADIUS = 0.05
"""Length of the ascent by which sharpness is measured: the default radius of SAM, whatever an optimizer used."""
TOGETHER, ALONE = 2000, 500
"""Examples evaluated at once, by all members together or by one alone."""


def logits(params: Tensors, buffers: Tensors, problem: Problem, x: Tensor) -> Tensor:
    """Returns the outputs of all members, shape `(members, examples, classes)`."""
    if not problem.looped:
        chunks = [fs.ensemble.predict(problem.network, params, buffers, part) for part in torch.split(x, TOGETHER)]
        return torch.cat(chunks, 1)
    rows = []
    for k in range(fs.ensemble.size(params)):
        own = fs.ensemble.member((params, buffers), k)
        chunks = [fs.nn.predict(problem.network, *own, problem.laid_out(part)) for part in torch.split(x, ALONE)]
        rows.append(torch.cat(chunks))
    return torch.stack(rows)


def measure(params: Tensors, buffers: Tensors, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns training loss, test error, noisy fit and held-out error of every member.

    Loss and fit are measured on `problem.examined()`, without augmentation or label smoothing.
    """

    def wrong(x: Tensor, y: Tensor) -> Tensor:
        return (logits(params, buffers, problem, x).argmax(-1) != y).float().mean(-1)

    x, y = problem.examined()
    training = logits(params, buffers, problem, x)
    loss = F.cross_entropy(training.transpose(1, 2), y, reduction="none").mean(-1)
    fit = (training.argmax(-1) == y).float().mean(-1)
    held = wrong(problem.held_x, problem.held_noisy) if len(problem.held_x) else torch.zeros_like(fit)
    return loss, wrong(problem.data.test_x, problem.data.test_y), fit, held


def sharpness(params: Tensors, buffers: Tensors, problem: Problem, radius: float = SHARPNESS_RADIUS) -> Tensor:
    """Returns `L(w + e) - L(w)` of every member, `e = radius g / ||g||`, on the noisy labels of `problem.examined()`.

    Normalisation layers keep their running statistics.
    """

    def loss_fn(params: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(fs.nn.predict(problem.network, params, buffers, x), y)

    ascent = fs.chain(fs.normalize(), fs.scale(radius))
    x, y = problem.examined()
    if problem.looped:
        each = (fs.ensemble.member((params, buffers), k) for k in range(fs.ensemble.size(params)))
        return torch.stack(
            [_rise(ascent, loss_fn, own[0], own[1], problem.laid_out(x), y[k]) for k, own in enumerate(each)]
        )
    climb = fs.ensemble.vectorize(ascent, in_dims=(0, None, 0))
    climbed, _, low = climb.step(params, fs.grad_and_value(loss_fn), climb.init(params), buffers, x, y)
    high = torch.vmap(loss_fn, in_dims=(0, 0, None, 0))(climbed, buffers, x, y)
    return torch.sub(high, low)


def _rise(
    ascent: fs.Transform, loss_fn: Callable[..., Tensor], params: Tensors, buffers: Tensors, x: Tensor, y: Tensor
) -> Tensor:
    """Does it for one model, with gradients summed over batches."""
    parts = list(zip(torch.split(x, ALONE), torch.split(y, ALONE), strict=True))
    shares = [len(labels) / len(y) for _, labels in parts]

    def loss(params: Tensors) -> Tensor:
        values = [share * loss_fn(params, buffers, *part) for share, part in zip(shares, parts, strict=True)]
        return torch.stack(values).sum()

    def grads_fn(params: Tensors) -> tuple[Tensors, Tensor]:
        total, low = {name: torch.zeros_like(leaf) for name, leaf in params.items()}, torch.zeros_like(y[0]).float()
        for share, part in zip(shares, parts, strict=True):
            grads, value = _grads(params, *part)
            total = {name: total[name] + share * grads[name] for name in total}
            low = low + share * value
        return total, low

    def _grads(params: Tensors, *part: Any) -> Any:
        return fs.grad_and_value(loss_fn)(params, buffers, *part)

    climbed, _, low = ascent.step(params, grads_fn, ascent.init(params))
    return torch.sub(loss(climbed), low)
