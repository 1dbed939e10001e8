"""What one SAM + momentum SGD step costs, in one interleaved run, beside the peers and the least it could cost.

    python tests/benchmarks/steps.py                                    measures and writes results/steps-cpu.json
    python tests/benchmarks/steps.py --table results/steps-cpu.json     prints the table of the README from such a file

All rows of a model take turns, in an order that rotates from round to round, so that a slow moment of the machine
falls on all of them; a sample is the mean over as many steps as last about 50 ms. Before that, every row that computes
a SAM step must arrive at the same params, so that the comparison is of equal work.

Memory is followed with the profiler's CPU allocation events in a warm step, in eager and in compiled code alike: the
peak above what is alive when the step starts, and the peak above the params alone, with momentum, buffers and kept
gradients. The peers update in place; functional rows return new params. Scratch space inside oneDNN and of XLA is not
seen.
"""

import argparse
import copy
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
from collections.abc import Callable, Iterable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn
from torch.func import functional_call

import funcsam as fs

RHO, LR, MOMENTUM = 0.05, 0.1, 0.9
SAMPLE_SECONDS = 0.05
TOLERANCE = 0.05  # float32; relative to how far a step of plain SGD ends from the SAM step

UNIT = "forward + backward"
FLOOR = "floor: 2 x (forward + backward), torch.optim.SGD"
EAGER = "funcsam, eager"
FUNC = "funcsam, eager, torch.func backend"
COMPILED = "funcsam, compiled step"
PEER = "pytorch_optimizer SAM, eager"
PEER_COMPILED = "pytorch_optimizer SAM, compiled model"
JAX = "optax.contrib.sam, jitted step"


@dataclasses.dataclass
class Row:
    """A way to take one step on its own copy of the model.

    Attributes:
        name: What the tables call it.
        step: Takes one step; what it changes, it keeps.
        params: Returns the params as they are now, by name.
        held: Returns every tensor that lives from one step to the next, the params included.
        wait: Waits until all steps are done, where they are asynchronous.
        compile_seconds: What the first step took beyond a warm one, for compiled rows.
    """

    name: str
    step: Callable[[], Any]
    params: Callable[[], dict[str, Tensor]]
    held: Callable[[], Iterable[Tensor]] = tuple
    wait: Callable[[], Any] = lambda: None
    compile_seconds: float | None = None


@dataclasses.dataclass
class Case:
    """A model and a batch."""

    model: nn.Module
    x: Tensor
    y: Tensor
    label: str

    def channels_last(self) -> "Case":
        """Lays out a convolutional net and its images the way compiled code likes them; leaves others alone."""
        if self.x.ndim != 4:
            return self
        layout = torch.channels_last
        model = copy.deepcopy(self.model).to(memory_format=layout)
        return dataclasses.replace(self, model=model, x=self.x.to(memory_format=layout))


# Models


def _mlp(sizes: tuple[int, ...], batch: int, label: str) -> Case:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return Case(nn.Sequential(*layers[:-1]), torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,)), label)


def _wide_resnet(batch: int) -> Case:
    from funcsam.studies.networks import wide_resnet

    return Case(
        wide_resnet(16, 1, 10), torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)), f"WRN-16-1, b{batch}"
    )


CASES: dict[str, Callable[[], Case]] = {
    "small": lambda: _mlp((64, 128, 128, 10), 64, "MLP 64-128-128-10, b64"),
    "deep": lambda: _mlp((64,) * 20 + (10,), 64, "MLP 20x64, b64"),
    "wide": lambda: _mlp((784, 1024, 1024, 10), 128, "MLP 784-1024-1024-10, b128"),
    "conv": lambda: _wide_resnet(64),
}


# Rows


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    states = optimizer.state.values() if optimizer else ()
    held = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    return [*model.parameters(), *model.buffers(), *grads, *held]


def _unit(case: Case) -> Row:
    model, x, y = copy.deepcopy(case.model), case.x, case.y

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    return Row(UNIT, step, lambda: _named(model), lambda: _optimizer_tensors(model))


def _floor(case: Case) -> Row:
    model, x, y = copy.deepcopy(case.model), case.x, case.y
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Row(FLOOR, step, lambda: _named(model), lambda: _optimizer_tensors(model, optimizer))


def _peer(case: Case, compiled: bool = False) -> Row:
    from pytorch_optimizer import SAM

    case = case.channels_last() if compiled else case
    model, x, y = copy.deepcopy(case.model), case.x, case.y
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        F.cross_entropy(forward(x), y).backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(forward(x), y).backward()
        optimizer.second_step(zero_grad=True)

    name = PEER_COMPILED if compiled else PEER
    return Row(name, step, lambda: _named(model), lambda: _optimizer_tensors(model, optimizer.base_optimizer))


