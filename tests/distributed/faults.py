"""One rank of a group of two that fails in a way of its own; the other writes what it is told.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python tests/distributed/faults.py raise
"""

import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import funcsam as fs
from funcsam.distributed import all_reduce_mean

TIMEOUT = 6
STEPS = 4


def main():
    """Trains; the second rank fails in its third step."""
    how = sys.argv[1]
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    rank = dist.get_rank()
    tx = fs.chain(fs.sam(0.1), all_reduce_mean(), fs.sgd(0.1))
    params = torch.ones(4)
    state = tx.init(params)

    def loss(params, step):
        if rank == 1 and step == 2:
            if how == "raise":
                raise ValueError("the data of this rank are bad")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hang":
                time.sleep(10 * TIMEOUT)
        return params.square().sum()

    for step in range(STEPS):
        begin = time.monotonic()
        try:
            params, state, _ = tx.step(params, fs.grad_and_value(loss), state, step)
        except RuntimeError as error:
            print(f"{step} {time.monotonic() - begin:.1f} {error}", flush=True)
            os._exit(3)
    print("done", flush=True)
    dist.destroy_process_group()  # without it, a process sometimes aborts when it ends


if __name__ == "__main__":
    main()
