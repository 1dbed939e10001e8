"""Run by torchrun on gloo processes: chains with `all_reduce_mean` in different places, each rank on its own slice.

torchrun --nproc-per-node=2 tests/distributed/reduce.py OUT
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import funcsam as fs
from funcsam.distributed import all_reduce_mean, broadcast, mean, shard
from funcsam.studies.networks import wide_resnet

EXAMPLES = 8
SHARES = ((3, 4, 1, 0), (5, 3, 0, 0))
PLACES = ("before", "after")
TYPES = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64, torch.complex64)


def network(seed=0):
    """A net with running statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def smooth(seed=0):
    """A net whose examples do not see each other."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data():
    """Three batches of eight examples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, EXAMPLES, 4, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (3, EXAMPLES), generator=generator), strict=True))


def wide():
    """A reduced Wide ResNet."""
    torch.manual_seed(0)
    return wide_resnet(10, 1).double()


def images():
    """Two batches of eight small images."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, EXAMPLES, 3, 8, 8, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(10, (2, EXAMPLES), generator=generator), strict=True))


def train(tx, model, batches, **options):
    """Params, buffers and losses after all batches."""
    return run(tx, model, batches, **options)[:3]


def mean_loss(model, x, y):
    """Mean over the examples of a rank."""
    return nn.functional.cross_entropy(model(x), y)


def run(tx, model, batches, start=None, compiled=False, loss=mean_loss):
    """The same, and the state."""
    loss_fn = fs.nn.loss_fn(model, loss)
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True)
    params, buffers = fs.nn.split(model) if start is None else start
    state, losses = tx.init(params), []
    step = torch.compile(tx.step, backend="aot_eager", fullgraph=True) if compiled else tx.step
    for batch in batches:
        params, state, (loss, buffers) = step(params, grads_fn, state, buffers, *batch)
        losses.append(loss.detach())
    return params, buffers, torch.stack(losses), state


def sgd():
    return fs.sgd(0.1, momentum=0.9)


def overflowing(tx, own):
    """One step where the loss of the last rank is infinite: the params and the scale."""
    bad = dist.get_rank() == dist.get_world_size() - 1
    grads_fn = fs.grad_and_value(lambda w, x: (w * x).sum() * (torch.inf if bad else 1.0))
    w = torch.ones(4, dtype=torch.float64)
    w, state, _ = tx.step(w, grads_fn, tx.init(w), own[0][0][0])
    return w, state.scale


def placed(place, rho=0.2):
    """The chain with the average in front of SAM or behind it."""
    parts = (all_reduce_mean(), fs.sam(rho)) if place == "before" else (fs.sam(rho), all_reduce_mean())
    return fs.chain(*parts, sgd())


def weighted(weight):
    """A loss of which a rank has `weight` times its mean; a rank without examples has zero."""

    def loss(model, x, y):
        return weight * nn.functional.cross_entropy(model(x), y, reduction="sum") / max(len(y), 1)

    return loss


def uneven(shares):
    """Both chains on batches of which the ranks have differently many examples."""
    rank, world = dist.get_rank(), dist.get_world_size()
    begin, size, total = sum(shares[:rank]), shares[rank], sum(shares)
    own = [(x[begin : begin + size], y[begin : begin + size]) for x, y in data()]
    return {place: train(placed(place), smooth(), own, loss=weighted(size * world / total)) for place in PLACES}


def skipping(place, own):
    """Three steps; in the second the last rank has a NaN among its data."""
    tx, bad = fs.apply_if_finite(placed(place)), [(x.clone(), y) for x, y in own]
    if dist.get_rank() == dist.get_world_size() - 1:
        bad[1][0][0, 0] = torch.nan
    return run(tx, smooth(), bad)


def refused(params):
    """What is said of params that differ, or are sharded."""
    try:
        all_reduce_mean().init(params)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def nearly_alike(rank):
    """Params of a rank that differ in one thing only: in size with one sum, in sign, in the last leaf, in one NaN."""
    ones = torch.ones(2)
    yield {"w": torch.tensor([1.0, -1.0]) * (rank + 1)}
    yield {"w": torch.tensor([1.0]) * (-1) ** rank}
    yield {"a": ones, "b": ones, "c": ones + (rank == dist.get_world_size() - 1)}
    yield {"w": torch.tensor([0.0, torch.nan if rank else 2.0])}
    yield {"z": torch.complex(ones, ones * rank)}


def main():
    """Computes every case and writes what this rank has."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    size = EXAMPLES // world
    own = [(x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size]) for x, y in data()]
    found = {
        "common": train(fs.chain(all_reduce_mean(), fs.sam(0.2), sgd()), smooth(), own),
        "own": train(fs.chain(fs.sam(0.2), all_reduce_mean(), sgd()), smooth(), own),
        "momentum upstream": train(fs.chain(fs.trace(0.5), all_reduce_mean(), fs.sam(0.2), sgd()), smooth(), own),
        "small buckets": train(fs.chain(all_reduce_mean(bucket_bytes=64), fs.sam(0.2), sgd()), smooth(), own),
        "compiled": train(fs.chain(fs.sam(0.2), all_reduce_mean(), sgd()), smooth(), own, compiled=True),
    }
    for rule in ("mean", "first", "local"):
        found[rule] = train(fs.chain(fs.sam(0.2), all_reduce_mean(aux=rule), sgd()), network(), own)
    mine = [(x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size]) for x, y in images()]
    found["wide"] = train(placed("after"), wide(), mine)
    for shares in SHARES:
        found[f"uneven {shares}"] = uneven(shares[:world])
    for place in PLACES:
        found[f"nan {place}"] = skipping(place, own)
    found["state upstream"] = run(fs.chain(fs.trace(0.5), all_reduce_mean(), fs.sam(0.2), sgd()), smooth(), own)[3]
    found["of any type"] = broadcast([torch.tensor([rank == 0]).to(kind) for kind in TYPES])
    other = fs.nn.split(network(seed=rank))
    found["refused"] = refused(other[0])
    found["refused each"] = [refused(params) for params in nearly_alike(rank)]
    found["sharded"] = refused(shard({"w": torch.ones(4)}, init_device_mesh("cpu", (world,))))
    found["a mean"] = mean({"x": torch.tensor(float(rank)), "n": torch.tensor(rank)})
    found["broadcast"] = train(fs.chain(all_reduce_mean(), sgd()), network(seed=rank), own, start=broadcast(other))
    scaled = fs.dynamic_loss_scale(fs.chain(fs.sam(0.1), all_reduce_mean(), sgd()))
    found["overflow"] = overflowing(scaled, own)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "node"))
        parts = (all_reduce_mean(mesh["node"]), fs.sam(0.2), all_reduce_mean(mesh["nodes"]), sgd())
        found["nodes"] = train(fs.chain(*parts), smooth(), own)
    torch.save(found, f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
