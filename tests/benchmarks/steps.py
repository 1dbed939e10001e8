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
import functools
from collections.abc import Callable
from importlib import util
from typing import Any

import common
import torch
import torch.nn.functional as F
from common import LR, MOMENTUM, RHO, Named, Row, Tick
from torch import Tensor, nn

import funcsam as fs

UNIT = "forward + backward"
FLOOR = "floor: 2 x (forward + backward), torch.optim.SGD"
EAGER = "funcsam, eager"
FUNC = "funcsam, eager, torch.func backend"
COMPILED = "funcsam, compiled step"
FRONT = "funcsam.torch_optim.SAM, eager"
PEER = "pytorch_optimizer SAM, eager"
PEER_COMPILED = "pytorch_optimizer SAM, compiled model"
JAX = "optax.contrib.sam, jitted step"


@dataclasses.dataclass
class Case:
    """A model and a batch."""

    model: nn.Module
    x: Tensor
    y: Tensor
    label: str
    checked_steps: int = common.CHECKED_STEPS

    def channels_last(self) -> "Case":
        """Lays out a convolutional net and its images the way compiled code likes them; leaves others alone."""
        if self.x.ndim != 4:
            return self
        layout = torch.channels_last
        model = copy.deepcopy(self.model).to(memory_format=layout)
        return dataclasses.replace(self, model=model, x=self.x.to(memory_format=layout))


# Models


def _mlp(sizes: tuple[int, ...], batch: int, label: str) -> Case:
    return Case(common.mlp(sizes), torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,)), label)


def _wide_resnet(batch: int) -> Case:
    from funcsam.studies.networks import wide_resnet

    model = wide_resnet(16, 1, 10)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    # One step is checked: every further one multiplies what float32 has rounded.
    return Case(model, x, y, f"WRN-16-1, b{batch}", checked_steps=1)


CASES: dict[str, Callable[[], Case]] = {
    "small": lambda: _mlp((64, 128, 128, 10), 64, "MLP 64-128-128-10, b64"),
    "deep": lambda: _mlp((64,) * 20 + (10,), 64, "MLP 20x64, b64"),
    "wide": lambda: _mlp((784, 1024, 1024, 10), 128, "MLP 784-1024-1024-10, b128"),
    "conv": lambda: _wide_resnet(64),
}


# Rows


def _unit(case: Case) -> Row:
    model, x, y = copy.deepcopy(case.model), case.x, case.y

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    return Row(UNIT, step, lambda: common.named(model), lambda: common.optimizer_tensors(model))


def _floor(case: Case) -> Row:
    model, x, y = copy.deepcopy(case.model), case.x, case.y
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Row(FLOOR, step, lambda: common.named(model), lambda: common.optimizer_tensors(model, optimizer))


def _two_steps(case: Case, name: str, compiled: bool = False) -> Row:
    """A loop with `loss.backward()`, with the peer's optimizer or with the front end that has its interface."""
    from pytorch_optimizer import SAM as PEERS

    case = case.channels_last() if compiled else case
    model, x, y = copy.deepcopy(case.model), case.x, case.y
    sam: Any = fs.torch_optim.SAM if name == FRONT else PEERS
    optimizer = sam(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        F.cross_entropy(forward(x), y).backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(forward(x), y).backward()
        optimizer.second_step(zero_grad=True)

    held = functools.partial(common.optimizer_tensors, model, optimizer.base_optimizer)
    return Row(name, step, lambda: common.named(model), held, compiled=compiled)


def _funcsam(case: Case, name: str, backend: Any, compiled: bool = False) -> Row:
    case = case.channels_last() if compiled else case
    model, batch = copy.deepcopy(case.model), (case.x, case.y)
    loss_fn = fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y))
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True, backend=backend)
    tx = fs.chain(fs.sam(RHO), fs.sgd(LR, momentum=MOMENTUM))

    def one(params: Any, state: Any, buffers: Any, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, x, y)
        return params, state, buffers

    run = torch.compile(one, fullgraph=True) if compiled else one
    params, buffers = fs.nn.split(model)
    carry = [params, tx.init(params), buffers]
    del params, buffers
    model.to("meta")  # only its forward is of use

    def step() -> None:
        carry[:] = run(*carry, *batch)

    return Row(name, step, lambda: carry[0], lambda: fs.tree.flatten(carry)[0], compiled=compiled)


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

    def now() -> Named:
        return {name: torch.from_numpy(np.array(param)) for name, param in carry[0].items()}

    return Row(JAX, step, now, wait=lambda: jax.block_until_ready(carry), compiled=True)


def _rows(case: Case) -> list[Row]:
    rows = [
        _unit(case),
        _floor(case),
        _funcsam(case, EAGER, "autograd"),
        _funcsam(case, FUNC, "func"),
        _funcsam(case, COMPILED, "auto", compiled=True),
        _two_steps(case, FRONT),
        _two_steps(case, PEER),
        _two_steps(case, PEER_COMPILED, compiled=True),
    ]
    if case.x.ndim == 2 and util.find_spec("jax") and util.find_spec("optax"):
        rows.append(_optax(case))
    return rows


# Measurements


def _measure(name: str, rounds: int, tick: Tick) -> dict[str, Any]:
    case = CASES[name]()
    rows = _rows(case)
    tick("first steps, compilation")
    stepped = common.first_steps(rows, case.checked_steps)
    errors = common.errors_to_peer(common.named(case.model), stepped, peer=PEER, plain=FLOOR, exempt=(UNIT,))
    results = common.interleaved(rows, rounds, {"units": UNIT, "peers": PEER, "compiled_peers": PEER_COMPILED}, tick)
    for row in rows:
        results[row.name]["error_to_peer"] = errors[row.name]
        if row.name != JAX:
            results[row.name]["memory"] = common.memory(row)
    return {"label": case.label, "params_bytes": common.bytes_of(case.model.parameters()), "rows": results}


# Tables


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
    return f"{model['label']} ({params})\n\n{common.lines(table)}"


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
    note = (
        f"In units of the first row; medians of {results['rounds']} interleaved rounds. P: peak memory above the "
        f"params, in sizes of the params, activations included. {common.origin(results)}"
    )
    return f"{common.lines(table)}\n\n{note}"


def main() -> None:
    """Measures, or prints a table of what was measured."""
    parser = argparse.ArgumentParser(description="Time and memory of one SAM + momentum SGD step.")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="which models (all)")
    options = common.parse(parser, "steps-cpu.json")
    measures = {name: functools.partial(_measure, name) for name in options.models}
    packages = ("torch", "optree", "pytorch_optimizer", "jax", "jaxlib", "optax")
    common.run(options, "models", measures, packages, details, summary)


if __name__ == "__main__":
    main()
