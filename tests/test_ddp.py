"""Data parallel training with the front end, on real processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcsam as fs
from tests.asserts import close, equal
from tests.distributed.ddp import data, loss, network

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes ended with."""
    out = tmp_path_factory.mktemp("ddp")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "tests/distributed/ddp.py", str(out)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def pure(tx):
    """The same training in one process."""
    model = network()
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True)
    params, buffers = fs.nn.split(model)
    state = tx.init(params)
    for batch in data():
        params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, *batch)
    return params


def test_no_sync_around_the_forward_pass_is_m_sharpness(ranks):
    """One ascent per rank: `chain(microbatch(sam(rho), 2), sgd(lr))`."""
    slices = fs.microbatch(fs.sam(0.2), 2, (None, 0, 0))
    close(ranks[0]["own"], pure(fs.chain(slices, fs.sgd(0.1, momentum=0.9))), rtol=1e-12)


def test_a_closure_is_sam_on_the_whole_batch(ranks):
    """One ascent for all: `chain(sam(rho), sgd(lr))`, which is another run."""
    close(ranks[0]["common"], pure(fs.chain(fs.sam(0.2), fs.sgd(0.1, momentum=0.9))), rtol=1e-12)
    assert (ranks[0]["common"]["0.weight"] - ranks[0]["own"]["0.weight"]).abs().max() > 1e-6


def test_ranks_end_alike(ranks):
    """Bit for bit, though each has climbed to a point of its own."""
    equal(ranks[0], ranks[1])
