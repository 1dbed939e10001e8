"""`all_reduce_mean` on real processes: the place in the chain says which SAM it is."""

import pytest
import torch

import funcsam as fs
from funcsam.distributed import all_reduce_mean, broadcast
from tests.asserts import close, equal
from tests.distributed.launch import torchrun
from tests.distributed.reduce import (
    EXAMPLES,
    PLACES,
    SHARES,
    TYPES,
    data,
    images,
    mean_loss,
    network,
    run,
    sgd,
    smooth,
    train,
    wide,
)

DIMS = (None, 0, 0)


pytestmark = pytest.mark.xdist_group("distributed")  # one launch serves all


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What the processes ended with."""
    return torchrun("reduce", request.param, tmp_path_factory.mktemp("ranks"))


def sliced(world):
    """The chain of one process that takes one ascent per slice."""
    return fs.chain(fs.microbatch(fs.sam(0.2), world, DIMS), sgd())


def test_before_sam_it_is_one_ascent_for_all(ranks):
    """`chain(all_reduce_mean(), sam(rho), sgd(lr))` is SAM on the whole batch; the loss is that of the whole batch."""
    close(ranks[0]["common"], train(fs.chain(fs.sam(0.2), sgd()), smooth(), data()), rtol=1e-12)


def test_after_sam_it_is_m_sharpness(ranks):
    """`chain(sam(rho), all_reduce_mean(), sgd(lr))` is `chain(microbatch(sam(rho), ranks), sgd(lr))`."""
    close(ranks[0]["own"], train(sliced(len(ranks)), smooth(), data()), rtol=1e-12)
    assert (ranks[0]["own"][0]["0.weight"] - ranks[0]["common"][0]["0.weight"]).abs().max() > 1e-6


def test_a_reduced_wide_resnet(ranks):
    """Params, averaged running statistics and losses are those of one process that takes an ascent per slice."""
    close(ranks[0]["wide"], train(sliced(len(ranks)), wide(), images()), rtol=1e-12)
    for other in ranks[1:]:
        equal(other["wide"], ranks[0]["wide"])


def test_states_upstream_are_averaged(ranks):
    """Momentum in front of the average is momentum of the average."""
    tx = fs.chain(fs.trace(0.5), fs.sam(0.2), sgd())
    close(ranks[0]["momentum upstream"], train(tx, smooth(), data()), rtol=1e-12)
    close(ranks[0]["state upstream"][0], run(tx, smooth(), data())[3][0], rtol=1e-12)


def test_buckets_change_nothing(ranks):
    close(ranks[0]["small buckets"], ranks[0]["common"], rtol=1e-14)


def test_a_compiled_step_is_the_step(ranks):
    """One graph, collectives included."""
    close(ranks[0]["compiled"], ranks[0]["own"], rtol=1e-12)


@pytest.mark.parametrize(
    "case", ["common", "own", "small buckets", "compiled", "mean", "first", "state upstream", "broadcast", "overflow"]
)
def test_ranks_end_alike(ranks, case):
    """Bit for bit."""
    for other in ranks[1:]:
        equal(other[case], ranks[0][case])


def test_buffers_are_averaged_taken_from_the_first_rank_or_kept(ranks):
    """As told; the params do not depend on it."""
    kept = [rank["local"][1]["1.running_mean"] for rank in ranks]
    assert (kept[0] != kept[1]).any()
    close(ranks[0]["mean"][1]["1.running_mean"], sum(kept) / len(kept), rtol=1e-12)
    equal(ranks[0]["first"][1]["1.running_mean"], kept[0])
    equal(ranks[0]["first"][0], ranks[0]["local"][0])
    whole = train(sliced(len(ranks)), network(), data())
    close(ranks[0]["mean"], whole, rtol=1e-12)
    assert ranks[0]["mean"][1]["1.num_batches_tracked"] == 3


def test_ranks_that_start_from_different_seeds_are_refused(ranks):
    """On every rank, with what to do; a broadcast starts all of them from the first."""
    for rank in ranks:
        assert "all_reduce_mean: `params` must be the same on every rank, got others on rank 1" in rank["refused"]
        assert "Start with `params = broadcast(params)`." in rank["refused"]
    size = EXAMPLES // len(ranks)
    wanted = train(fs.chain(fs.microbatch(fs.identity(), len(ranks), DIMS), sgd()), network(), data())
    assert size * len(ranks) == EXAMPLES
    close(ranks[0]["broadcast"], wanted, rtol=1e-12)


def test_ranks_that_are_nearly_alike_are_refused(ranks):
    """One sum or one length is not enough, and every leaf counts."""
    for rank in ranks:
        for text in rank["refused each"]:
            assert "all_reduce_mean: `params` must be the same on every rank" in text


@pytest.mark.parametrize("shares", SHARES)
def test_an_uneven_batch(ranks, shares):
    """With the weights that the docstring names: the mean over all examples, also where a rank has none."""
    counts = shares[: len(ranks)]
    whole = [(x[: sum(counts)], y[: sum(counts)]) for x, y in data()]
    for rank in ranks:
        close(rank[f"uneven {shares}"]["before"], train(fs.chain(fs.sam(0.2), sgd()), smooth(), whole), rtol=1e-12)
        equal(rank[f"uneven {shares}"]["after"], ranks[0][f"uneven {shares}"]["after"])
    close(ranks[0][f"uneven {shares}"]["after"], by_share(counts, whole), rtol=1e-12)


def by_share(counts, batches):
    """Params and losses where every slice climbs on its own and the slices are weighted by their size."""
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(smooth(), mean_loss), has_aux=True)
    params, buffers = fs.nn.split(smooth())
    climb, base = fs.sam(0.2), sgd()
    state, losses = base.init(params), []
    for x, y in batches:
        grads, loss = fs.tree.zeros_like(params), 0.0
        for xs, ys in zip(x.split(counts), y.split(counts), strict=True):
            if len(ys):
                own, _, (value, _) = climb.update(params, grads_fn, climb.init(params), buffers, xs, ys)
                grads = fs.tree.add_scaled(grads, len(ys) / len(y), own)
                loss = loss + len(ys) / len(y) * value.detach()
        updates, state, _ = base.update(params, lambda params, grads=grads: grads, state)
        params = fs.apply_updates(params, updates)
        losses.append(loss)
    return params, buffers, torch.stack(losses)


@pytest.mark.parametrize("place", PLACES)
def test_a_nan_on_one_rank_is_seen_by_all(ranks, place):
    """Every rank skips the step: the run is the one without it."""
    kept = [batch for k, batch in enumerate(data()) if k != 1]
    tx = fs.chain(fs.sam(0.2), sgd()) if place == "before" else sliced(len(ranks))
    wanted = train(tx, smooth(), kept)[0]
    for rank in ranks:
        params, _, losses, state = rank[f"nan {place}"]
        close(params, wanted, rtol=1e-12)
        equal(params, ranks[0][f"nan {place}"][0])
        assert state.skipped == 1
        assert losses.isnan().tolist() == [False, True, False]


def test_sharded_params_are_refused(ranks):
    """Their gradients are averaged already."""
    for rank in ranks:
        assert "all_reduce_mean: `params` must not be sharded, got a DTensor at ['w']" in rank["sharded"]


def test_the_mean_of_a_tree(ranks):
    """Of floating-point leaves; others stay the rank's own."""
    for number, rank in enumerate(ranks):
        equal(rank["a mean"], {"x": torch.tensor((len(ranks) - 1) / 2), "n": torch.tensor(number)})


