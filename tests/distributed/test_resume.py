"""Checkpoints: written by two processes, read by four, and the run goes on as if nothing had happened."""

import pytest
import torch

import funcsam as fs
from tests.asserts import close, equal
from tests.distributed.launch import torchrun
from tests.distributed.reduce import data, smooth
from tests.distributed.resume import TX, advance, cross_entropy, front, replicated, train

TWICE = [*data(), *data()]


pytestmark = pytest.mark.xdist_group("resume")  # one launch serves all


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What four processes ended with that went on from what two had saved."""
    out = tmp_path_factory.mktemp("resume")
    for count in (2, 4):
        (out / str(count)).mkdir()
    torchrun("resume", 2, out / "2", str(out / "checkpoint"), "save")
    return torchrun("resume", 4, out / "4", str(out / "checkpoint"), "load")


def test_every_rank_holds_all(ranks):
    """Params and the states of momentum and Adam, alike on all ranks."""
    for rank in ranks:
        equal(rank["replicated"], ranks[0]["replicated"])
    tx, grads_fn, start = replicated(averaged=False)
    wanted = train(tx, grads_fn, start, TWICE)[0]
    close(ranks[0]["replicated"], wanted, rtol=1e-12)


def test_no_rank_holds_all(ranks):
    """Shards of two ranks come together on four, and stay spread."""
    model = smooth()
    params, buffers = fs.nn.split(model)
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, cross_entropy), has_aux=True)
    wanted = train(TX, grads_fn, (params, buffers, TX.init(params)), TWICE)[0]
    for rank in ranks:
        close(rank["sharded"], wanted, rtol=1e-12)
        assert rank["sharded spread"]


def test_a_module_and_its_optimizer(ranks):
    """FSDP2, by torch's own functions; the front end follows the optimizer that they load."""
    model, optimizer = front(sharded=False)
    advance(model, optimizer, TWICE)
    for rank in ranks:
        close(rank["front"], dict(model.named_parameters()), rtol=1e-12)


def test_nothing_saved_is_lost(tmp_path):
    fs.distributed.save(tmp_path, {"w": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"save: `folder` must not hold a checkpoint, got .*Give every one its own folder"
    ):
        fs.distributed.save(tmp_path, {"w": torch.zeros(2)})
    equal(fs.distributed.load(tmp_path, {"w": torch.zeros(2)}), {"w": torch.ones(2)})


def test_load_says_what_does_not_fit(tmp_path):
    fs.distributed.save(tmp_path / "one", (torch.ones(2), {"w": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"must have the leaves that were saved, got \[1\]\['v'\] in `like` only"):
        fs.distributed.load(tmp_path / "one", (torch.ones(2), {"w": torch.ones(3), "v": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"saved, got \[1\]\['w'\] in the checkpoint only"):
        fs.distributed.load(tmp_path / "one", (torch.ones(2), {}))
    with pytest.raises(
        ValueError, match=r"must have the shapes that were saved, got \(4,\) for \(3,\) at \[1\]\['w'\]"
    ):
        fs.distributed.load(tmp_path / "one", (torch.ones(2), {"w": torch.ones(4)}))
    with pytest.raises(ValueError, match=r"load: `folder` must hold a whole checkpoint, got .*two"):
        fs.distributed.load(tmp_path / "two", torch.ones(2))
    with pytest.raises(TypeError, match="save: `x` must hold tensors only, got int"):
        fs.distributed.save(tmp_path / "three", {"w": 1})


def test_load_takes_dtypes_from_its_template(tmp_path):
    """And leaves it as it is; a tree may be one tensor."""
    fs.distributed.save(tmp_path, torch.ones(2, dtype=torch.float64))
    like = torch.zeros(2)
    equal(fs.distributed.load(tmp_path, like), torch.ones(2))
    equal(like, torch.zeros(2))
