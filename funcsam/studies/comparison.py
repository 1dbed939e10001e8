"""The comparison: the same networks, labels and batches under several optimizers."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import optree
import torch
from rich.console import Console
from torch import Tensor

import funcsam as fs
from funcsam.studies import checkpoint, data, networks, optimizers, report, training
from funcsam.studies.bars import Bars
from funcsam.studies.errors import StudyError
from funcsam.studies.training import Problem, Run, Step, Tensors

SAVE_EVERY = 10.0
"""Seconds between checkpoints, at least."""


class Settings(NamedTuple):
    """What a comparison is made of; see `funcsam compare --help`."""

    data: str
    noise: float
    network: str
    optimizers: tuple[str, ...]
    seeds: int
    epochs: int
    batch_size: int
    lr: float
    schedule: str
    device: str
    compile: bool
    hyper_sweep: str | None = None

    def common(self) -> dict[str, Any]:
        """Returns what must not change between a run and its continuation, as plain values."""
        return {name: value for name, value in self._asdict().items() if name != "optimizers"}

    def title(self) -> str:
        """Returns the comparison in one line."""
        noise = f"{100 * self.noise:g} % of the training labels random"
        sweep = f", {self.hyper_sweep.partition('=')[0]} chosen on held-out noisy labels" if self.hyper_sweep else ""
        return f"{self.data}, {noise}, {self.network}, {self.epochs} epochs, {self.seeds} seeds{sweep}"


def _check(settings: Settings) -> None:
    for name in ("seeds", "epochs", "batch_size"):
        value = getattr(settings, name)
        if value < 1:
            raise StudyError(f"compare: `--{name.replace('_', '-')}` must be at least 1, got {value}.")
    if not 0 <= settings.noise <= 1:
        raise StudyError(f"compare: `--noise` must be in [0, 1], got {settings.noise}.")
    if not 0 <= settings.lr < math.inf:
        raise StudyError(f"compare: `--lr` must be finite and non-negative, got {settings.lr}.")
    twice = [name for k, name in enumerate(settings.optimizers) if name in settings.optimizers[:k]]
    if twice:
        raise StudyError(f"compare: every `--optimizer` must be given once, got {twice[0]} twice.")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise StudyError(f"compare: `--device` must be one that torch finds here, e.g. cpu, got {name}.") from None
    return device


def _problem(settings: Settings, device: torch.device) -> tuple[Problem, Tensors, Tensors]:
    """Returns what is trained on, and the stacked params and buffers of the seeds."""
    parts = data.load(settings.data)
    seeds = range(settings.seeds)
    noisy = torch.stack([data.noisy(parts.y, parts.classes, settings.noise, seed) for seed in seeds])
    kept, held = torch.arange(len(parts.y)), torch.arange(0)
    if settings.hyper_sweep:
        kept, held = data.held_out(len(parts.y))
    if settings.batch_size > len(kept):
        raise StudyError(
            f"compare: `--batch-size` must be at most the {len(kept)} training examples, got {settings.batch_size}."
        )
    build = networks.named(settings.network, parts.x.shape[1], parts.classes, data.SHAPES.get(settings.data))
    params, buffers = fs.ensemble.init(build, seeds)
    given = parts._replace(x=parts.x[kept], y=parts.y[kept])
    moved: dict[str, Any] = {
        name: part.to(device) for name, part in given._asdict().items() if isinstance(part, Tensor)
    }
    labels = (noisy[:, kept].to(device), parts.x[held].to(device), noisy[:, held].to(device))
    problem = Problem(given._replace(**moved), *labels, build().to(device), seeds, settings.batch_size)
    params, buffers = ({name: leaf.to(device) for name, leaf in each.items()} for each in (params, buffers))
    return problem, params, buffers


class Entrant(NamedTuple):
    """An optimizer of a comparison.

    Attributes:
        tx: Its chain, for the whole ensemble.
        problem: What it trains on: with a sweep every seed has a member for each value.
        values: The values that are swept; empty if none are.
    """

    tx: fs.Transform
    problem: Problem
    values: tuple[float, ...]


class Comparison:
    """A comparison and where it is kept.

    Args:
        settings: What is compared.
        out: Folder of the checkpoints and of what is reported.
        resume: Whether to go on from the checkpoints in it.
        console: Where to say what happens.

    Raises:
        StudyError: If the settings make no sense, or the folder holds a run that would be lost.
    """

    def __init__(self, settings: Settings, out: Path, resume: bool, console: Console) -> None:
        _check(settings)
        self.settings, self.out, self.console = settings, out, console
        self.device = _device(settings.device)
        self.swept, self.values = optimizers.sweep(settings.hyper_sweep) if settings.hyper_sweep else ("", ())
        problem, params, buffers = _problem(settings, self.device)
        self.entrants = {spec: self._entrant(spec, problem) for spec in settings.optimizers}
        if self.swept and not any(entrant.values for entrant in self.entrants.values()):
            raise StudyError(
                "compare: `--hyper-sweep` must name an option that an `--optimizer` has and does not give itself, "
                f"got {self.swept}."
            )
        self.runs = {}
        for spec, entrant in self.entrants.items():
            copies = len(entrant.values) or 1
            stacked = ({name: torch.cat([leaf] * copies) for name, leaf in each.items()} for each in (params, buffers))
            self.runs[spec] = training.start(entrant.tx, *stacked)
        self.compiled = dict.fromkeys(self.runs, False)
        self._saved = dict.fromkeys(self.runs, 0)
        if out.exists() and not out.is_dir():
            raise StudyError(f"compare: `--out` must be a folder, got the file {out}.")
        if resume:
            self._restore()
        else:
            self._refuse_to_lose()
        checkpoint.probe(out)

    def _entrant(self, spec: str, problem: Problem) -> Entrant:
        total = self.settings.epochs * (len(problem.data.y) // self.settings.batch_size)
        maker = optimizers.parse(spec, self.settings.lr, self.settings.schedule, total, self.swept or None)
        if maker.sweeps is None:
            return Entrant(training.vectorized(maker.make, None), problem, ())
        for value in self.values:
            maker.make(**{maker.sweeps: value})  # refuses what is out of range
        each = torch.tensor(self.values, device=self.device).repeat_interleave(self.settings.seeds)
        many = problem.many(len(self.values))
        return Entrant(training.vectorized(maker.make, {maker.sweeps: each}), many, self.values)

    def _path(self, spec: str) -> Path:
        return self.out / "checkpoints" / (re.sub(r"[^A-Za-z0-9._]+", "-", spec) + ".pt")

    def _refuse_to_lose(self) -> None:
        """Lets a finished run be repeated, as its repetition gives the same figures; keeps any other."""
        results, found = self.out / "results.json", sorted((self.out / "checkpoints").glob("*.pt"))
        if not results.exists() and not found:
            return
        try:
            same = json.loads(results.read_text())["settings"] == self.described()
        except (OSError, ValueError, KeyError, TypeError):
            raise StudyError(
                f"compare: `--out` must be a folder without an unfinished run, got {self.out}. "
                "Continue that run with --resume, or choose another --out."
            ) from None
        if not same:
            raise StudyError(
                f"compare: `--out` must be a folder without a run of other settings, got {self.out}. "
                "Choose another --out."
            )
        for path in found:
            if checkpoint.load(path, self.settings.common())["epoch"] < self.settings.epochs:
                raise StudyError(
                    f"compare: `--out` must be a folder without an unfinished run, got {self.out}. "
                    "Continue that run with --resume, or choose another --out."
                )

    def described(self) -> dict[str, Any]:
        """Returns the settings as JSON has them."""
        return {**self.settings.common(), "optimizers": list(self.settings.optimizers)}

    def _restore(self) -> None:
        for spec, fresh in self.runs.items():
            path = self._path(spec)
            if not path.exists():
                continue
            content = checkpoint.load(path, {**self.settings.common(), "optimizer": spec})
            run: Any = content.get("run")
            if not _alike(run, fresh):
                raise StudyError(
                    f"checkpoint: `{path}` must hold the state of {spec}, got that of another funcsam. "
                    "Delete the file to train that optimizer from the start."
                )
            moved = {
                name: optree.tree_map(lambda leaf: leaf.to(self.device), run[name])
                for name in ("params", "buffers", "state")
            }
            self.runs[spec] = Run(**{**run, **moved})
            self.compiled[spec] = content["compiled"]
            self._saved[spec] = run["epoch"]

    def save(self) -> None:
        """Writes the checkpoints of the optimizers that went on since the last call."""
        for spec, run in self.runs.items():
            if run.epoch > self._saved[spec]:
                settings = {**self.settings.common(), "optimizer": spec}
                content = {"epoch": run.epoch, "compiled": self.compiled[spec], "run": run._asdict()}
                checkpoint.save(self._path(spec), settings, content)
                self._saved[spec] = run.epoch

    def epochs_done(self) -> int:
        """Returns the number of epochs that every optimizer has done."""
        return min(run.epoch for run in self.runs.values())

    def _steps(self, bars: Bars) -> dict[str, Step]:
        """Makes every optimizer's step ready: compiled where asked for and possible, and warm."""
        plain = {spec: training.stepper(entrant.tx, entrant.problem) for spec, entrant in self.entrants.items()}
        todo = [spec for spec, run in self.runs.items() if run.epoch < self.settings.epochs]
        fast = self._compile(plain, todo, bars) if self.settings.compile else None
        for spec in todo:
            self.compiled[spec] = fast is not None
        if fast is not None:
            return fast
        for spec in todo:
            training.warm_up(plain[spec], self.runs[spec], self.entrants[spec].problem)
        return {spec: plain[spec] for spec in todo}

    def _compile(self, plain: dict[str, Step], todo: list[str], bars: Bars) -> dict[str, Step] | None:
        fast: dict[str, Step] = {}
        with torch._dynamo.config.patch(recompile_limit=8 + 2 * len(todo)):  # all share one code object
            for spec in todo:
                bars.say(spec, "compiling")
                step = training.compiled(plain[spec], self.runs[spec], self.entrants[spec].problem)
                if step is None:
                    self.console.print(
                        "compare: no working C++ compiler was found, so the steps run eagerly and take longer.",
                        soft_wrap=True,
                    )
                    return None
                bars.say(spec, "compiled")
                fast[spec] = step
        return fast

    def train(self) -> None:
        """Trains all optimizers side by side, epoch by epoch, so that a busy machine slows all of them alike."""
        with Bars(self.settings.epochs, self.runs, self.console) as bars:
            steps = self._steps(bars)
            saved = time.monotonic()
            for epoch in range(self.settings.epochs):
                for spec in steps:
                    if self.runs[spec].epoch > epoch:
                        continue
                    self.runs[spec] = training.advance(self.runs[spec], steps[spec], self.entrants[spec].problem)
                    bars.show(spec, self.runs[spec])
                if time.monotonic() - saved >= SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def report(self) -> None:
        """Writes the files and prints the table."""
        runs, sharp, sweeps = {}, {}, {}
        for spec, (_, problem, values) in self.entrants.items():
            run = self.runs[spec]
            rise = training.sharpness(run.params, run.buffers, problem).cpu()
            name, members = spec, slice(None)
            if values:
                best = report.best(run, len(values))
                name = optimizers.with_option(spec, self.swept, values[best])
                name = f"{name} (chosen)" if name in self.entrants else name
                members = slice(best * self.settings.seeds, (best + 1) * self.settings.seeds)
                sweeps[name] = report.sweep(run, self.swept, values)
            runs[name], sharp[name] = run.of(members), rise[members]
        final = report.summary(runs, sharp)
        compiled = dict(zip(runs, self.compiled.values(), strict=True))
        content = report.results(self.described(), runs, final, compiled, sweeps)
        report.write(self.out, content, self.settings.title(), runs, sweeps)
        out = Console()
        out.print(report.table(final, self.settings.title()))
        for name, each in sweeps.items():
            out.print(report.sweep_table(each, name))
        out.print(
            f"Sharpness: L(w + e) - L(w) on the noisy training set, |e| = {training.SHARPNESS_RADIUS}.",
            self._choices(),
            f"Written: {self.out / 'results.json'}, {self.out / 'comparison.png'}",
            sep="\n",
            soft_wrap=True,
            highlight=False,
        )

    def _choices(self) -> str:
        """Says how hyperparameters were chosen."""
        if not self.swept:
            return "Radii were fixed beforehand, not chosen by test error."
        held = len(next(iter(self.entrants.values())).problem.held_x)
        return (
            f"{self.swept} was chosen on {held} training examples with noisy labels that no optimizer trained on, "
            "never on the test set."
        )


def _alike(found: Any, fresh: Run) -> bool:
    """Tells whether what a checkpoint holds has the fields, structure and shapes of a run."""
    if not isinstance(found, dict) or set(found) != set(Run._fields):
        return False
    trees: list[Any] = [[run[name] for name in ("params", "buffers", "state")] for run in (found, fresh._asdict())]
    ours, theirs = (optree.tree_flatten(each) for each in trees)
    if ours[1] != theirs[1]:
        return False
    pairs: list[Any] = list(zip(ours[0], theirs[0], strict=True))
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
