"""Data parallel training with the front end, on real processes."""

import pytest

import funcsam as fs
from tests.asserts import close, equal
from tests.distributed.ddp import data, loss, network
from tests.distributed.launch import torchrun

pytestmark = pytest.mark.xdist_group("ddp")  # one launch serves all


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes ended with."""
    return torchrun("ddp", 2, tmp_path_factory.mktemp("ddp"))


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
