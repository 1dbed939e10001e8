"""What a comparison shows at its end: a table, `results.json` and `comparison.png`."""

import io
import json
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from torch import Tensor

import funcsam as fs
from funcsam.studies import checkpoint
from funcsam.studies.judging import SHARPNESS_RADIUS
from funcsam.studies.training import Run

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
DEFINITIONS = {
    "examples": "how many were trained on in each epoch at most, on how many of these loss, fit and sharpness were "
    "measured (in evaluation mode, without augmentation or label smoothing), how many were held out, and tested on",
    "train_loss": "mean cross-entropy on the noisy training labels at the end of the epoch",
    "test_error": "fraction of the clean test set that is wrong at the end of the epoch",
    "noisy_fit": "fraction of the noisy training labels that are reproduced at the end of the epoch",
    "sharpness": f"L(w + e) - L(w) on the noisy training set, e = {SHARPNESS_RADIUS} g / ||g||, after the last epoch; "
    "memorised labels leave a small gradient and so a small rise",
    "held_out_error": "fraction of the noisy labels held out of the training set that are not predicted, after the "
    "last epoch; what a sweep chooses by",
    "seconds_per_step": "median over the steps of an epoch (on an accelerator the mean, as nothing waits inside an "
    "epoch), all seeds together (of a sweep their share); compilation and measuring are not among them. Where several "
    "processes (machine.ranks) share the seeds, that of the slowest for the seeds of its own",
    "ratio": "median seconds per step over that of sgd, or of the first optimizer where there is no sgd",
}


def figures(values: Tensor) -> dict[str, Any]:
    """Lists mean, standard error (none for one seed) and the seeds themselves."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else None
    return {
        "mean": _finite(values.mean()),
        "standard_error": None if error is None else _finite(error),
        "seeds": _finite(values),
    }


def _finite(values: Tensor) -> Any:
    """Turns a tensor into lists for JSON, which has no NaN."""
    if values.ndim:
        return [_finite(row) for row in values]
    return values.item() if values.isfinite() else None


def summary(runs: dict[str, Run], sharpness: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Returns the final figures of every optimizer."""
    seconds = {name: run.seconds.median().item() for name, run in runs.items()}
    base = next((name for name in runs if name == "sgd" or name.startswith("sgd:")), next(iter(runs)))
    return {
        name: {
            "test_error": figures(run.test_error[-1]),
            "noisy_fit": figures(run.noisy_fit[-1]),
            "sharpness": figures(sharpness[name]),
            "seconds_per_step": seconds[name],
            "ratio": seconds[name] / seconds[base],
        }
        for name, run in runs.items()
    }


