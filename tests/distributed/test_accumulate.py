"""Accumulated gradients of sharded params, on real processes: the step is that of the whole batch in one process."""

import pytest

import funcsam as fs
from tests.asserts import close
from tests.distributed.accumulate import TX, cross_entropy
from tests.distributed.launch import torchrun
from tests.distributed.reduce import data, smooth

pytestmark = pytest.mark.xdist_group("accumulate")  # one launch serves all


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes ended with."""
    return torchrun("accumulate", 2, tmp_path_factory.mktemp("accumulate"))


@pytest.mark.parametrize("kind", ["fsdp", "functions"])
def test_accumulated_gradients_of_sharded_params(ranks, kind):
    """Two ranks with two micro-batches each: as one process with the whole batch."""
    model = smooth()
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, cross_entropy), has_aux=True)
    params, buffers = fs.nn.split(model)
    state = TX.init(params)
    for batch in data():
        params, state, _ = TX.step(params, grads_fn, state, buffers, *batch)
    for rank in ranks:
        close(rank[kind], params, rtol=1e-12)
