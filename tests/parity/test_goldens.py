"""Base optimizers, clipping and SAM against recorded runs of optax; `make_goldens.py` says how they were made."""

import json

import pytest
import torch

import funcsam as fs
from tests.asserts import close
from tests.parity.make_goldens import CURVATURES, GOLDENS, START, TARGETS

CHAINS = {
    "sgd": fs.sgd(0.1),
    "sgd_momentum": fs.sgd(0.1, momentum=0.9),
    "sgd_nesterov": fs.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": fs.adam(0.1),
    "adamw": fs.adamw(0.1, weight_decay=0.1),
    "clip": fs.chain(fs.clip_by_global_norm(1.0), fs.sgd(0.1)),
    "sam": fs.chain(fs.sam(0.3), fs.sgd(0.1)),
    "sam_momentum": fs.chain(fs.sam(0.3), fs.sgd(0.1, momentum=0.9)),
    "sam_adamw": fs.chain(fs.sam(0.3), fs.adamw(0.1, weight_decay=0.1)),
}


def tensors(tree):
    """Numbers as float64 tensors."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in tree.items()}


C, T = tensors(CURVATURES), tensors(TARGETS)


def loss(params):
    """The loss of `make_goldens.py`."""
    bowls = sum((C[name] * (w - T[name]) ** 2).sum() / 2 for name, w in params.items())
    return bowls + (params["a"].sum() + params["b"]) ** 3 / 30


@pytest.mark.parametrize("name", json.loads(GOLDENS.read_text())["trajectories"])
def test_goldens(name):
    """Every step, rtol 1e-7: optax divides by the root of `v` plus `eps` in another order."""
    tx, params = CHAINS[name], tensors(START)
    state = tx.init(params)
    for golden in json.loads(GOLDENS.read_text())["trajectories"][name]:
        params, state, _ = tx.step(params, fs.grad_and_value(loss), state)
        close(params, tensors(golden), rtol=1e-7)