def machine() -> dict[str, Any]:
    """Returns what computes here."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": devices,
    }


def versions() -> dict[str, str]:
    """Returns the versions of what the figures depend on."""
    others = {name: metadata.version(name) for name in ("optree", "numpy", "scikit-learn")}
    return {"funcsam": fs.__version__, "torch": torch.__version__, "python": platform.python_version()} | others


def results(
    settings: dict[str, Any],
    runs: dict[str, Run],
    final: dict[str, Any],
    compiled: dict[str, bool],
    sweeps: dict[str, dict[str, Any]],
    ranks: int = 1,
) -> dict[str, Any]:
    """Returns everything that `results.json` holds; `ranks` processes finished the run."""
    epochs = {
        name: {
            "train_loss": _finite(run.loss),
            "test_error": _finite(run.test_error),
            "noisy_fit": _finite(run.noisy_fit),
            "seconds_per_step": _finite(run.seconds),
        }
        for name, run in runs.items()
    }
    return {
        "settings": settings,
        "compiled": compiled,
        "versions": versions(),
        "machine": {**machine(), "ranks": ranks},
        "definitions": DEFINITIONS,
        "final": final,
        "sweeps": sweeps,
        "epochs": epochs,
    }


def best(run: Run, values: int) -> int:
    """Returns which value of a sweep has the smallest held-out error, the mean over the seeds."""
    return int(run.held_error[-1].view(values, -1).mean(1).argmin())


def sweep(run: Run, name: str, values: Sequence[float]) -> dict[str, Any]:
    """Returns the final figures of every value of a sweep."""
    held, test = (rows[-1].view(len(values), -1) for rows in (run.held_error, run.test_error))
    return {
        "option": name,
        "values": list(values),
        "chosen": values[best(run, len(values))],
        "held_out_error": [figures(row) for row in held],
        "test_error": [figures(row) for row in test],
    }


def write(
    out: Path, content: dict[str, Any], title: str, runs: dict[str, Run], sweeps: dict[str, dict[str, Any]]
) -> None:
    """Writes the picture, then `results.json`: where that exists, the run is complete."""
    checkpoint.write(out / "comparison.png", picture(runs, title, sweeps))
    checkpoint.write(out / "results.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def cell(figures: dict[str, Any], factor: float, digits: int) -> str:
    """Writes mean and standard error for a table."""
    if figures["mean"] is None:
        return "not finite"
    error = figures["standard_error"]
    spread = "" if error is None else f" ± {factor * error:.{digits}f}"
    return f"{factor * figures['mean']:.{digits}f}{spread}"


def table(final: dict[str, dict[str, Any]], title: str, noisy: bool = True) -> Table:
    """Returns the table that the command prints; `noisy` says whether training labels are."""
    shown = Table(title=title, caption="mean ± standard error over the seeds", title_justify="left")
    shown.add_column("optimizer", no_wrap=True)
    for heading in (
        "test error\n%, clean",
        "fit to noisy\nlabels, %" if noisy else "fit to train\nlabels, %",
        "sharpness",
        "ms per\nstep",
        "times\nSGD",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    if not any(name == "sgd" or name.startswith("sgd:") for name in final):
        shown.columns[-1].header = "times\nfirst"
    for name, row in final.items():
        shown.add_row(
            name,
            cell(row["test_error"], 100, 1),
            cell(row["noisy_fit"], 100, 1),
            cell(row["sharpness"], 1, 4),
            f"{1000 * row['seconds_per_step']:.2f}",
            f"{row['ratio']:.2f}",
        )
    return shown


def sweep_table(sweep: dict[str, Any], name: str) -> Table:
    """Returns the table of a sweep."""
    shown = Table(title=f"{name}, from the sweep", title_justify="left")
    shown.add_column(sweep["option"], no_wrap=True)
    for heading in ("held-out error\n%, noisy labels", "test error\n%, clean"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for value, held, test in zip(sweep["values"], sweep["held_out_error"], sweep["test_error"], strict=True):
        mark = " (chosen)" if value == sweep["chosen"] else ""
        shown.add_row(f"{value:g}{mark}", cell(held, 100, 1), cell(test, 100, 1))
    return shown


def _errors(values: Tensor) -> tuple[Tensor, Tensor]:
    mean = 100 * values.mean(-1)
    return mean, 100 * values.std(-1) / math.sqrt(values.shape[-1]) if values.shape[-1] > 1 else torch.zeros_like(mean)


def picture(runs: dict[str, Run], title: str, sweeps: dict[str, dict[str, Any]] | None = None) -> bytes:
    """Draws test error over epochs, and the final errors with every seed, as PNG; readable in black and white.

    With a sweep, a third panel shows held-out and test error against the swept values.
    """
    figure = Figure(figsize=(15 if sweeps else 10, 4.4), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    curves, bars, *more = figure.subplots(1, 3 if sweeps else 2, width_ratios=(3, 2, 3) if sweeps else (3, 2))
    if sweeps:
        _sweep_panel(more[0], sweeps, [f"C{k}" for k, name in enumerate(runs) if name in sweeps])
    for k, (name, run) in enumerate(runs.items()):
        colour, epochs = f"C{k}", range(1, run.epoch + 1)
        mean, error = _errors(run.test_error)
        curves.fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)
        curves.plot(
            epochs,
            mean,
            color=colour,
            linestyle=LINES[k % len(LINES)],
            marker=MARKERS[k % len(MARKERS)],
            markevery=max(1, run.epoch // 10),
            markersize=4,
            label=name,
        )
        height, spread = mean[-1].item(), error[-1].item()
        hatch = HATCHES[k % len(HATCHES)]
        bars.bar(k, height, 0.6, facecolor=colour, alpha=0.35, edgecolor="black", hatch=hatch, zorder=1)
        bars.errorbar(k + 0.15, height, spread, color="black", capsize=4, zorder=3)
        seeds = 100 * run.test_error[-1]
        bars.scatter(
            _spread(k - 0.15, len(seeds)), seeds, s=14, color="black", marker=MARKERS[k % len(MARKERS)], zorder=2
        )
    curves.set(xlabel="epoch", ylabel="clean test error, %", ylim=(0, None))
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.set_title("mean and standard error over the seeds", fontsize=9)
    curves.legend(frameon=False)
    curves.grid(alpha=0.3)
    bars.set(ylabel="clean test error after the last epoch, %", ylim=(0, None))
    bars.set_title("mean, standard error and every seed", fontsize=9)
    long = max(len(name) for name in runs) > 14 or len(runs) > 4
    bars.set_xticks(range(len(runs)), list(runs), rotation=30 if long else 0, ha="right" if long else "center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _sweep_panel(panel: Axes, sweeps: dict[str, dict[str, Any]], colours: Sequence[str]) -> None:
    kinds = (("held_out_error", "held-out, noisy", "-"), ("test_error", "test, clean", "--"))
    ticks = sorted({value for each in sweeps.values() for value in each["values"]})
    for (name, each), colour, marker in zip(sweeps.items(), colours, MARKERS, strict=False):
        for key, label, line in kinds:
            means = [_percent(figures["mean"]) for figures in each[key]]
            spreads = [_percent(figures["standard_error"] or 0.0) for figures in each[key]]
            places = [ticks.index(value) for value in each["values"]]
            text = f"{name.partition(':')[0]}: {label}"
            panel.errorbar(
                places, means, spreads, color=colour, linestyle=line, marker=marker, markersize=4, capsize=3, label=text
            )
        panel.axvline(ticks.index(each["chosen"]), color=colour, linewidth=1, linestyle=":")
    option = next(iter(sweeps.values()))["option"]
    panel.set(xlabel=option, ylabel="error after the last epoch, %", ylim=(0, None))
    panel.set_xticks(range(len(ticks)), [f"{value:g}" for value in ticks])
    panel.set_title("mean and standard error over the seeds; dotted: chosen", fontsize=9)
    panel.legend(frameon=False, fontsize=8)
    panel.grid(alpha=0.3)


def _percent(value: float | None) -> float:
    return math.nan if value is None else 100 * value


def _spread(centre: float, count: int) -> Sequence[float]:
    return [centre + 0.1 * (2 * i / (count - 1) - 1) if count > 1 else centre for i in range(count)]
