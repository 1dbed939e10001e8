"""The training loop: one compiled step per optimizer, for all members at once or for one after the other."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcsam as fs
from funcsam.studies import augment, data, judging
from funcsam.studies.problem import Problem, Tensors

Make = Callable[..., fs.Transform]
"""Makes a chain from the hyperparameters that differ between the members; from nothing, where none do."""
Step = Callable[..., tuple[Any, Any, Any]]
TRAINED = ("params", "buffers", "state")
"""Fields of a run that are trees with an entry for every member."""
FIGURES = ("loss", "test_error", "noisy_fit", "held_error")
"""Fields of a run that have a column for every member."""


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
        seconds: Seconds per step of all members within each epoch, shape `(epochs,)`; see `advance`.
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

    def of(self, members: slice | list[int]) -> "Run":
        """Returns the run of some of the members, with their share of the time."""
        whole = self._asdict()
        changed: dict[str, Any] = {name: optree.tree_map(lambda leaf: leaf[members], whole[name]) for name in TRAINED}
        changed |= {name: whole[name][:, members] for name in FIGURES}
        share = changed["loss"].shape[1] / self.loss.shape[1]
        return self._replace(**changed, seconds=share * self.seconds)

    def on(self, device: torch.device) -> "Run":
        """Returns the run with what is trained on a device; the figures stay on the CPU."""
        whole = self._asdict()
        moved: dict[str, Any] = {name: optree.tree_map(lambda leaf: leaf.to(device), whole[name]) for name in TRAINED}
        return self._replace(**moved)


def joined(runs: Sequence[Run], order: Tensor) -> Run:
    """Puts the parts of a run together that several processes have trained side by side.

    Args:
        runs: The parts, on one device.
        order: For every member of the whole, its place among those of all parts, one part after the other.

    Returns:
        The whole, with the time of the slowest part.
    """
    parts = [run._asdict() for run in runs]
    whole: dict[str, Any] = {
        name: optree.tree_map(lambda *leaves: torch.cat(leaves)[order], *(part[name] for part in parts))
        for name in TRAINED
    }
    whole |= {name: torch.cat([part[name] for part in parts], 1)[:, order] for name in FIGURES}
    return runs[0]._replace(**whole, seconds=torch.stack([run.seconds for run in runs]).amax(0))


def start(make: Make, problem: Problem, params: Tensors, buffers: Tensors) -> Run:
    """Returns the run before its first epoch."""
    none = torch.zeros(0, fs.ensemble.size(params), dtype=torch.float64)
    seconds = torch.zeros(0, dtype=torch.float64)
    return Run(0, params, buffers, _vectorized(make, problem).init(params), none, none, none, none, seconds)


def _vectorized(make: Make, problem: Problem) -> fs.Transform:
    """Makes the transform of the ensemble; members have their own buffers, batches and labels."""
    return fs.ensemble.vectorize(make if problem.hyper else make(), problem.hyper or None)


def _loss(problem: Problem) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    kind, smoothing = problem.noisy.device.type, problem.label_smoothing

    def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x), y, label_smoothing=smoothing)

    def in_bfloat16(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16):
            logits = network(x)
        return F.cross_entropy(logits.float(), y, label_smoothing=smoothing)

    return in_bfloat16 if problem.half else loss


def stepper(make: Make, problem: Problem) -> Step:
    """Returns `step(hyper, params, buffers, state, x, y, index, numbers)`, which returns the three in the middle anew.

    It takes a batch `x[index]` with labels `y` of its own for every member, or where members are trained one after the
    other that of one member; `numbers` are those of `augment.draw`.
    """
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(problem.network, _loss(problem)), has_aux=True)
    ensemble = None if problem.looped else _vectorized(make, problem)
    alone = make() if problem.looped and not problem.hyper else None

    def step(
        hyper: Any, params: Any, buffers: Any, state: Any, x: Tensor, y: Tensor, index: Tensor, numbers: Tensor | None
    ) -> tuple[Any, Any, Any]:
        images = _augmented(x[index], numbers, problem)
        if ensemble is not None:
            params, state, (_, buffers) = ensemble.step(params, grads_fn, state, buffers, images, y.gather(1, index))
            return params, buffers, state
        tx = make(**hyper) if alone is None else alone
        params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, problem.laid_out(images), y[index])
        return params, buffers, state

    return step


def _augmented(images: Tensor, numbers: Tensor | None, problem: Problem) -> Tensor:
    if numbers is None or problem.fill is None:
        return images
    flat = images.flatten(0, -4)
    return augment.apply(flat, numbers.flatten(0, -2), problem.augment, problem.fill).view(images.shape)


def _no_compiler(error: Exception) -> bool:
    """Tells whether the compiler's compiler failed: missing, not to be executed, or unable to build its output."""
    reason = getattr(error, "inner_exception", error)
    names = ("InvalidCxxCompiler", "CppCompileError", "TritonMissing")
    return isinstance(reason, OSError) or any(type(each).__name__ in names for each in (error, reason))


