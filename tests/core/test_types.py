"""What type checkers accept and refuse, for code that uses the library."""

import os
import pathlib
import re
import subprocess
import sys

import funcsam

LIBRARY = pathlib.Path(funcsam.__file__).parent
SNIPPET = """
from collections.abc import Callable

import torch
from torch import Tensor

import funcsam as fs

Params = dict[str, Tensor]
tx = fs.sam()
params = {"w": torch.ones(2)}
x = torch.ones(2)


def loss(params: Params, x: Tensor) -> Tensor:
    return (params["w"] * x).sum()


def loss_with_aux(params: Params, x: Tensor) -> tuple[Tensor, Params]:
    return loss(params, x), params


def pair(params: Params, x: Tensor) -> tuple[Params, Tensor]:
    return params, x


def bare(params: Params, x: Tensor, *, flag: bool = True) -> Params:
    return params


def untyped(params, x):  # type: ignore[no-untyped-def]
    return params


state = tx.init(params)
params, state, aux = tx.step(params, pair, state, x)
params, state, aux = tx.step(params, bare, state, x)
params, state, aux = tx.step(params, fs.grad_and_value(loss), state, x)
params, state, aux = tx.step(params, fs.grad_and_value(loss_with_aux, has_aux=True), state, x)
tx.step(params, untyped, state, x)
tx.step(params, lambda params, x: (params, ()), state, x)
tx.step(params, torch.func.grad(loss), state, x)
tx.step(params, torch.func.grad_and_value(loss), state, x)
module = torch.nn.Linear(1, 1)
tx.step(dict(module.named_parameters()), fs.grad_and_value(lambda params, x: params["weight"].sum()), state, x)
tx.step(params, loss, state, x)  # wrong: it returns the loss
tx.step(params, loss_with_aux, state, x)  # wrong: it returns the loss and aux
tx.step(params, x, state)  # wrong: not a function

fs.sam(0.05)
fs.sam(torch.tensor(0.05))
fs.sam(rho=lambda step: 0.1 * step)
fs.sam(fs.cosine(0.05, 10))
fs.sam("0.05")  # wrong: a string
fs.sgd(lr={"w": 0.1, "b": {"c": torch.tensor(0.1), "d": [0.1, 1]}})
fs.sgd(lr=(0.1, fs.cosine(0.1, 10), {"c": lambda step: 0.1}))
fs.sgd(lr="0.1")  # wrong: a string
fs.sgd(lr=[0.1, "0.1"])  # wrong: a string in a list
fs.sgd(lr=None)  # wrong: no number
fs.sgd(lr=lambda step: "0.1")  # wrong: a schedule that returns a string
fs.masked(tx, {"w": True, "b": [True, False]})
fs.masked(tx, lambda path, leaf: leaf.ndim > 1)
fs.masked(tx, {"w": "yes"})  # wrong: a string in a mask
fs.masked(fs.sam, True)  # wrong: a function in the place of a transform
fs.microbatch(tx, 2, in_dims=(0, None, {"x": 0, "y": 1}))
fs.microbatch(tx, 2, in_dims="x")  # wrong: a string
fs.partition(lambda path, leaf: leaf.ndim, {0: fs.sgd(), 1: fs.chain(tx, fs.sgd())})

fs.grad_and_value(x)  # wrong: not a function
fs.grad_and_value(lambda params: 0.1)  # wrong: a loss that is a number
fs.grad_and_value(loss, backend="jax")  # wrong: an unknown backend


def update(grads: Params, state: tuple[()], params: Params) -> tuple[Params, tuple[()]]:
    return grads, state


def update_of_transform(
    params: Params, grads_fn: Callable[..., tuple[Params, Tensor]], state: tuple[()], x: Tensor
) -> tuple[Params, tuple[()], Tensor]:
    grads, aux = grads_fn(params, x)
    return grads, state, aux


fs.lift(lambda params: (), update)
fs.Transform(lambda params: (), update_of_transform, ())
fs.lift(lambda params: (), update_of_transform)  # wrong: the update of a Transform
fs.lift(update)  # wrong: no init
"""


def test_what_type_checkers_refuse(tmp_path):
    """The lines that are marked as wrong, and no others."""
    (tmp_path / "snippet.py").write_text(SNIPPET)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "snippet.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(LIBRARY.parent), "MYPY_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = {int(line) for line in re.findall(r"^snippet.py:(\d+): error: ", run.stdout, re.MULTILINE)}
    lines = SNIPPET.splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if "# wrong: " in line}
    said = "\n".join(f"{number}: {lines[number - 1]}" for number in sorted(errors ^ wrong))
    assert errors == wrong, f"refused or accepted by mistake:\n{said}\n{run.stdout}{run.stderr}"


def test_the_word_any_is_rare():
    """A name of `core/types.py` says more. Studies, which handle files and tables, are not counted."""
    counts = {
        str(file.relative_to(LIBRARY)): len(re.findall(r"\bAny\b", file.read_text()))
        for file in LIBRARY.rglob("*.py")
        if "studies" not in file.relative_to(LIBRARY).parts
    }
    assert sum(counts.values()) < 60, {file: count for file, count in counts.items() if count}
