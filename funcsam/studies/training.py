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

Step = Callable[..., tuple[Any, Any, Any]]
Tensors = dict[str, Tensor]


class Problem(NamedTuple):
    """What an optimizer of a comparison is given.

    Attributes:
        data: Features and clean labels; of the training part what is trained on.
        noisy: The labels trained on, one row per member, shape `(members, n)`.
        held_x: Features held out of the training part, for choosing a hyperparameter; often none.
        held_noisy: Their labels, as noisy as the others, shape `(members, held out)`.
        network: A module whose tensors the members' take the place of.
        seeds: What each member starts from and shuffles by.
        batch_size: Examples per step.
    """

    data: data.Data
    noisy: Tensor
    held_x: Tensor
    held_noisy: Tensor
    network: nn.Module
    seeds: Sequence[int]
    batch_size: int

    def many(self, copies: int) -> "Problem":
        """Returns the problem of an ensemble in which every seed has several members, one sweep value after another."""
        noisy, held = (rows.repeat(copies, 1) for rows in (self.noisy, self.held_noisy))
        return self._replace(noisy=noisy, held_noisy=held, seeds=list(self.seeds) * copies)


class Run(NamedTuple):
    """One optimizer's training at the end of an epoch; never changed, only replaced.

    Attributes:
        epoch: Number of epochs done.
        params: Stacked params, one entry per member.
        buffers: Stacked buffers, likewise.
        state: Stacked state of the optimizer.
        loss: Mean cross-entropy on the noisy training labels after each epoch, shape `(epochs, members)`.
        test_error: Fraction of the clean test set that is wrong after each epoch, likewise.
        noisy_fit: Fraction of the noisy training labels that are reproduced after each epoch, likewise.
        held_error: Fraction of the noisy labels held out that are not predicted after each epoch, likewise; zero if
            nothing is held out.
        seconds: Median seconds per step within each epoch, shape `(epochs,)`.
    """

    epoch: int
    params: Tensors
    buffers: Tensors
    state: Any
    loss: Tensor
    test_error: Tensor
    noisy_fit: Tensor
    held_error: Tensor
    seconds: Tensor

    def of(self, members: slice) -> "Run":
        """Returns the run of some of the members, with their share of the time."""
        whole = self._asdict()
        changed: dict[str, Any] = {
            name: optree.tree_map(lambda leaf: leaf[members], whole[name]) for name in ("params", "buffers", "state")
        }
        changed |= {name: whole[name][:, members] for name in ("loss", "test_error", "noisy_fit", "held_error")}
        share = changed["loss"].shape[1] / self.loss.shape[1]
        return self._replace(**changed, seconds=share * self.seconds)


def start(tx: fs.Transform, params: Tensors, buffers: Tensors) -> Run:
    """Returns the run before its first epoch; `tx` is vectorised."""
    none = torch.zeros(0, fs.ensemble.size(params), dtype=torch.float64)
    seconds = torch.zeros(0, dtype=torch.float64)
    return Run(0, params, buffers, tx.init(params), none, none, none, none, seconds)


def vectorized(make: Callable[..., fs.Transform], hyper: dict[str, Tensor] | None) -> fs.Transform:
    """Makes the transform of an ensemble; members have their own buffers, batches and labels."""
    return fs.ensemble.vectorize(make if hyper else make(), hyper or None)


def stepper(tx: fs.Transform, problem: Problem) -> Step:
    """Returns `step(params, buffers, state, x, y, index)`: a step of every member on a batch and labels of its own."""
    loss_fn = fs.nn.loss_fn(problem.network, lambda network, x, y: F.cross_entropy(network(x), y))
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True)

    def step(params: Any, buffers: Any, state: Any, x: Tensor, y: Tensor, index: Tensor) -> tuple[Any, Any, Any]:
        params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, x[index], y.gather(1, index))
        return params, buffers, state

    return step


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
    carry = (run.params, run.buffers, run.state)
    for _ in range(2):
        carry = step(*carry, problem.data.x, problem.noisy, index)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def advance(run: Run, step: Step, problem: Problem) -> Run:
    """Trains one epoch and measures."""
    carry, seconds = (run.params, run.buffers, run.state), []
    orders = data.order(len(problem.data.y), problem.batch_size, problem.seeds, run.epoch).to(problem.noisy.device)
    for index in orders:
        begin = time.perf_counter()
        carry = step(*carry, problem.data.x, problem.noisy, index)
        _wait(index.device)
        seconds.append(time.perf_counter() - begin)
    loss, test_error, noisy_fit, held_error = measure(carry[0], carry[1], problem)
    return Run(
        run.epoch + 1,
        *carry,
        _appended(run.loss, loss),
        _appended(run.test_error, test_error),
        _appended(run.noisy_fit, noisy_fit),
        _appended(run.held_error, held_error),
        _appended(run.seconds, torch.tensor(statistics.median(seconds))),
    )


def _appended(rows: Tensor, row: Tensor) -> Tensor:
    return torch.cat([rows, row.to("cpu", torch.float64)[None]])


def measure(params: Tensors, buffers: Tensors, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns training loss, test error, noisy fit and held-out error of every member, in evaluation mode."""

    def logits(x: Tensor) -> Tensor:
        out: Tensor = fs.ensemble.predict(problem.network, params, buffers, x)
        return out

    def wrong(x: Tensor, y: Tensor) -> Tensor:
        return (logits(x).argmax(-1) != y).float().mean(-1)

    training = logits(problem.data.x)
    loss = F.cross_entropy(training.transpose(1, 2), problem.noisy, reduction="none").mean(-1)
    fit = (training.argmax(-1) == problem.noisy).float().mean(-1)
    held = wrong(problem.held_x, problem.held_noisy) if len(problem.held_x) else torch.zeros_like(fit)
    return loss, wrong(problem.data.test_x, problem.data.test_y), fit, held


def sharpness(params: Tensors, buffers: Tensors, problem: Problem, radius: float = SHARPNESS_RADIUS) -> Tensor:
    """Returns `L(w + e) - L(w)` of every member, `e = radius g / ||g||`, on the whole noisy training set.

    In evaluation mode: normalisation layers keep their running statistics.
    """

    def loss_fn(params: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(fs.nn.predict(problem.network, params, buffers, x), y)

    climb = fs.ensemble.vectorize(fs.chain(fs.normalize(), fs.scale(radius)), in_dims=(0, None, 0))
    batch = (buffers, problem.data.x, problem.noisy)
    climbed, _, low = climb.step(params, fs.grad_and_value(loss_fn), climb.init(params), *batch)
    high = torch.vmap(loss_fn, in_dims=(0, 0, None, 0))(climbed, *batch)
    return torch.sub(high, low)