def compiled(step: Step, run: Run, problem: Problem) -> Step | None:
    """Compiles a step as one graph; `None` where this machine has no working compiler.

    The step is pure: it is tried on the start of the run, and the answer is dropped.
    """
    whole = torch.compile(step, fullgraph=True)

    def fast(*given: Any) -> tuple[Any, Any, Any]:
        carry: tuple[Any, Any, Any] = whole(*given)
        return _steady(carry) if problem.looped else carry

    try:
        warm_up(fast, run, problem)
    except Exception as error:
        if _no_compiler(error):
            return None
        raise
    return fast


class _Part(NamedTuple):
    """The members that are trained at once: all of them, or one.

    Attributes:
        hyper: Hyperparameters of one member.
        carry: Params, buffers and state.
        labels: What they are trained on.
        batches: Which examples each step takes, one row per step.
        numbers: What they are augmented with, likewise, or `None` for each step.
    """

    hyper: dict[str, Tensor]
    carry: tuple[Any, Any, Any]
    labels: Tensor
    batches: Tensor
    numbers: Any


def _parts(run: Run, problem: Problem, epoch: int, steps: int) -> list[_Part]:
    """Lists who is trained at once in an epoch, with everything that its first steps need, on the device."""
    device = problem.noisy.device
    orders = data.order(len(problem.data.y), problem.batch_size, problem.seeds, epoch)[:steps].to(device)
    numbers: Any = [None] * steps
    if problem.augment:
        size = problem.data.x.shape[-1]
        numbers = augment.draw(steps, problem.batch_size, problem.seeds, epoch, size).to(device)
    carry = (run.params, run.buffers, run.state)
    if not problem.looped:
        return [_Part({}, carry, problem.noisy, orders, numbers)]
    return [
        _Part(
            {name: values[k] for name, values in problem.hyper.items()},
            _laid_out(fs.ensemble.member(carry, k), problem),
            problem.noisy[k],
            orders[:, k],
            numbers[:, k] if problem.augment else numbers,
        )
        for k in range(len(problem.seeds))
    ]


def _laid_out(carry: Any, problem: Problem) -> Any:
    """Puts the weights of convolutions into the layout of the images."""
    return _steady(optree.tree_map(lambda leaf: problem.laid_out(leaf) if leaf.ndim == 4 else leaf, carry))


def _steady(carry: Any) -> Any:
    """Gives the weights of 1x1 convolutions the same strides after every step, or it would be compiled again.

    For them every layout is the same in memory, and what comes out of an operation names any of them.
    """

    def steady(leaf: Tensor) -> Tensor:
        if leaf.ndim != 4 or leaf.shape[2:] != (1, 1):
            return leaf
        return leaf.contiguous().as_strided(leaf.shape, (leaf.shape[1], 1, 1, 1))

    return optree.tree_map(steady, carry)


def _stacked(carries: list[Any]) -> Any:
    return optree.tree_map(lambda leaf: leaf.contiguous(), fs.ensemble.stack(carries))


def warm_up(step: Step, run: Run, problem: Problem) -> None:
    """Takes two steps and drops what they return, so that no first call is among those that are timed."""
    part = _parts(run, problem, 0, steps=1)[0]
    carry = part.carry
    for _ in range(2):
        carry = step(part.hyper, *carry, problem.data.x, part.labels, part.batches[0], part.numbers[0])


def advance(run: Run, step: Step, problem: Problem) -> Run:
    """Trains one epoch and measures.

    The time of a step is the median over the epoch. On an accelerator it is the mean, because the steps of an epoch are
    handed over without waiting for any of them. Where members are trained one after the other their times are added.
    """
    waits = problem.noisy.device.type == "cpu"
    carries, seconds = [], []
    for part in _parts(run, problem, run.epoch, problem.steps()):
        carry, times = part.carry, [_now(problem)]
        for index, numbers in zip(part.batches, part.numbers, strict=True):
            carry = step(part.hyper, *carry, problem.data.x, part.labels, index, numbers)
            if waits:
                times.append(time.perf_counter())
        if waits:
            seconds.append(statistics.median(after - before for before, after in itertools.pairwise(times)))
        else:
            seconds.append((_now(problem) - times[0]) / len(part.batches))
        carries.append(carry)
    carry = _stacked(carries) if problem.looped else carries[0]
    figures = judging.measure(carry[0], carry[1], problem)
    return Run(
        run.epoch + 1,
        carry[0],
        carry[1],
        carry[2],
        _appended(run.loss, figures[0]),
        _appended(run.test_error, figures[1]),
        _appended(run.noisy_fit, figures[2]),
        _appended(run.held_error, figures[3]),
        _appended(run.seconds, torch.tensor(sum(seconds))),
    )


def _now(problem: Problem) -> float:
    """Returns the time at which everything asked of the device so far is done."""
    device = problem.noisy.device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _appended(rows: Tensor, row: Tensor) -> Tensor:
    return torch.cat([rows, row.cpu().double()[None]])
