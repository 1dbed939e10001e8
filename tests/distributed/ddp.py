"""Run by torchrun on two gloo processes: a DDP loop with one ascent per rank, against the pure m-sharpness chain.

torchrun --nproc-per-node=2 tests/distributed/ddp.py OUT
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import funcsam as fs
from funcsam.torch_optim import SAM


def network():
    """The same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss(model, x, y):
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(model(x), y)


def data():
    """Five batches of eight examples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 8, 4, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (5, 8), generator=generator), strict=True))


def own_ascents(model, optimizer, x, y):
    """One ascent per rank: the forward pass of the first half lies inside `no_sync` too."""
    with model.no_sync():
        loss(model, x, y).backward()
    optimizer.first_step(zero_grad=True)
    loss(model, x, y).backward()
    optimizer.second_step(zero_grad=True)


def common_ascent(model, optimizer, x, y):
    """One ascent for all ranks: both gradients are averaged."""

    def closure():
        value = loss(model, x, y)
        value.backward()
        return value

    optimizer.step(closure)


def main() -> None:
    """Trains both ways; every rank writes what it ended with."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {}
    for name, step in (("own", own_ascents), ("common", common_ascent)):
        model = DistributedDataParallel(network())
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9)
        for x, y in data():
            step(model, optimizer, x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4])
        found[name] = fs.nn.split(model.module)[0]
    torch.save(found, f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
