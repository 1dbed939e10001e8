"""What data-parallel SAM sends and how long a step takes on 1, 2 and 4 processes, beside DDP and the least possible.

    python tests/benchmarks/communication.py            measures and writes results/communication-cpu.json
    python tests/benchmarks/communication.py --table results/communication-cpu.json    prints the table of the README
    python tests/benchmarks/communication.py --paper    prints the calculation for a cluster only

torchrun starts as many gloo processes as the largest group has ranks, on this machine, one thread each; the rows of all
groups take turns, and ranks outside of a group wait meanwhile. Every rank has its own batch of the same size, so that
the work grows with the ranks. Before that, the functional rows must arrive where the rows with DDP do.

Sent: bytes that one rank hands to collectives in one step, counted as they pass the dispatcher. Wire: growth of the
loopback interface's counter during some steps, divided by steps and ranks, headers included; the least of several
goes, because whatever else runs can only add to it. An all-reduce of P bytes takes at least 2 (n - 1) / n P a rank.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import LR, MOMENTUM, RHO, Row, Tick
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import funcsam as fs
from funcsam.distributed import all_reduce_mean
from funcsam.studies.networks import wide_resnet

NONE = "no communication: `chain(sam, sgd)`"
PLAIN = "no SAM: `chain(all_reduce_mean(), sgd)`"
COMMON = "one ascent for all: `chain(all_reduce_mean(), sam, sgd)`"
OWN = "one ascent a rank: `chain(sam, all_reduce_mean(), sgd)`"
SMALL = "the same in buckets of 256 KiB"
DDP_COMMON = "DDP, `torch_optim.SAM`: both passes averaged"
DDP_OWN = "DDP, `torch_optim.SAM`: first pass in `no_sync`"
ALL_REDUCES = {NONE: 0, PLAIN: 1, COMMON: 2, OWN: 1, SMALL: 1, DDP_COMMON: 2, DDP_OWN: 1}
"""How many all-reduces of the gradient each row needs."""

WIRE_STEPS, WIRE_GOES = 3, 3
FEWEST_ROUNDS = 10
Group = Any


@dataclasses.dataclass
class Case:
    """A model, the size of a rank's batch, and how many steps are checked."""

    label: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    checked_steps: int = common.CHECKED_STEPS


CASES = {
    "wide": Case("MLP 784-1024-1024-10, b128", lambda: common.mlp((784, 1024, 1024, 10)), (784,), 128),
    # One step is checked: every further one multiplies what float32 has rounded.
    "conv": Case("WRN-16-1, b32", lambda: wide_resnet(16, 1, 10), (3, 32, 32), 32, checked_steps=1),
}


# Rows


def _functional(name: str, tx: fs.Transform, model: nn.Module, x: Tensor, y: Tensor) -> Row:
    model = copy.deepcopy(model)
    loss_fn = fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y))
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True)
    params, buffers = fs.nn.split(model)
    carry = [params, tx.init(params), buffers]

    def step() -> None:
        params, state, (_, buffers) = tx.step(carry[0], grads_fn, *carry[1:], x, y)
        carry[:] = params, state, buffers

    return Row(name, step, lambda: carry[0])


def _ddp(name: str, group: Group, model: nn.Module, x: Tensor, y: Tensor) -> Row:
    wrapped = DistributedDataParallel(copy.deepcopy(model), process_group=group)
    optimizer = fs.torch_optim.SAM(wrapped.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM)
    first = wrapped.no_sync if name == DDP_OWN else contextlib.nullcontext

    def step() -> None:
        with first():
            F.cross_entropy(wrapped(x), y).backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.second_step(zero_grad=True)

    return Row(name, step, lambda: common.named(wrapped.module))


def _rows(case: Case, group: Group) -> list[Row]:
    torch.manual_seed(0)
    model = case.model()
    torch.manual_seed(1 + dist.get_rank())
    batch = torch.randn(case.batch, *case.shape), torch.randint(10, (case.batch,))
    sam, sgd, mean = fs.sam(RHO), fs.sgd(LR, momentum=MOMENTUM), all_reduce_mean(group)
    chains = {
        NONE: (sam, sgd),
        PLAIN: (mean, sgd),
        COMMON: (mean, sam, sgd),
        OWN: (sam, mean, sgd),
        SMALL: (sam, all_reduce_mean(group, bucket_bytes=2**18), sgd),
    }
    rows = [_functional(name, fs.chain(*parts), model, *batch) for name, parts in chains.items()]
    rows += [_ddp(name, group, model, *batch) for name in (DDP_COMMON, DDP_OWN)]
    stepped = common.first_steps(rows, case.checked_steps)
    for peer, mine in ((DDP_COMMON, (COMMON,)), (DDP_OWN, (OWN, SMALL))):
        chosen = {name: stepped[name] for name in (PLAIN, peer, *mine)}
        common.errors_to_peer(common.named(model), chosen, peer, PLAIN)
    return rows


