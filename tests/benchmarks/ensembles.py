"""What one SAM + momentum SGD step of an ensemble costs: loops over its members beside one vectorised step.

    python tests/benchmarks/ensembles.py                                        measures, writes ensembles-cpu.json
    python tests/benchmarks/ensembles.py --table results/ensembles-cpu.json     prints the table of the README from it

Every member has its own params and its own batch. The rows of an ensemble take turns and memory is followed as in
`steps.py`. Before that, every member of every row must arrive at the params that it has in the peer's loop.

Memory is also set against that of the members: `to_members` is the peak above the params, divided by the number of
members times the peak of one member's eager step. At 1 or below, an ensemble takes no more than the states, gradients
and activations of its members.
"""

import argparse
import functools
import itertools
from typing import Any

import common
import torch
import torch.nn.functional as F
from common import LR, MOMENTUM, RHO, Named, Row, Tick
from torch import Tensor, nn

import funcsam as fs

SIZES, BATCH = (64, 128, 128, 10), 64
MEMBERS = (4, 16, 64)

PEER = "loop of pytorch_optimizer SAM steps, eager"
LOOP = "loop of funcsam steps, eager"
LOOP_COMPILED = "loop of funcsam steps, compiled"
VMAP = "funcsam, vectorised step, eager"
VMAP_COMPILED = "funcsam, vectorised step, compiled"
PLAIN = "plain SGD"

Member = tuple[Named, Tensor, Tensor]
"""The params and the batch of one member."""


def _model() -> nn.Module:
    return common.mlp(SIZES)


def _members(whole: Member) -> list[Member]:
    params, x, y = whole
    return list(zip(fs.ensemble.unstack(params), x, y, strict=True))


def _functions() -> tuple[fs.Transform, Any]:
    loss_fn = fs.nn.loss_fn(_model().to("meta"), lambda model, x, y: F.cross_entropy(model(x), y))
    tx = fs.chain(fs.sam(RHO), fs.sgd(LR, momentum=MOMENTUM))
    return tx, fs.grad_and_value(loss_fn, has_aux=True)


# Rows


