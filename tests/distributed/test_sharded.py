"""Params that no process holds whole, on real processes: everything is what it is in one process."""

import pytest
import torch

import funcsam as fs
from tests.asserts import close, equal
from tests.distributed.launch import torchrun
from tests.distributed.reduce import data, smooth
from tests.distributed.sharded import ENTRIES, FRONT, batch, front, loss, params, train

pytestmark = pytest.mark.xdist_group("sharded")  # one launch serves all


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What the processes ended with."""
    return torchrun("sharded", request.param, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_sharded_params_give_the_run_of_whole_ones(ranks, entry):
    """Every transform of the zoo: norms are global over shards, over meshes and over leaves that are not sharded."""
    wanted, _ = train(entry(), params(), loss, *batch())
    for name in ("zoo", "mixed") if len(ranks) == 4 else ("zoo",):
        for rank in ranks:
            close(rank[name][entry.name], wanted, rtol=1e-12)


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_params_and_states_stay_where_they_are(ranks, entry):
    """Step by step, on every rank."""
    assert all(rank["placements"][entry.name] for rank in ranks)


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_only_norms_are_sent(ranks, entry):
    """A transform sends a few numbers, whatever the size of the params, and gathers nothing."""
    for rank in ranks:
        assert set(rank["sent"][entry.name]) <= {("all_reduce", 1)}
        assert len(rank["sent"][entry.name]) <= 4


def test_what_is_sent_is_seen(ranks):
    """SAM's norm is one message."""
    assert len(ranks[0]["sent"]["sam"]) == 1
    assert ranks[0]["sent"]["trace"] == []


def test_no_rank_holds_all(ranks):
    whole = max(leaf.numel() for leaf in params().values())
    assert all(rank["held"] <= -(-5 // len(ranks)) * 3 < whole for rank in ranks)


@pytest.mark.parametrize("kind", FRONT)
def test_fully_shard(ranks, kind):
    """FSDP2 modules through the torch.optim front end: SAM, ASAM, a whole chain."""
    model = smooth()
    front(kind, model, data())
    for rank in ranks:
        close(rank["fsdp"][kind], dict(model.named_parameters()), rtol=1e-12)
        equal(rank["fsdp"][kind], ranks[0]["fsdp"][kind])


def test_gather_lets_plain_tensors_pass():
    x = {"w": torch.ones(2)}
    assert fs.distributed.gather(x)["w"] is x["w"]