def _funcsam(case: Case, name: str, backend: Any, compiled: bool = False) -> Row:
    case = case.channels_last() if compiled else case
    model, batch = copy.deepcopy(case.model), (case.x, case.y)

    def loss_fn(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    def buffered_loss_fn(params: Any, buffers: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        return F.cross_entropy(functional_call(model, (params, buffers), (x,)), y), buffers

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tx = fs.chain(fs.sam(RHO), fs.sgd(LR, momentum=MOMENTUM))
    grads_fn = fs.grad_and_value(buffered_loss_fn if buffers else loss_fn, has_aux=bool(buffers), backend=backend)

    def one(params: Any, state: Any, *batch: Any) -> tuple[Any, ...]:
        params, state, aux = tx.step(params, grads_fn, state, *batch)
        return (params, state, aux[1]) if buffers else (params, state)

    run = torch.compile(one, fullgraph=True) if compiled else one
    params = {name: param.detach().clone() for name, param in model.named_parameters()}
    carry = [params, tx.init(params), *([buffers] if buffers else [])]
    del params
    model = model.to("meta")  # only its forward is of use

    def step() -> None:
        carry[:] = run(*carry, *batch)

    return Row(name, step, lambda: carry[0], lambda: fs.tree.flatten(carry)[0])


def _optax(case: Case) -> Row:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from optax import contrib

    params = {name: jnp.asarray(param.detach().numpy()) for name, param in case.model.named_parameters()}
    x, y = jnp.asarray(case.x.numpy()), jnp.asarray(case.y.numpy())
    layers = [name.removesuffix(".weight") for name in params if name.endswith(".weight")]

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        for layer in layers:
            x = x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"]
            x = jax.nn.relu(x) if layer != layers[-1] else x
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    climb = optax.chain(contrib.normalize(), optax.sgd(RHO))
    tx = contrib.sam(optax.sgd(LR, momentum=MOMENTUM), climb, sync_period=2, opaque_mode=True)

    def one(params: Any, state: Any, x: Any, y: Any) -> Any:
        def grad_fn(params: Any, _: Any) -> Any:
            return jax.grad(loss_fn)(params, x, y)

        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    run = jax.jit(one, donate_argnums=(0, 1))
    carry = [params, tx.init(params)]
    del params

    def step() -> None:
        carry[:] = run(*carry, x, y)

    def now() -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.array(param)) for name, param in carry[0].items()}

    return Row(JAX, step, now, wait=lambda: jax.block_until_ready(carry))


def _rows(case: Case) -> list[Row]:
    rows = [
        _unit(case),
        _floor(case),
        _funcsam(case, EAGER, "autograd"),
        _funcsam(case, FUNC, "func"),
        _funcsam(case, COMPILED, "auto", compiled=True),
        _peer(case),
        _peer(case, compiled=True),
    ]
    if case.x.ndim == 2 and util.find_spec("jax") and util.find_spec("optax"):
        rows.append(_optax(case))
    return rows


# Measurements


def _timed(row: Row, steps: int = 1) -> float:
    """Seconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
        row.step()
    row.wait()
    return (time.perf_counter() - start) / steps


def _distance(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    return math.sqrt(sum((x[name] - y[name]).double().square().sum().item() for name in y))


def _first_steps(case: Case, rows: list[Row]) -> dict[str, float]:
    """Takes the first step of every row, and says how far each SAM step ends from the eager peer's, in step lengths."""
    for row in rows:
        first = _timed(row)
        row.compile_seconds = first if row.name in (COMPILED, PEER_COMPILED, JAX) else None
    stepped = {row.name: {name: param.clone() for name, param in row.params().items()} for row in rows}
    length = _distance(_named(case.model), stepped[PEER])
    errors = {row.name: _distance(stepped[row.name], stepped[PEER]) / length for row in rows}
    for name in set(errors) - {UNIT, FLOOR}:
        if not errors[name] < TOLERANCE * errors[FLOOR]:
            got = f"off by {errors[name]:.1e} step lengths, plain SGD by {errors[FLOOR]:.1e}"
            raise SystemExit(f"{name}: the params must be those of the peer after one step, got {got}.")
    return errors


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def peak(step: Callable[[], Any]) -> int:
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


