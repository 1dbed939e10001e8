"""What the benchmarks share: rows that take turns, the check that their work is equal, peak memory, and the tables."""

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn

import funcsam as fs

RHO, LR, MOMENTUM = 0.05, 0.1, 0.9
SAMPLE_SECONDS = 0.05
CHECKED_STEPS = 3  # momentum takes part from the second
TOLERANCE = 0.05  # float32; relative to how far a step of plain SGD ends from the SAM step

Named = dict[str, Tensor]
Tick = Callable[[str], None]


@dataclasses.dataclass
class Row:
    """A way to take one step on its own copy of the params.

    Attributes:
        name: What the tables call it.
        step: Takes one step; what it changes, it keeps.
        params: Returns the params as they are now, by name.
        held: Returns every tensor that lives from one step to the next, the params included.
        wait: Waits until all steps are done, where they are asynchronous.
        compiled: Whether the first step compiles.
        compile_seconds: What the first step took, for compiled rows.
    """

    name: str
    step: Callable[[], Any]
    params: Callable[[], Named]
    held: Callable[[], Iterable[Tensor]] = tuple
    wait: Callable[[], Any] = lambda: None
    compiled: bool = False
    compile_seconds: float | None = None


# Models


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Returns a perceptron with ReLU between its linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def named(model: nn.Module) -> Named:
    """Returns the params of a module, by name."""
    return {name: param.detach() for name, param in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Returns what a module and its optimizer hold."""
    states = optimizer.state.values() if optimizer else ()
    held = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    return [*model.parameters(), *model.buffers(), *grads, *held]


# Measurements


def timed(row: Row, steps: int = 1) -> float:
    """Returns seconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
        row.step()
    row.wait()
    return (time.perf_counter() - start) / steps


def first_steps(rows: list[Row], steps: int = CHECKED_STEPS) -> dict[str, Named]:
    """Takes the first steps of every row, and returns where each ends."""
    for row in rows:
        first = timed(row)
        row.compile_seconds = first if row.compiled else None
        for _ in range(steps - 1):
            row.step()
    return {row.name: {name: param.clone() for name, param in row.params().items()} for row in rows}


def _distance(x: Named, y: Named) -> float:
    return math.sqrt(sum((x[name] - y[name]).double().square().sum().item() for name in y))


def errors_to_peer(
    start: Named, stepped: dict[str, Named], peer: str, plain: str, exempt: Iterable[str] = ()
) -> dict[str, float]:
    """Says how far each row ends from the peer, relative to the way the peer went, and stops where it is too far.

    Args:
        start: The params before the first steps.
        stepped: The params after them, by row.
        peer: The row that the others must agree with.
        plain: The row of plain SGD, which they must be far closer to the peer than.
        exempt: Rows that take no SAM steps.
    """
    length = _distance(start, stepped[peer])
    errors = {name: _distance(params, stepped[peer]) / length for name, params in stepped.items()}
    for name in set(errors) - {plain, *exempt}:
        if not errors[name] < TOLERANCE * errors[plain]:
            got = f"off by {errors[name]:.1e} of its way, plain SGD by {errors[plain]:.1e}"
            raise SystemExit(f"{name}: the params must be those of the peer after the first steps, got {got}.")
    return errors


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors, each counted once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _peak(step: Callable[[], Any]) -> int:
    """Returns the most bytes a warm step has allocated at one time, above those alive at its start."""
    mark = "measured step"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(2):  # what dies in the measured step must have been born under the profiler
            step()
        with torch.profiler.record_function(mark):
            step()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == mark)
    alive, at_start, most = 0, 0, 0
    for event in events:
        if event.name() != "[memory]":
            continue
        alive += event.nbytes()
        if event.start_ns() < start:
            at_start = most = alive
        most = max(most, alive)
    return most - at_start


def _check_peak() -> None:
    """Raises unless `_peak` sees the allocations of eager and of compiled code."""
    size = 1 << 20
    x = torch.zeros(size)

    def plain(x: Tensor) -> Tensor:  # the sum keeps the compiler from fusing: y must exist
        y = x + 1
        return y * y.sum()

    compiled = torch.compile(plain, fullgraph=True)
    for name, function in (("eager", plain), ("compiled", compiled)):
        held = [function(x)]

        def step(function: Callable[..., Tensor] = function, held: list[Tensor] = held) -> None:
            held[0] = function(x)

        seen, wanted = _peak(step), 8 * size if name == "eager" else 4 * size
        if not wanted <= seen <= wanted + 4096:
            raise SystemExit(f"The profiler must see {wanted} bytes of an {name} function, got {seen}.")


