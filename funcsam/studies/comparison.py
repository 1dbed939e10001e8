"""The comparison: the same networks, labels and batches under several optimizers."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import optree
import torch
from rich.console import Console
from torch import Tensor

from funcsam.studies import checkpoint, judging, optimizers, problem, report, training
from funcsam.studies.bars import Bars
from funcsam.studies.errors import StudyError
from funcsam.studies.problem import Problem
from funcsam.studies.ranks import Ranks
from funcsam.studies.settings import Settings
from funcsam.studies.training import Make, Run, Step

T = TypeVar("T")

SAVE_EVERY = 10.0
"""Seconds between checkpoints, at least."""


class Entrant(NamedTuple):
    """An optimizer of a comparison.

    Attributes:
        make: Makes its chain.
        problem: What it trains on: with a sweep every seed has a member for each value.
        values: The values that are swept; empty if none are.
    """

    make: Make
    problem: Problem
    values: tuple[float, ...]


class Comparison:
    """A comparison and where it is kept.

    Args:
        settings: What is compared.
        out: Folder of the checkpoints and of what is reported.
        resume: Whether to go on from the checkpoints in it.
        console: Where to say what happens.
        ranks: The processes that share the seeds; see `share_out`.

    Raises:
        StudyError: If the settings make no sense, or the folder holds a run that would be lost.
    """

    def __init__(self, settings: Settings, out: Path, resume: bool, console: Console, ranks: Ranks) -> None:
        self.out, self.console, self.ranks = out, console, ranks
        self.device, self.stopping = ranks.device, False
        self.swept, self.values = optimizers.sweep(settings.hyper_sweep) if settings.hyper_sweep else ("", ())
        given, params, buffers, self.settings = problem.make(settings, self.device)
        self.entrants = {spec: self._entrant(spec, given) for spec in settings.optimizers}
        if self.swept and not any(entrant.values for entrant in self.entrants.values()):
            raise StudyError(
                "compare: `--hyper-sweep` must name an option that an `--optimizer` has and does not give itself, "
                f"got {self.swept}."
            )
        self.runs = {}
        for spec, entrant in self.entrants.items():
            copies = len(entrant.values) or 1
            stacked = ({name: torch.cat([leaf] * copies) for name, leaf in each.items()} for each in (params, buffers))
            self.runs[spec] = training.start(entrant.make, entrant.problem, *stacked)
        self.compiled = dict.fromkeys(self.runs, False)
        self._saved = dict.fromkeys(self.runs, 0)
        if ranks.first:
            self._open(resume)

    def _open(self, resume: bool) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise StudyError(f"compare: `--out` must be a folder, got the file {self.out}.")
        if resume:
            self._restore()
        else:
            self._refuse_to_lose()
        checkpoint.probe(self.out)

    def share_out(self) -> None:
        """Leaves this process its own seeds, where several share them.

        Nothing is sent within an epoch, and no figure depends on how many processes there are.
        """
        if self.ranks.size == 1:
            return
        runs, self.compiled, self._saved = self.ranks.of_first((self.runs, self.compiled, self._saved))
        for spec, entrant in self.entrants.items():
            own = self._members(spec, self.ranks.rank)
            self.entrants[spec] = entrant._replace(problem=entrant.problem.of(own))
            self.runs[spec] = runs[spec].of(own)._replace(seconds=runs[spec].seconds).on(self.device)

    def _members(self, spec: str, rank: int) -> list[int]:
        return self.ranks.share(self.settings.seeds, len(self.entrants[spec].values) or 1, rank)

    def _gathered(self, spec: str, own: T, join: Callable[[list[T], Tensor], T]) -> T:
        """Makes of what each process has of its members that of all; processes but the first get their own back."""
        parts = self.ranks.gathered(own)
        if len(parts) < 2:
            return own
        members = [k for rank in range(self.ranks.size) for k in self._members(spec, rank)]
        return join(parts, torch.tensor(members).argsort())

    def _whole(self, spec: str) -> Run:
        return self._gathered(spec, self.runs[spec], training.joined)

    def _entrant(self, spec: str, given: Problem) -> Entrant:
        settings, total = self.settings, self.settings.epochs * given.steps()
        maker = optimizers.parse(spec, settings.lr, settings.schedule, total, self.swept or None, settings.weight_decay)
        if maker.sweeps is None:
            return Entrant(maker.make, given, ())
        for value in self.values:
            maker.make(**{maker.sweeps: value})  # refuses what is out of range
        return Entrant(maker.make, given.swept(maker.sweeps, self.values), self.values)

    def _path(self, spec: str) -> Path:
        return checkpoint.path(self.out, spec)

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
            self.runs[spec] = Run(**run).on(self.device)
            self.compiled[spec] = content["compiled"]
            self._saved[spec] = run["epoch"]

    def save(self) -> None:
        """Writes the checkpoints of the optimizers that went on since the last call."""
        for spec in self.runs:
            if self.runs[spec].epoch == self._saved[spec]:
                continue
            run = self._whole(spec).on(torch.device("cpu"))
            if self.ranks.first:
                settings = {**self.settings.common(), "optimizer": spec}
                content = {"epoch": run.epoch, "compiled": self.compiled[spec], "run": run._asdict()}
                checkpoint.save(self._path(spec), settings, content)
            self._saved[spec] = run.epoch

    def stop(self) -> None:
        """Stops the training: at once, or where there are several processes when all of them are through an epoch."""
        if self.ranks.size == 1:
            raise KeyboardInterrupt
        self.stopping = True

    def epochs_done(self) -> int:
        """Returns the number of epochs that every optimizer has done."""
        return min(run.epoch for run in self.runs.values())

    def _steps(self, bars: Bars) -> dict[str, Step]:
        """Makes every optimizer's step ready: compiled where asked for and possible, and warm."""
        plain = {spec: training.stepper(entrant.make, entrant.problem) for spec, entrant in self.entrants.items()}
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
                    save, stop = self.ranks.agree(time.monotonic() - saved >= SAVE_EVERY, self.stopping)
                    if stop:
                        raise KeyboardInterrupt
                    if save:
                        self.save()
                        saved = time.monotonic()
        self.save()

    def report(self) -> None:
        """Writes the files and prints the table, on the first process."""
        whole = {spec: (self._whole(spec), self._sharpness(spec)) for spec in self.entrants}
        if not self.ranks.first:
            return
        runs, sharp, sweeps = {}, {}, {}
        for spec, (run, rise) in whole.items():
            name, members, values = spec, slice(None), self.entrants[spec].values
            if values:
                best = report.best(run, len(values))
                name = optimizers.with_option(spec, self.swept, values[best])
                name = f"{name} (chosen)" if name in self.entrants else name
                members = slice(best * self.settings.seeds, (best + 1) * self.settings.seeds)
                sweeps[name] = report.sweep(run, self.swept, values)
            runs[name], sharp[name] = run.of(members), rise[members]
        final = report.summary(runs, sharp)
        compiled = dict(zip(runs, self.compiled.values(), strict=True))
        examples = self._examples()
        content = report.results(self.described(), runs, final, compiled, sweeps, self.ranks.size)
        content |= {"examples": examples}
        report.write(self.out, content, self.settings.title(), runs, sweeps)
        out = Console()
        out.print(report.table(final, self.settings.title(), self.settings.noise > 0))
        for name, each in sweeps.items():
            out.print(report.sweep_table(each, name))
        out.print(
            f"Sharpness: L(w + e) - L(w) on {self._examined(examples)}, |e| = {judging.SHARPNESS_RADIUS}.",
            *self._copy(),
            self._choices(),
            f"Written: {self.out / 'results.json'}, {self.out / 'comparison.png'}",
            sep="\n",
            soft_wrap=True,
            highlight=False,
        )

    def _sharpness(self, spec: str) -> Tensor:
        run = self.runs[spec]
        rise = judging.sharpness(run.params, run.buffers, self.entrants[spec].problem).cpu()
        return self._gathered(spec, rise, lambda parts, order: torch.cat(parts)[order])

    def _examples(self) -> dict[str, int]:
        """Counts the examples that are trained on, of these those that loss, fit and sharpness are measured on, ..."""
        given = next(iter(self.entrants.values())).problem
        return {
            "trained_on": len(given.data.y),
            "measured_on": len(given.examined()[0]),
            "held_out": len(given.held_x),
            "tested_on": len(given.data.test_y),
        }

    def _examined(self, examples: dict[str, int]) -> str:
        whole = "the noisy training set" if self.settings.noise else "the training set"
        if examples["measured_on"] == examples["trained_on"]:
            return whole
        return f"{examples['measured_on']:,} examples of {whole} (likewise the fit)"

    def _copy(self) -> list[str]:
        """Says which copy of the data was used, where it is not the official one."""
        if self.settings.copy in (None, "official"):
            return []
        return [f"These are not the official files of {self.settings.data}: errors may differ from published ones."]

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
