"""The training loop: one vmapped and compiled ensemble per optimizer, epoch by epoch."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcsam as fs
from funcsam.studies import data

SHARPNESS_RADIUS = 0.05
"""Length of the ascent by which sharpness is measured: the default radius of SAM, whatever an optimizer used."""

Step = Callable[..., tuple[Any, Any, Tensor]]


class Problem(NamedTuple):
    """What every optimizer of a comparison has in common.

    Attributes:
        data: Features and clean labels.
        noisy: The labels trained on, one row per seed, shape `(seeds, n)`.
        network: A module whose parameters the members' take the place of.
        seeds: One member of the ensemble each.
        batch_size: Examples per step.
    """

    data: data.Data
    noisy: Tensor
    network: nn.Module
    seeds: Sequence[int]
    batch_size: int

    def logits(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """Returns the output of one member."""
        out: Tensor = torch.func.functional_call(self.network, params, (x,))
        return out

    def loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean cross-entropy of one member."""
        return F.cross_entropy(self.logits(params, x), y)


class Run(NamedTuple):
    """One optimizer's training at the end of an epoch; never changed, only replaced.

    Attributes:
        epoch: Number of epochs done.
        params: Stacked params, one entry per seed.
        state: Stacked state of the optimizer.
        loss: Mean cross-entropy on the noisy training labels after each epoch, shape `(epochs, seeds)`.
        test_error: Fraction of the clean test set that is wrong after each epoch, likewise.
        noisy_fit: Fraction of the noisy training labels that are reproduced after each epoch, likewise.
        seconds: Median seconds per step within each epoch, shape `(epochs,)`.
    """

    epoch: int
    params: dict[str, Tensor]
    state: Any
    loss: Tensor
    test_error: Tensor
    noisy_fit: Tensor
    seconds: Tensor


def start(tx: fs.Transform, params: dict[str, Tensor]) -> Run:
    """Returns the run before its first epoch."""
    seeds = next(iter(params.values())).shape[0]
    state = optree.tree_map(lambda leaf: leaf.contiguous(), torch.vmap(tx.init)(params))
    none = torch.zeros(0, seeds, dtype=torch.float64)
    return Run(0, params, state, none, none, none, torch.zeros(0, dtype=torch.float64))


def stepper(tx: fs.Transform, problem: Problem) -> Step:
    """Returns `step(params, state, x, y, index)`, one step of every member, each on its own labels and batch."""
    grads_fn = fs.grad_and_value(problem.loss)

    def step(params: Any, state: Any, x: Tensor, y: Tensor, index: Tensor) -> tuple[Any, Any, Any]:
        return tx.step(params, grads_fn, state, x[index], y[index])

    return torch.vmap(step, in_dims=(0, 0, None, 0, 0))


def _no_compiler(error: Exception) -> bool:
    """Tells whether the compiler's compiler failed: missing, not to be executed, or unable to build its output."""
    reason = getattr(error, "inner_exception", error)
    names = ("InvalidCxxCompiler", "CppCompileError", "TritonMissing")
    return isinstance(reason, OSError) or any(type(each).__name__ in names for each in (error, reason))


def compiled(step: Step, run: Run, problem: Problem) -> Step | None:
    """Compiles a step as one graph; `None` where this machine has no working compiler.

    The step is pure: it is tried on the start of the run, and the answer is dropped.
    """
    fast = torch.compile(step, fullgraph=True)
    try:
        warm_up(fast, run, problem)
    except Exception as error:
        if _no_compiler(error):
            return None
        raise
    return fast


def warm_up(step: Step, run: Run, problem: Problem) -> None:
    """Takes two steps and drops what they return, so that no first call is among those that are timed."""
    index = data.order(len(problem.data.y), problem.batch_size, problem.seeds, 0)[0].to(problem.noisy.device)
    params, state, _ = step(run.params, run.state, problem.data.x, problem.noisy, index)
    step(params, state, problem.data.x, problem.noisy, index)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def advance(run: Run, step: Step, problem: Problem) -> Run:
    """Trains one epoch and measures."""
    params, state, seconds = run.params, run.state, []
    orders = data.order(len(problem.data.y), problem.batch_size, problem.seeds, run.epoch).to(problem.noisy.device)
    for index in orders:
        begin = time.perf_counter()
        params, state, _ = step(params, state, problem.data.x, problem.noisy, index)
        _wait(index.device)
        seconds.append(time.perf_counter() - begin)
    loss, test_error, noisy_fit = measure(params, problem)
    return Run(
        run.epoch + 1,
        params,
        state,
        _appended(run.loss, loss),
        _appended(run.test_error, test_error),
        _appended(run.noisy_fit, noisy_fit),
        _appended(run.seconds, torch.tensor(statistics.median(seconds))),
    )


def _appended(rows: Tensor, row: Tensor) -> Tensor:
    return torch.cat([rows, row.to("cpu", torch.float64)[None]])


def measure(params: dict[str, Tensor], problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Returns training loss, test error and noisy fit of every member."""

    def one(params: dict[str, Tensor], noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = problem.logits(params, problem.data.x)
        wrong = problem.logits(params, problem.data.test_x).argmax(-1) != problem.data.test_y
        fit = logits.argmax(-1) == noisy
        return F.cross_entropy(logits, noisy), wrong.float().mean(), fit.float().mean()

    found: tuple[Tensor, Tensor, Tensor] = torch.vmap(one)(params, problem.noisy)
    return found


def sharpness(params: dict[str, Tensor], problem: Problem, radius: float = SHARPNESS_RADIUS) -> Tensor:
    """Returns `L(w + e) - L(w)` of every member, `e = radius g / ||g||`, on the whole noisy training set."""
    ascent = fs.chain(fs.normalize(), fs.scale(radius))
    grads_fn = fs.grad_and_value(problem.loss)

    def one(params: dict[str, Tensor], noisy: Tensor) -> Tensor:
        climbed, _, low = ascent.step(params, grads_fn, ascent.init(params), problem.data.x, noisy)
        high: Tensor = problem.loss(climbed, problem.data.x, noisy)
        return torch.sub(high, low)

    rise: Tensor = torch.vmap(one)(params, problem.noisy)
    return rise