def check_peak() -> None:
    """Raises unless `peak` sees the allocations of eager and of compiled code."""
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

        seen, wanted = peak(step), 8 * size if name == "eager" else 4 * size
        if not wanted <= seen <= wanted + 4096:
            raise SystemExit(f"The profiler must see {wanted} bytes of an {name} function, got {seen}.")


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _measure(case: Case, rounds: int, tick: Callable[[str], None]) -> dict[str, Any]:
    rows = _rows(case)
    tick("first steps, compilation")
    errors = _first_steps(case, rows)
    for row in rows:
        _timed(row, 3)
    inner = {row.name: max(1, math.ceil(SAMPLE_SECONDS / _timed(row, 3))) for row in rows}
    samples: dict[str, list[float]] = {row.name: [] for row in rows}
    for turn in range(rounds):
        first = turn % len(rows)
        for row in rows[first:] + rows[:first]:
            _timed(row)
            samples[row.name].append(1e3 * _timed(row, inner[row.name]))
        tick(f"round {turn + 1}")
    results = {}
    for row in rows:
        mine = samples[row.name]
        found: dict[str, Any] = {"ms": _spread(mine), "samples_ms": mine, "steps_a_sample": inner[row.name]}
        for name, other in (("units", UNIT), ("peers", PEER), ("compiled_peers", PEER_COMPILED)):
            found[name] = _spread([a / b for a, b in zip(mine, samples[other], strict=True)])
        if row.compile_seconds is not None:
            found["compile_seconds"] = row.compile_seconds - 1e-3 * found["ms"]["median"]
        found["error_to_peer"] = errors[row.name]
        if row.name != JAX:
            above_start = peak(row.step)
            extra = _bytes(row.held()) - _bytes(row.params().values())
            found["memory"] = {"above_start": above_start, "above_params": above_start + extra}
        results[row.name] = found
    size = _bytes(case.model.parameters())
    torch._dynamo.reset()
    return {"label": case.label, "params_bytes": size, "rows": results}


def _machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": threads,
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "optree", "pytorch_optimizer", "jax", "jaxlib", "optax")
    present = {name: metadata.version(name) for name in packages if util.find_spec(name)}
    return {"python": platform.python_version(), "funcsam": fs.__version__, **present}


# Tables


def _lines(rows: Iterable[Iterable[str]]) -> str:
    head, *body = [list(row) for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def details(model: dict[str, Any]) -> str:
    """Returns everything measured on one model as a markdown table."""
    head = ["step", "ms", "quartiles", "units", "to peer", "to compiled peer", "MiB above start", "above params"]
    table = [[*head, "compile s"]]
    for name, row in model["rows"].items():
        memory = row.get("memory")
        table.append(
            [
                name,
                f"{row['ms']['median']:.3f}",
                f"{row['ms']['low']:.3f} to {row['ms']['high']:.3f}",
                *(f"{row[key]['median']:.2f}" for key in ("units", "peers", "compiled_peers")),
                *(f"{memory[key] / 2**20:.2f}" if memory else "" for key in ("above_start", "above_params")),
                f"{row['compile_seconds']:.0f}" if "compile_seconds" in row else "",
            ]
        )
    params = f"{model['params_bytes'] / 2**20:.2f} MiB of params"
    return f"{model['label']} ({params})\n\n{_lines(table)}"


def summary(results: dict[str, Any]) -> str:
    """Returns the table of the README: units of one forward + backward, and the peak memory above the params."""
    models = results["models"].values()
    names = list(dict.fromkeys(name for model in models for name in model["rows"]))
    table = [["one SAM + momentum SGD step", *(model["label"] for model in models)]]
    for name in names:
        cells = []
        for model in models:
            row = model["rows"].get(name)
            if row is None:
                cells.append("")
            elif name == UNIT:
                cells.append(f"{row['ms']['median']:.2f} ms")
            else:
                memory = f", {row['memory']['above_params'] / model['params_bytes']:.1f} P" if "memory" in row else ""
                cells.append(f"{row['units']['median']:.2f}{memory}")
        table.append([name, *cells])
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    note = (
        f"In units of the first row; medians of {results['rounds']} interleaved rounds. P: peak memory above the "
        f"params, in sizes of the params, activations included. {machine['cpu']}, {machine['threads']} of "
        f"{machine['cores']} cores, {results['date']}; {versions}."
    )
    return f"{_lines(table)}\n\n{note}"


def _limit_threads(threads: int) -> None:
    """Limits torch by its own setting, and XLA, whose pool has a thread for each core it may run on, by affinity."""
    torch.set_num_threads(threads)
    os.environ["NPROC"] = os.environ["PJRT_NPROC"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def main() -> None:
    """Measures, or prints a table of what was measured."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Time and memory of one SAM + momentum SGD step.")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="which models (all)")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each row, at least 2 (30)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and XLA")
    parser.add_argument("--out", type=Path, default=here / "results" / "steps-cpu.json", help="where results go")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the README's table from results and stop")
    options = parser.parse_args()
    if options.table:
        print(summary(json.loads(options.table.read_text())))
        return
    _limit_threads(options.threads)
    torch._inductor.config.force_disable_caches = True  # compile seconds are those of a first run
    check_peak()
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(options.threads),
        "versions": _versions(),
        "rounds": options.rounds,
        "models": {},
    }
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        if not progress.console.is_terminal:
            print("measuring", *options.models, file=sys.stderr, flush=True)
        for name in options.models:
            torch.manual_seed(0)
            case = CASES[name]()
            task = progress.add_task(case.label, total=options.rounds + 1)

            def tick(what: str, task: Any = task, label: str = case.label) -> None:
                progress.update(task, advance=1, description=f"{label}: {what}")

            results["models"][name] = _measure(case, options.rounds, tick)
            progress.remove_task(task)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    for model in results["models"].values():
        print(details(model), end="\n\n")
    print(summary(results))


if __name__ == "__main__":
    main()
