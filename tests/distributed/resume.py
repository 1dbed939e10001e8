"""Run by torchrun on gloo processes: three steps and a checkpoint, or three more from one.

torchrun --nproc-per-node=2 tests/distributed/resume.py OUT FOLDER save
torchrun --nproc-per-node=4 tests/distributed/resume.py OUT FOLDER load
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import funcsam as fs
from funcsam.distributed import all_reduce_mean, gather, load, save, shard
from funcsam.torch_optim import SAM
from tests.distributed.reduce import EXAMPLES, data, smooth
from tests.distributed.sharded import whole

TX = fs.chain(fs.sam(0.2), fs.trace(0.9), fs.adam(0.01))


def cross_entropy(model, x, y):
    """Mean over the examples of a rank."""
    return nn.functional.cross_entropy(model(x), y)


def train(tx, grads_fn, carry, batches):
    """Steps of a chain; `carry` is what a checkpoint holds."""
    params, buffers, state = carry
    for batch in batches:
        params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, *batch)
    return params, buffers, state


def replicated(averaged=True):
    """Chain, gradients and start of a run in which every rank holds all."""
    tx = fs.chain(all_reduce_mean(), TX) if averaged else TX
    model = smooth()
    params, buffers = fs.nn.split(model)
    return tx, fs.grad_and_value(fs.nn.loss_fn(model, cross_entropy), has_aux=True), (params, buffers, tx.init(params))


def sharded(mesh):
    """The same where no rank holds all."""
    model = smooth()
    loss_fn = fs.nn.loss_fn(model, cross_entropy)
    params, buffers = fs.nn.split(model)
    params = shard(params, mesh)
    grads_fn = fs.grad_and_value(lambda params, *batch: loss_fn(gather(params), *batch), has_aux=True)
    return TX, grads_fn, (params, buffers, TX.init(params))


def front(sharded=True):
    """A module and its optimizer."""
    model = smooth()
    for layer in (model[0], model[2], model) if sharded else ():
        fully_shard(layer)
    return model, SAM(model.parameters(), torch.optim.AdamW, rho=0.2, lr=0.01)


def advance(model, optimizer, batches):
    """Steps by the front end."""

    def closure():
        value = cross_entropy(model, x, y)
        value.backward()
        return value

    for x, y in batches:  # noqa: B007
        optimizer.step(closure)


def main():
    """Computes every case and writes what this rank has."""
    out, folder, phase = sys.argv[1:]
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), EXAMPLES // dist.get_world_size()
    own = [(x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size]) for x, y in data()]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, (tx, grads_fn, start) in {"replicated": replicated(), "sharded": sharded(mesh)}.items():
        carry = start if phase == "save" else load(f"{folder}/{name}", start)
        carry = train(tx, grads_fn, carry, own)
        if phase == "save":
            save(f"{folder}/{name}", carry)
        found[name] = whole(carry[0])
        found[f"{name} spread"] = all(hasattr(leaf, "placements") for leaf in fs.tree.flatten(carry[0])[0])
    model, optimizer = front()
    if phase == "load":
        params, states = get_state_dict(model, optimizer.base_optimizer)
        dcp.load({"model": params, "optimizer": states}, checkpoint_id=f"{folder}/front")
        set_state_dict(model, optimizer.base_optimizer, model_state_dict=params, optim_state_dict=states)
    advance(model, optimizer, own)
    if phase == "save":
        params, states = get_state_dict(model, optimizer.base_optimizer)
        dcp.save({"model": params, "optimizer": states}, checkpoint_id=f"{folder}/front")
    found["front"] = whole(dict(model.named_parameters()))
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
