"""The commands that look at finished comparisons: `funcsam measure` and `funcsam landscape`."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import funcsam as fs
from funcsam.studies import finished, measuring, pictures, survey
from funcsam.studies.app import app, option, usual
from funcsam.studies.errors import StudyError
from funcsam.studies.finished import Finished

__all__ = ["app", "landscape", "measure"]

T = TypeVar("T")
Folder = Annotated[Path, typer.Argument(help="The --out folder of a finished comparison.", show_default=False)]
DataDir = Annotated[
    Path | None, usual("--data-dir", text="Where the data are, as for compare.", default="as for compare")
]
Device = Annotated[str | None, usual("--device", text="Where to compute, e.g. cpu or cuda.", default="as for compare")]


def _read(run: Path, data_dir: Path | None, device: str | None) -> Finished:
    found = finished.load(run, data_dir, device)
    if "OMP_NUM_THREADS" not in os.environ and not found.problem.looped:
        torch.set_num_threads(1)  # as in compare: more threads would mostly wait for each other
    return found


def _with_bar(what: str, total: int, compute: Callable[[Callable[[int], Any]], T]) -> T:
    with Progress(console=Console(stderr=True, highlight=False)) as bar:
        return compute(partial(bar.advance, bar.add_task(what, total=total)))


@app.command()
def measure(
    run: Folder,
    examples: Annotated[
        int, option("--examples", text="Training examples to measure on, as many of each class as can be.")
    ] = measuring.Options().examples,
    rho: Annotated[
        list[float] | None,
        usual("--rho", text="Radius of the worst case; may be repeated.", default="0.05, 0.1, 0.2, 0.5"),
    ] = None,
    steps: Annotated[int, option("--steps", text="Steps of the ascent to the worst case.")] = measuring.Options().steps,
    adaptive_rho: Annotated[
        float, option("--adaptive-rho", text="Radius of the adaptive worst case, relative to the params.")
    ] = measuring.Options().adaptive_radius,
    sigma: Annotated[
        float, option("--sigma", text="Standard deviation of the average case, per param.")
    ] = measuring.Options().deviation,
    draws: Annotated[
        int, option("--draws", text="Random draws of the average case and of the trace.")
    ] = measuring.Options().draws,
    data_dir: DataDir = None,
    device: Device = None,
) -> None:
    """Measures how sharp the solutions of a finished comparison are.

    On the labels that were trained on, in evaluation mode. Prints a table and writes RUN/measures.json. Sharpness
    predicts generalisation only weakly (Andriushchenko et al., 2023): look at several radii, and at the loss beside it.
    """
    options = measuring.Options(examples, tuple(rho or measuring.Options().radii), steps, adaptive_rho, sigma, draws)
    options.check()
    found = _read(run, data_dir, device)
    total = measuring.work(found, options)
    rows = _with_bar("measure", total, lambda advance: measuring.values(found, options, advance))
    content = measuring.content(found, options, rows)
    path = measuring.write(run, content)
    out = Console()
    out.print(measuring.table(content, found.settings.title()))
    out.print(
        f"Rise of the cross-entropy on {content['examples']} training examples and the labels trained on; worst case: "
        f"{options.steps} steps of ascent.",
        f"Written: {path}",
        sep="\n",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def landscape(
    run: Folder,
    first: Annotated[
        str | None, usual("--first", text="The optimizer on the left, as compare names it.", default="the first")
    ] = None,
    second: Annotated[str | None, usual("--second", text="The one on the right.", default="the next")] = None,
    seed: Annotated[int, option("--seed", text="Whose solutions: one of the seeds of the comparison, from 0.")] = 0,
    points: Annotated[int, option("--points", text="Points along a side of the pictures, an odd number.")] = 31,
    radius: Annotated[
        float, option("--radius", text="Half a side of the pictures, in norms of a filter.")
    ] = survey.RADIUS,
    examples: Annotated[
        int, option("--examples", text="Training examples to evaluate the loss on, as many of each class as can be.")
    ] = 500,
    chunk_size: Annotated[
        int, option("--chunk-size", text="Points evaluated at once; 1 is quickest on a CPU, 8 to 32 on a GPU.")
    ] = 1,
    data_dir: DataDir = None,
    device: Device = None,
    out: Annotated[Path | None, usual("--out", text="Folder of the pictures.", default="RUN")] = None,
) -> None:
    """Draws the loss around the solutions of two optimizers, and on the straight line between them.

    Directions are random, the same for both, and normalised to the filters of each (Li et al., 2018). Batch
    normalisation takes the statistics of the examples at every point. Writes three PNG files and a page to turn the
    surfaces in a browser.
    """
    found = _read(run, data_dir, device)
    names = list(found.models)
    left = _named("--first", first or names[0], names)
    rest = [name for name in names if name != left]
    if not rest:
        raise StudyError(f"landscape: `{run}` must be a comparison of two optimizers at least, got {left} alone.")
    right = _named("--second", second or rest[0], names)
    if right == left:
        raise StudyError(f"landscape: `--second` must be another optimizer than `--first`, got {left} for both.")
    seeds = len(found.problem.seeds)
    if not 0 <= seed < seeds:
        raise StudyError(f"landscape: `--seed` must be one of the {seeds} seeds, from 0, got {seed}.")
    if examples < 1 or chunk_size < 1:
        name, value = ("--examples", examples) if examples < 1 else ("--chunk-size", chunk_size)
        raise StudyError(f"landscape: `{name}` must be at least 1, got {value}.")
    x, y = measuring.chosen(found.problem, examples)
    given = found.problem.data
    solutions = {
        name: fs.ensemble.member((found.models[name].params, found.models[name].buffers), seed)
        for name in (left, right)
    }
    seen = _with_bar(
        "landscape",
        survey.work(points, test=True),
        lambda advance: survey.around(
            found.problem.network,
            solutions,
            found.problem.laid_out(x),
            y[seed],
            f"{found.settings.title()}, seed {seed}",
            (given.test_x[: len(x)], given.test_y[: len(x)]),
            radius=radius,
            points=points,
            chunk_size=chunk_size,
            progress=advance,
        ),
    )
    paths = pictures.write(out or run, seen)
    Console().print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)


def _named(option: str, name: str, names: list[str]) -> str:
    if name not in names:
        raise StudyError(f"landscape: `{option}` must be one of {', '.join(names)}, got {name}.")
    return name