# Measurements


class Sent(TorchDispatchMode):
    """Notes the bytes of every collective that is called, in autograd's hooks too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            leaves = torch.utils._pytree.tree_leaves(args)
            self.sizes.append(sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor)))
        return func(*args, **(kwargs or {}))


def _sent(row: Row) -> list[int]:
    with Sent() as sent:
        row.step()
    return sent.sizes


def _loopback() -> int:
    """Returns the bytes that the loopback interface has carried since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise SystemExit("/proc/net/dev: must list the loopback interface `lo`, got no such line.")


def _wire(row: Row, group: Group) -> float:
    """Returns the bytes a rank and a step on the wire."""
    goes = []
    for _ in range(WIRE_GOES):
        dist.barrier(group)
        before = _loopback()
        for _ in range(WIRE_STEPS):
            row.step()
        dist.barrier(group)
        goes.append(_loopback() - before)
        dist.barrier(group)
    return min(goes) / (WIRE_STEPS * group.size())


def _ahead(row: Row) -> dict[str, float]:
    """Says for how long gradients were under way, and which share of that passed before the first was waited for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        row.step()
    events = profile.profiler.kineto_results.events()
    waits = [e.start_ns() for e in events if e.name() == "_c10d_functional::wait_tensor"]
    spans = sorted((e.start_ns(), e.end_ns()) for e in events if e.name() == "gloo:all_reduce")
    first, reached, total, ahead = min(waits), 0, 0, 0
    for start, end in spans:
        start = max(start, reached)
        total += max(0, end - start)
        ahead += max(0, min(end, first) - start)
        reached = max(reached, end)
    return {"ms": 1e-6 * total, "before_first_wait": ahead / total}


def _timed(row: Row, group: Group, steps: int) -> float:
    """Returns milliseconds a step, from when the first rank may start to when the last is done."""
    dist.barrier(group)
    start = time.perf_counter()
    for _ in range(steps):
        row.step()
    dist.barrier(group)
    return 1e3 * (time.perf_counter() - start) / steps


def _steps_a_sample(row: Row, group: Group) -> int:
    """Chooses on rank 0 how many steps a sample has."""
    _timed(row, group, 2)
    steps = torch.tensor(math.ceil(1e3 * common.SAMPLE_SECONDS / _timed(row, group, 2)))
    dist.broadcast(steps, 0, group)
    return int(steps)


Turn = tuple[int, str]


def _take_turns(turns: list[Turn], rounds: int) -> Iterator[Turn]:
    """Lets turns follow each other in an order that rotates; all ranks start each together."""
    for turn in range(rounds):
        first = turn % len(turns)
        for one in turns[first:] + turns[:first]:
            dist.barrier()
            yield one
        if dist.get_rank() == 0:
            print(f"round {turn + 1}", flush=True)


def _work(case: Case, sizes: list[int], rounds: int) -> dict[str, Any]:
    """Measures on one rank of many; what rank 0 returns counts."""
    rank = dist.get_rank()
    groups = {n: dist.new_group(list(range(n))) for n in sizes}
    mine = {n: group for n, group in groups.items() if rank < n}
    rows = {(n, row.name): row for n, group in mine.items() for row in _rows(case, group)}
    found: dict[Turn, dict[str, Any]] = {}
    turns = [(n, name) for n in sizes for name in ALL_REDUCES]
    for n, name in turns:
        dist.barrier()
        if rank < n:
            row, group = rows[n, name], groups[n]
            inner = _steps_a_sample(row, group)
            found[n, name] = {"steps_a_sample": inner, "sent": _sent(row), "wire": _wire(row, group), "samples_ms": []}
            if name in (OWN, SMALL):
                found[n, name]["under_way"] = _ahead(row)
    if rank == 0:
        print("first steps", flush=True)
    for n, name in _take_turns(turns, rounds):
        if rank < n:
            _timed(rows[n, name], groups[n], 1)
            time_ = _timed(rows[n, name], groups[n], found[n, name]["steps_a_sample"])
            found[n, name]["samples_ms"].append(time_)
    return _summed_up(case, sizes, found) if rank == 0 else {}


def _summed_up(case: Case, sizes: list[int], found: dict[Turn, dict[str, Any]]) -> dict[str, Any]:
    def ratio(one: Turn, other: Turn) -> dict[str, float]:
        pairs = zip(found[one]["samples_ms"], found[other]["samples_ms"], strict=True)
        return common._spread([a / b for a, b in pairs])

    params_bytes = common.bytes_of(case.model().parameters())
    ranks: dict[str, Any] = {str(n): {} for n in sizes}
    for (n, name), row in found.items():
        least = ALL_REDUCES[name] * params_bytes
        ranks[str(n)][name] = {
            "ms": common._spread(row["samples_ms"]),
            "to_silent": ratio((n, name), (n, NONE)),
            "to_fewest_ranks": ratio((n, name), (min(sizes), name)),
            "least_bytes": least,
            "sent_bytes": sum(row["sent"]),
            "collectives": row["sent"],
            "least_wire_bytes": 2 * (n - 1) / n * least,
            "wire_bytes": row["wire"],
            **{key: row[key] for key in ("under_way", "steps_a_sample", "samples_ms") if key in row},
        }
    return {"label": case.label, "params_bytes": params_bytes, "ranks": ranks}


def _rank(options: argparse.Namespace) -> None:
    """Is what torchrun runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = _work(CASES[options.models[0]], options.ranks, options.rounds)
    if results:
        options.out.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _measure(name: str, sizes: list[int], rounds: int, tick: Tick) -> dict[str, Any]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={max(sizes)}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        own = [__file__, "--models", name, "--rounds", str(rounds), "--out", str(out), "--ranks", *map(str, sizes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with subprocess.Popen([*launch, *own], env=environment, stdout=subprocess.PIPE, text=True) as running:
            for line in running.stdout or ():
                tick(line.strip())
        if running.returncode:
            raise SystemExit(f"{name}: the ranks must all finish, got exit status {running.returncode}.")
        return dict(json.loads(out.read_text()))


# On paper


DEVICES = 8
BANDWIDTHS = (25e9, 1.25e9)  # bytes/s that a device can send: 200 and 10 Gbit/s
FLOPS = 5e13  # that a device sustains in a convolutional net; about a sixth of what an A100 has in bf16
IMAGES = 128  # a device


@dataclasses.dataclass
class Network:
    """What the calculation needs to know: params, and multiplications and additions of a forward pass of one image."""

    name: str
    params: int
    flops: float


def _networks() -> Iterator[Network]:
    with torch.device("meta"):
        model = wide_resnet(28, 10, 10)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    yield Network("WRN-28-10", sum(p.numel() for p in model.parameters()), counter.get_total_flops())
    # https://docs.pytorch.org/vision/stable/models/generated/torchvision.models.resnet50.html: params, multiply-adds
    yield Network("ResNet-50", 25_557_032, 2 * 4.09e9)


def wire_bytes(params: float, devices: int) -> float:
    """Returns what each device sends in one all-reduce of float32 gradients: `2 (n - 1) / n * 4 params`.

    >>> wire_bytes(1000, 2)
    4000.0
    """
    return 2 * (devices - 1) / devices * 4 * params


def exposed(all_reduces: int, all_reduce: float, pair: float, hidden: bool) -> float:
    """Returns how much longer a SAM step takes with its all-reduces than without, as a share.

    Args:
        all_reduces: How many there are.
        all_reduce: Seconds of one.
        pair: Seconds of one forward and backward pass, of which SAM has two.
        hidden: Whether each runs beside the backward pass, two thirds of the pair, and only the rest is waited for.

    >>> exposed(2, 0.5, 3.0, hidden=False), exposed(1, 0.5, 3.0, hidden=True)
    (0.16666666666666666, 0.0)
    """
    waited = max(0.0, all_reduce - 2 / 3 * pair) if hidden else all_reduce
    return all_reduces * waited / (2 * pair)


HEAD = (
    "network, link",
    "sent per all-reduce",
    "it takes",
    "two passes take",
    "two all-reduces",
    "one (m-sharpness)",
    "two, beside backward",
    "one, beside backward",
)


def paper() -> str:
    """Returns the calculation for a cluster as a markdown table, and what it assumes."""
    table = [list(HEAD)]
    networks = list(_networks())
    for network in networks:
        pair = 3 * network.flops * IMAGES / FLOPS
        size = wire_bytes(network.params, DEVICES)
        for bandwidth in BANDWIDTHS:
            took = size / bandwidth
            added = [exposed(k, took, pair, hidden) for hidden in (False, True) for k in (2, 1)]
            cells = [f"{network.name}, {1e-9 * bandwidth:g} GB/s", f"{1e-6 * size:.0f} MB", f"{1e3 * took:.1f} ms"]
            table.append([*cells, f"{2e3 * pair:.0f} ms", *(f"+{share:.0%}" for share in added)])
    sizes = ", ".join(f"{network.name} {1e-6 * network.params:.1f} M params" for network in networks)
    note = (
        f"On paper, not measured. {sizes}; {DEVICES} devices, float32 gradients, of whose bytes each device sends "
        "2 (n - 1) / n times as many per all-reduce; latency is left out. Assumed: the bandwidth of a device's link, "
        f"{IMAGES} images a device, {1e-12 * FLOPS:.0f} TFLOP/s sustained, a backward pass of twice the forward pass. "
        "Percent: how much longer a step is than without communication; beside backward: if each all-reduce ran "
        "beside its backward pass and only the rest were waited for."
    )
    return f"{common.lines(table)}\n\n{note}"


# Tables


def details(model: dict[str, Any]) -> str:
    """Returns everything measured on one model as a markdown table."""
    table = [["ranks", "step", "ms", "quartiles", "to silent", "to fewest ranks", "sent", "wire", "to least", "ahead"]]
    for n, rows in model["ranks"].items():
        for name, row in rows.items():
            ms, least, way = row["ms"], row["least_wire_bytes"], row.get("under_way")
            table.append(
                [
                    n,
                    name,
                    f"{ms['median']:.2f}",
                    f"{ms['low']:.2f} to {ms['high']:.2f}",
                    *(f"{row[key]['median']:.2f}" for key in ("to_silent", "to_fewest_ranks")),
                    f"{row['sent_bytes']} in {len(row['collectives'])}",
                    f"{row['wire_bytes']:.0f}",
                    f"{row['wire_bytes'] / least:.4f}" if least else "",
                    f"{way['before_first_wait']:.0%} of {way['ms']:.1f} ms" if way else "",
                ]
            )
    return f"{model['label']} ({model['params_bytes']} bytes of params)\n\n{common.lines(table)}"


def _cells(model: dict[str, Any], name: str) -> Iterator[str]:
    ranks = {n: rows[name] for n, rows in model["ranks"].items()}
    row = list(ranks.values())[-1]
    rest = row["sent_bytes"] - row["least_bytes"]
    yield f"{ALL_REDUCES[name]} P" + (f" + {rest} B" if rest else "")
    yield ", ".join(f"{row['wire_bytes'] / model['params_bytes']:.2f}" for n, row in ranks.items() if n != "1")
    yield ", ".join(f"{row['ms']['median']:.1f}" for row in ranks.values())


def _most_over(models: list[dict[str, Any]]) -> float:
    """Returns by how much the wire carried more than what was sent needs, in the row where that is most."""
    rows = [(int(n), row) for model in models for n, rows in model["ranks"].items() for row in rows.values()]
    needed = [(row["wire_bytes"], 2 * (n - 1) / n * row["sent_bytes"]) for n, row in rows]
    return max((wire / least - 1 for wire, least in needed if least), default=0.0)


def summary(results: dict[str, Any]) -> str:
    """Returns the tables of the README: bytes sent, bytes on the wire and step times; and the calculation on paper."""
    models = list(results["models"].values())
    sizes = list(models[0]["ranks"])
    several = ", ".join(n for n in sizes if n != "1")
    head = ["one step"]
    for model in models:
        head += [f"{model['label']}: sent", f"wire, P, {several} ranks", f"ms, {', '.join(sizes)} ranks"]
    table = [head]
    for name in ALL_REDUCES:
        table.append([name, *(cell for model in models for cell in _cells(model, name))])
    params = ", ".join(f"{model['params_bytes']} B" for model in models)
    least = ", ".join(f"{2 * (int(n) - 1) / int(n):g} P" for n in sizes if n != "1")
    note = (
        f"P: the bytes of the params ({params}). Sent: handed to collectives by a rank; bytes beside P are losses and "
        f"buffers. Wire: measured on the loopback interface, a rank; the least for an all-reduce is {least}, and no "
        f"row is more than {_most_over(models):.1%} above that of what it sent. gloo, one thread a rank, each with a "
        f"batch of its own of one size; medians of {results['rounds']} interleaved rounds. {common.origin(results)}"
    )
    if results["rounds"] < FEWEST_ROUNDS:
        note += " A trial: of so few rounds, take the bytes and not the times."
    return f"{common.lines(table)}\n\n{note}\n\n{paper()}"


def main() -> None:
    """Measures, or prints a table of what was measured."""
    parser = argparse.ArgumentParser(description="Bytes sent and time of one data-parallel SAM + momentum SGD step.")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="which models (all)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="sizes of groups (1 2 4)")
    parser.add_argument("--paper", action="store_true", help="print the calculation for a cluster and stop")
    options = common.parse(parser, "communication-cpu.json")
    if dist.is_torchelastic_launched():
        _rank(options)
    elif options.paper:
        print(paper())
    else:
        measures = {name: functools.partial(_measure, name, options.ranks) for name in options.models}
        common.run(options, "models", measures, ("torch", "optree"), details, summary)


if __name__ == "__main__":
    main()
