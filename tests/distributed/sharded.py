"""Run by torchrun on gloo processes: params that no process holds whole, and FSDP2 modules.

torchrun --nproc-per-node=2 tests/distributed/sharded.py OUT
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funcsam as fs
from funcsam.torch_optim import SAM, Optimizer
from tests.distributed.reduce import EXAMPLES, data, smooth
from tests.zoo import ZOO

STEPS = 3
ENTRIES = [entry for entry in ZOO if not set(entry.exports) & {fs.microbatch, fs.ascent_batch}]
FRONT = {
    "sam": lambda model: SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9),
    "asam": lambda model: SAM(model.parameters(), torch.optim.AdamW, rho=0.5, adaptive=True, lr=0.01),
    "chain": lambda model: Optimizer(
        model.parameters(), fs.chain(fs.clip_by_global_norm(1.0), fs.sam(0.2), fs.adam(0.01))
    ),
}


def params():
    """Leaves whose sizes do not divide by the number of ranks, one of shape (), one that most ranks have nothing of."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (5, 3), "b": (3,), "s": (), "one": (1,), "c": (3, 2)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def batch():
    """Eight examples."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(EXAMPLES, n, generator=generator, dtype=torch.float64) for n in (5, 3))


def loss(params, x, y):
    """A mean over examples in which every leaf plays a part."""
    out = (x @ params["w"] + params["b"]).tanh() * params["s"] - y
    return out.square().mean() + params["one"].square().sum() * params["c"].square().mean()


def train(tx, params, loss_fn, *batch):
    """Params and state after some steps."""
    grads_fn, state = fs.grad_and_value(loss_fn), tx.init(params)
    for _ in range(STEPS):
        params, state, _ = tx.step(params, grads_fn, state, *batch)
    return params, state


def whole(x):
    """The same tree with plain tensors."""
    return fs.tree.map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, x)


def placements(x):
    """Where the leaves of a tree lie; nothing for plain tensors."""
    return [getattr(leaf, "placements", None) for leaf in fs.tree.flatten(x)[0]]


class Messages(TorchDispatchMode):
    """Counts what is sent: name of the operation, number of entries."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # comes again as the operations that it is made of
        if func.namespace in ("_c10d_functional", "c10d") and not func.__name__.startswith(("wait", "_wrap")):
            first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
            self.sent.append((func.__name__.partition(".")[0], first.numel()))
        return func(*args, **(kwargs or {}))


def mixed(mesh):
    """Leaves on a mesh of two dimensions, on one of its parts, and plain ones."""
    places = {
        "w": (mesh, [Shard(1), Shard(0)]),
        "b": (mesh["rows"], [Shard(0)]),
        "one": (mesh, [Replicate(), Shard(0)]),
    }
    return {name: distribute_tensor(leaf, *places[name]) if name in places else leaf for name, leaf in params().items()}


def fsdp(kind):
    """Params of a net after all batches, its layers sharded by `fully_shard`."""
    rank, size = dist.get_rank(), EXAMPLES // dist.get_world_size()
    model = smooth()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    front(kind, model, [(x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size]) for x, y in data()])
    return whole(dict(model.named_parameters()))


def front(kind, model, batches):
    """Trains a module by the front end; both passes come from a closure."""
    optimizer = FRONT[kind](model)

    def closure():
        value = nn.functional.cross_entropy(model(x), y)
        value.backward()
        return value

    for x, y in batches:  # noqa: B007
        optimizer.step(closure)
    return optimizer


def main():
    """Computes every case and writes what this rank has."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    size = EXAMPLES // world
    own = [each[rank * size : (rank + 1) * size] for each in batch()]
    found = {"zoo": {}, "mixed": {}, "placements": {}, "sent": {}}
    start = fs.distributed.shard(params(), mesh)

    def gathered(params, *batch):
        return loss(fs.distributed.gather(params), *batch)

    for entry in ENTRIES:
        tx = entry()
        ended, state = train(tx, start, gathered, *own)
        found["zoo"][entry.name] = whole(ended)
        like = [place for place in placements(state) if place is not None]
        found["placements"][entry.name] = placements(ended) == placements(start) and set(like) <= set(placements(start))
        with Messages() as messages:
            tx.update(start, fs.grad_and_value(lambda params, *batch: sum(map(_own, params.values()))), tx.init(start))
        found["sent"][entry.name] = messages.sent
    found["held"] = max(leaf.to_local().numel() for leaf in fs.tree.flatten(start)[0])
    found["fsdp"] = {kind: fsdp(kind) for kind in FRONT}
    if world == 4:
        start = mixed(init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "rows")))
        for entry in ENTRIES:
            found["mixed"][entry.name] = whole(train(entry(), start, gathered, *batch())[0])
    torch.save(found, f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()


def _own(leaf):
    """A loss of what lies here, which sends nothing."""
    return (leaf.to_local() if isinstance(leaf, DTensor) else leaf).square().sum()


if __name__ == "__main__":
    main()
