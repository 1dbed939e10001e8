"""Run by torchrun on gloo processes: SAM on gradients accumulated over micro-batches, where params are sharded.

torchrun --nproc-per-node=2 tests/distributed/accumulate.py OUT
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import funcsam as fs
from funcsam.torch_optim import SAM
from tests.distributed.reduce import EXAMPLES, data, smooth
from tests.distributed.sharded import whole

TX = fs.chain(fs.sam(0.2), fs.sgd(0.1, momentum=0.9))


def cross_entropy(model, x, y):
    """Mean over the examples of a rank."""
    return nn.functional.cross_entropy(model(x), y)


def fsdp(batches):
    """Params of a module under FSDP2; gradients are synchronised in the last micro-batch of each pass."""
    model = smooth()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9, first_pass="closure")

    def closure():
        for part, last in ((slice(0, len(x) // 2), False), (slice(len(x) // 2, None), True)):
            model.set_requires_gradient_sync(last)
            (cross_entropy(model, x[part], y[part]) / 2).backward()

    for x, y in batches:  # noqa: B007
        optimizer.step(closure)
    return whole(dict(model.named_parameters()))


def functions(batches, mesh):
    """Params of the chain with slices in a plain loop."""
    model = smooth()
    loss_fn = fs.nn.loss_fn(model, cross_entropy)
    grads_fn = fs.grad_and_value(lambda params, *batch: loss_fn(fs.distributed.gather(params), *batch), has_aux=True)
    tx = fs.chain(fs.microbatch(fs.identity(), 2, (None, 0, 0), chunk_size=1), TX)
    params, buffers = fs.nn.split(model)
    params = fs.distributed.shard(params, mesh)
    state = tx.init(params)
    for batch in batches:
        params, state, _ = tx.step(params, grads_fn, state, buffers, *batch)
    return whole(params)


def main():
    """Trains both ways; every rank writes what it ended with."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), EXAMPLES // dist.get_world_size()
    own = [(x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size]) for x, y in data()]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.save({"fsdp": fsdp(own), "functions": functions(own, mesh)}, f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