def _peer(whole: Member) -> Row:
    from pytorch_optimizer import SAM

    members = [(fs.nn.load(_model(), params), x, y) for params, x, y in _members(whole)]
    models = [model for model, _, _ in members]
    optimizers = [SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM) for model in models]

    def step() -> None:
        for (model, x, y), optimizer in zip(members, optimizers, strict=True):
            F.cross_entropy(model(x), y).backward()
            optimizer.first_step(zero_grad=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.second_step(zero_grad=True)

    def held() -> list[Tensor]:
        pairs = zip(models, optimizers, strict=True)
        each = [common.optimizer_tensors(model, optimizer.base_optimizer) for model, optimizer in pairs]
        return list(itertools.chain.from_iterable(each))

    return Row(PEER, step, lambda: fs.ensemble.stack([common.named(model) for model in models]), held)


def _loop(whole: Member, compiled: bool = False) -> Row:
    tx, grads_fn = _functions()

    def one(params: Named, state: Any, x: Tensor, y: Tensor) -> tuple[Named, Any]:
        params, state, _ = tx.step(params, grads_fn, state, {}, x, y)
        return params, state

    run = torch.compile(one, fullgraph=True) if compiled else one
    carries = [(params, tx.init(params)) for params in fs.ensemble.unstack(whole[0])]
    batches = list(zip(*whole[1:], strict=True))

    def step() -> None:
        for k, batch in enumerate(batches):
            carries[k] = run(*carries[k], *batch)

    def now() -> Named:
        return fs.ensemble.stack([params for params, _ in carries])

    name = LOOP_COMPILED if compiled else LOOP
    return Row(name, step, now, lambda: fs.tree.flatten(carries)[0], compiled=compiled)


def _vmap(whole: Member, compiled: bool = False) -> Row:
    one, grads_fn = _functions()
    tx = fs.ensemble.vectorize(one)
    run = torch.compile(tx.step, fullgraph=True) if compiled else tx.step
    params = {name: param.clone() for name, param in whole[0].items()}
    carry = [params, tx.init(params)]
    del params

    def step() -> None:
        carry[:] = run(carry[0], grads_fn, carry[1], {}, *whole[1:])[:2]

    name = VMAP_COMPILED if compiled else VMAP
    return Row(name, step, lambda: carry[0], lambda: fs.tree.flatten(carry)[0], compiled=compiled)


# Measurements


def _plain(member: Member) -> Named:
    """Takes the first steps of plain SGD."""
    params, x, y = member
    model = fs.nn.load(_model(), params)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    for _ in range(common.CHECKED_STEPS):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return common.named(model)


def _errors(whole: Member, stepped: dict[str, Named]) -> dict[str, float]:
    """Says how far each row ends from the peer, relative to the way: the member for which it is farthest."""
    worst: dict[str, float] = {}
    for k, member in enumerate(_members(whole)):
        mine = {name: fs.ensemble.member(params, k) for name, params in stepped.items()}
        for name, error in common.errors_to_peer(member[0], {**mine, PLAIN: _plain(member)}, PEER, PLAIN).items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def _measure(count: int, rounds: int, tick: Tick) -> dict[str, Any]:
    params, _ = fs.ensemble.init(_model, seeds=range(count))
    whole = params, torch.randn(count, BATCH, SIZES[0]), torch.randint(SIZES[-1], (count, BATCH))
    rows = [_peer(whole), _loop(whole), _loop(whole, compiled=True), _vmap(whole), _vmap(whole, compiled=True)]
    tick("first steps, compilation")
    errors = _errors(whole, common.first_steps(rows))
    results = common.interleaved(rows, rounds, {"peers": PEER}, tick)
    member = _loop(({name: param[:1] for name, param in params.items()}, whole[1][:1], whole[2][:1]))
    one = common.memory(member)
    for row in rows:
        found = common.memory(row)
        results[row.name] |= {
            "error_to_peer": errors[row.name],
            "memory": found | {"a_member": found["above_params"] / count},
            "to_members": found["above_params"] / (count * one["above_params"]),
        }
    size = common.bytes_of(params.values())
    return {"label": f"N = {count}", "members": count, "params_bytes": size, "one_member_eager": one, "rows": results}


# Tables


def details(ensemble: dict[str, Any]) -> str:
    """Returns everything measured on one ensemble as a markdown table."""
    titles = ["step", "ms", "quartiles", "to peer", "quartiles", "MiB above start", "above params", "KiB a member"]
    table = [[*titles, "to members", "compile s"]]
    for name, row in ensemble["rows"].items():
        ms, ratio, memory = row["ms"], row["peers"], row["memory"]
        table.append(
            [
                name,
                f"{ms['median']:.2f}",
                f"{ms['low']:.2f} to {ms['high']:.2f}",
                f"{ratio['median']:.3f}",
                f"{ratio['low']:.3f} to {ratio['high']:.3f}",
                *(f"{memory[key] / 2**20:.2f}" for key in ("above_start", "above_params")),
                f"{memory['a_member'] / 2**10:.1f}",
                f"{row['to_members']:.2f}",
                f"{row['compile_seconds']:.0f}" if "compile_seconds" in row else "",
            ]
        )
    size, one = ensemble["params_bytes"] / 2**20, ensemble["one_member_eager"]["above_params"] / 2**10
    head = f"{ensemble['label']} ({size:.2f} MiB of params; one member's eager step takes {one:.1f} KiB above its own)"
    return f"{head}\n\n{common.lines(table)}"


def summary(results: dict[str, Any]) -> str:
    """Returns the table of the README: times as multiples of the peer's loop, and the peak memory above the params."""
    ensembles = list(results["members"].values())
    table = [["one SAM + momentum SGD step of N members", *(ensemble["label"] for ensemble in ensembles)]]
    for name in ensembles[0]["rows"]:
        cells = []
        for ensemble in ensembles:
            row = ensemble["rows"][name]
            time = f"{row['ms']['median']:.2f} ms" if name == PEER else f"{row['peers']['median']:.2f}"
            cells.append(f"{time}, {row['memory']['above_params'] / ensemble['params_bytes']:.1f} P")
        table.append([name, *cells])
    first = ensembles[0]
    one = first["one_member_eager"]["above_params"] * first["members"] / first["params_bytes"]
    shares = ", ".join(f"{ensemble['rows'][VMAP_COMPILED]['to_members']:.2f}" for ensemble in ensembles)
    note = (
        f"Members are MLPs {'-'.join(map(str, SIZES))}, each with its own batch of {BATCH}. In units of the first row; "
        f"medians of {results['rounds']} interleaved rounds. P: peak memory above the params, in sizes of the params "
        f"of all members, activations included; a loop holds the activations of one member at a time. One member's "
        f"eager step of funcsam takes {one:.1f} P of its own, and the compiled vectorised step {shares} times as much "
        f"a member. {common.origin(results)}"
    )
    return f"{common.lines(table)}\n\n{note}"


def main() -> None:
    """Measures, or prints a table of what was measured."""
    parser = argparse.ArgumentParser(description="Time and memory of one SAM + momentum SGD step of an ensemble.")
    parser.add_argument("--members", nargs="+", type=int, default=list(MEMBERS), help="sizes of ensembles (4 16 64)")
    options = common.parse(parser, "ensembles-cpu.json")
    measures = {str(count): functools.partial(_measure, count) for count in options.members}
    common.run(options, "members", measures, ("torch", "optree", "pytorch_optimizer"), details, summary)


if __name__ == "__main__":
    main()