def test_a_broadcast_keeps_every_type(ranks):
    """Flags, counters, half precision, complex numbers: those of the first rank, side by side."""
    for rank in ranks:
        equal(rank["of any type"], [torch.tensor([True]).to(kind) for kind in TYPES])


def test_an_overflow_on_one_rank_is_seen_by_all(ranks):
    """The step is skipped by every rank, and every scale backs off."""
    for rank in ranks:
        w, scale = rank["overflow"]
        equal(w, torch.ones(4, dtype=torch.float64))
        assert scale == 2.0**15


def test_one_ascent_per_node(ranks):
    """Averages inside a node before the ascent and across nodes after it: two slices of two ranks each."""
    if "nodes" in ranks[0]:
        close(ranks[0]["nodes"][0], train(sliced(2), smooth(), data())[0], rtol=1e-12)


def test_it_says_what_is_missing():
    with pytest.raises(RuntimeError, match=r"all_reduce_mean: torch\.distributed must be initialised"):
        all_reduce_mean().init(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"broadcast: torch\.distributed must be initialised"):
        broadcast(torch.ones(1))
    with pytest.raises(ValueError, match='`aux` must be "mean", "first" or "local", got \'sum\''):
        all_reduce_mean(aux="sum")
    with pytest.raises(ValueError, match="`bucket_bytes` must be at least 1, got 0"):
        all_reduce_mean(bucket_bytes=0)
    with pytest.raises(RuntimeError, match="must not run under `vmap`"):
        fs.ensemble.vectorize(all_reduce_mean()).update(torch.ones(2), lambda w: w, ())
