"""How sharp the solutions of a finished comparison are, by every measure of `funcsam.measures`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

import funcsam as fs
from funcsam.studies import checkpoint, data, report
from funcsam.studies.errors import StudyError
from funcsam.studies.finished import Finished, Models
from funcsam.studies.problem import Problem

Measure = Callable[..., Tensor]
TEST = "test error, %"


class Options(NamedTuple):
    """What is measured; see `funcsam measure --help`."""

    examples: int = 500
    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    steps: int = 20
    adaptive_radius: float = 0.5
    deviation: float = 0.005
    draws: int = 32

    def check(self) -> None:
        """Looks at the numbers.

        Raises:
            StudyError: If one is out of range.
        """
        for name, least in (("examples", 1), ("steps", 1), ("draws", 2)):
            value = getattr(self, name)
            if value < least:
                raise StudyError(f"measure: `--{name}` must be at least {least}, got {value}.")
        for name, values in (
            ("rho", self.radii),
            ("adaptive-rho", [self.adaptive_radius]),
            ("sigma", [self.deviation]),
        ):
            for value in values:
                if not 0 < value < float("inf"):
                    raise StudyError(f"measure: `--{name}` must be finite and positive, got {value}.")


def measures(options: Options, count: int) -> dict[str, Measure]:
    """Returns every measure of `count` examples by its name, a function of `(loss_fn, params, *batch)`."""
    steps, m = options.steps, max(count // 4, 1)
    middle = options.radii[len(options.radii) // 2]
    found: dict[str, Measure] = {
        "loss": lambda loss_fn, *args: loss_fn(*args),
        "gradient norm": fs.measures.gradient_norm,
    }
    for rho in options.radii:
        found[f"worst case, rho {rho:g}"] = _worst(rho=rho, steps=steps)
    found[f"one step, rho {middle:g}"] = _worst(rho=middle)
    found[f"m-sharpness, rho {middle:g}, m {m}"] = lambda *args: fs.measures.m_sharpness(
        *args, m=m, in_dims=(None, 0, 0), rho=middle, steps=steps, chunk_size=1
    )
    found[f"adaptive, rho {options.adaptive_radius:g}"] = _worst(
        rho=options.adaptive_radius, steps=steps, adaptive=True
    )
    found[f"average case, sigma {options.deviation:g}"] = lambda *args: (
        fs.measures.average_case_sharpness(*args, rho=options.deviation, draws=options.draws, chunk_size=1).mean
    )
    found["largest eigenvalue"] = lambda *args: fs.measures.hessian_eigenpairs(*args).values[0]
    found["trace"] = lambda *args: fs.measures.hessian_trace(*args, draws=options.draws, chunk_size=1).mean
    return found


def _worst(**options: Any) -> Measure:
    return lambda *args: fs.measures.worst_case_sharpness(*args, **options)


def chosen(problem: Problem, count: int) -> tuple[Tensor, Tensor]:
    """Returns the training examples that are measured on, and their labels for every member."""
    x, y = problem.examined()
    if count >= len(x):
        return x, y
    clean = problem.data.y if problem.judged is None else problem.data.y[problem.judged]
    index = data.subset(clean.cpu(), count).to(x.device)
    return x[index], y[:, index]


def work(found: Finished, options: Options) -> int:
    """Returns how many values `values` computes, for a progress bar."""
    return len(measures(options, 1)) * len(found.models) * len(found.problem.seeds)


def values(found: Finished, options: Options, progress: Callable[[int], Any]) -> dict[str, dict[str, Tensor]]:
    """Measures every model of every optimizer; one value per seed, by measure and optimizer.

    The loss is the cross-entropy on the labels that were trained on, in evaluation mode: without augmentation and label
    smoothing, normalisation with its running statistics.

    Raises:
        StudyError: If an option is out of range.
    """
    options.check()
    x, y = chosen(found.problem, options.examples)
    rows: dict[str, dict[str, Tensor]] = {}
    for name, measure in measures(options, len(x)).items():
        rows[name] = {}
        for spec, models in found.models.items():
            each = []
            for value in _each(measure, found.problem, models, x, y):
                each.append(value.detach().cpu().double())
                progress(1)
            rows[name][spec] = torch.stack(each)
    return rows


def _each(measure: Measure, problem: Problem, models: Models, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    def loss_fn(params: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = fs.nn.predict(problem.network, params, buffers, problem.laid_out(x))
        return F.cross_entropy(logits, y)

    for k in range(fs.ensemble.size(models.params)):
        params, buffers = fs.ensemble.member((models.params, models.buffers), k)
        yield measure(loss_fn, params, buffers, x, y[k])


def content(found: Finished, options: Options, rows: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Returns what `measures.json` holds."""
    return {
        "options": options._asdict(),
        "examples": min(options.examples, len(found.problem.examined()[0])),
        "settings": found.results["settings"],
        "versions": report.versions(),
        "machine": report.machine(),
        "test_error": {name: final["test_error"] for name, final in found.results["final"].items()},
        "measures": {name: {spec: report.figures(each) for spec, each in row.items()} for name, row in rows.items()},
    }


def write(folder: Path, found: dict[str, Any]) -> Path:
    """Writes `measures.json`."""
    path = folder / "measures.json"
    checkpoint.write(path, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    return path


def table(found: dict[str, Any], title: str) -> Table:
    """Returns the table that the command prints: a row for each measure, a column for each optimizer."""
    shown = Table(title=title, caption="mean ± standard error over the seeds", title_justify="left")
    shown.add_column("on training labels", no_wrap=True)
    for spec in found["test_error"]:
        shown.add_column(spec.replace(":", ":\n").replace(",", ",\n"), justify="right")
    shown.add_row(TEST, *(report.cell(each, 100, 1) for each in found["test_error"].values()), end_section=True)
    for name, row in found["measures"].items():
        shown.add_row(name, *(_short(each) for each in row.values()))
    return shown


def _short(figures: dict[str, Any]) -> str:
    """Writes mean and standard error with three digits of the mean."""
    if figures["mean"] is None:
        return "not finite"
    error = "" if figures["standard_error"] is None else f" ± {figures['standard_error']:.1g}"
    return f"{figures['mean']:.3g}{error}"
