"""Many processes: averages, sharded params, checkpoints, on PyTorch's own distributed engine.

chain(all_reduce_mean(), sam(rho), sgd(lr))     one ascent for all ranks
chain(sam(rho), all_reduce_mean(), sgd(lr))     one ascent per rank: m-sharpness, and half the traffic
"""

from funcsam.distributed.average import all_reduce_mean, broadcast, mean
from funcsam.distributed.checkpoint import load, save
from funcsam.distributed.sharding import gather, shard

__all__ = ["all_reduce_mean", "broadcast", "gather", "load", "mean", "save", "shard"]