def memory(row: Row) -> dict[str, int]:
    """Returns the peak of a warm step, above what is alive at its start and above the params alone."""
    above_start = _peak(row.step)
    extra = bytes_of(row.held()) - bytes_of(row.params().values())
    return {"above_start": above_start, "above_params": above_start + extra}


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def interleaved(rows: list[Row], rounds: int, ratios: Mapping[str, str], tick: Tick) -> dict[str, dict[str, Any]]:
    """Lets the rows take turns, in an order that rotates, and returns the times of each; stops if one still compiles.

    Args:
        rows: What is measured; all have taken their first step.
        rounds: Samples of each row, a sample being the mean over as many steps as last about `SAMPLE_SECONDS`.
        ratios: For each key of the results, the row that the times of the same round are divided by.
        tick: Called after each round.
    """
    for row in rows:
        timed(row, 3)
    graphs = _graphs()
    inner = {row.name: max(1, math.ceil(SAMPLE_SECONDS / timed(row, 3))) for row in rows}
    samples: dict[str, list[float]] = {row.name: [] for row in rows}
    for turn in range(rounds):
        first = turn % len(rows)
        for row in rows[first:] + rows[:first]:
            timed(row)
            samples[row.name].append(1e3 * timed(row, inner[row.name]))
        tick(f"round {turn + 1}")
    if _graphs() != graphs:
        raise SystemExit(f"Every row must be compiled before the rounds, got {_graphs() - graphs} more graphs.")
    results = {}
    for row in rows:
        mine = samples[row.name]
        found: dict[str, Any] = {"ms": _spread(mine), "samples_ms": mine, "steps_a_sample": inner[row.name]}
        for key, other in ratios.items():
            found[key] = _spread([a / b for a, b in zip(mine, samples[other], strict=True)])
        if row.compile_seconds is not None:
            found["compile_seconds"] = row.compile_seconds - 1e-3 * found["ms"]["median"]
        results[row.name] = found
    return results


def _machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": threads,
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    present = {name: metadata.version(name) for name in packages if util.find_spec(name)}
    return {"python": platform.python_version(), "funcsam": fs.__version__, **present}


# Tables


def lines(rows: Iterable[Iterable[str]]) -> str:
    """Returns a markdown table; the first row is its head."""
    head, *body = [list(row) for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def origin(results: dict[str, Any]) -> str:
    """Says where and when the results were measured, and with which versions."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {results['date']}; {versions}."


# Running


def _limit_threads(threads: int) -> None:
    """Limits torch by its own setting, and XLA, whose pool has a thread for each core it may run on, by affinity."""
    torch.set_num_threads(threads)
    os.environ["NPROC"] = os.environ["PJRT_NPROC"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def parse(parser: argparse.ArgumentParser, out: str) -> argparse.Namespace:
    """Adds the options that all benchmarks have, and reads them.

    Args:
        parser: Has the options of one benchmark.
        out: Name of the file that results go to.
    """
    path = Path(__file__).parent / "results" / out
    parser.add_argument("--rounds", type=int, default=30, help="samples of each row, at least 2 (30)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and XLA")
    parser.add_argument("--out", type=Path, default=path, help="where results go")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the README's table from results and stop")
    return parser.parse_args()


def run(
    options: argparse.Namespace,
    what: str,
    measures: Mapping[str, Callable[[int, Tick], dict[str, Any]]],
    packages: Iterable[str],
    details: Callable[[dict[str, Any]], str],
    summary: Callable[[dict[str, Any]], str],
) -> None:
    """Measures, or prints a table of what was measured.

    Args:
        options: What `parse` returned.
        what: Under which key of the results the measurements are.
        measures: By name; each gets the number of rounds and a function to call after each and once before them.
        packages: Whose versions are noted.
        details: Everything of one measurement as text.
        summary: The table of the README as text.
    """
    if options.table:
        print(summary(json.loads(options.table.read_text())))
        return
    _limit_threads(options.threads)
    torch._inductor.config.force_disable_caches = True  # compile seconds are those of a first run
    _check_peak()
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(options.threads),
        "versions": _versions(packages),
        "rounds": options.rounds,
        what: {},
    }
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        if not progress.console.is_terminal:
            print("measuring", *measures, file=sys.stderr, flush=True)
        for name, measure in measures.items():
            task = progress.add_task(name, total=options.rounds + 1)

            def tick(what: str, task: Any = task, name: str = name) -> None:
                progress.update(task, advance=1, description=f"{name}: {what}")

            torch.manual_seed(0)
            results[what][name] = measure(options.rounds, tick)
            torch._dynamo.reset()
            progress.remove_task(task)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    for found in results[what].values():
        print(details(found), end="\n\n")
    print(summary(results))
