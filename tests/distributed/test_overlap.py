"""Buckets overlap: every all-reduce is launched before the first is waited for, and no launch waits for other ranks.

As a script it is the worker of the last test: torchrun --nproc-per-node=2 tests/distributed/test_overlap.py OUT
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import funcsam as fs
from funcsam.distributed import all_reduce_mean

ROOT = Path(__file__).parents[2]
LEAVES, LEAF_BYTES = 6, 400
NAMES = {"aten.cat": "cat", "_c10d_functional.all_reduce": "launch", "_c10d_functional.wait_tensor": "wait"}


def named(operator):
    """What of interest an operator is, or `None`."""
    return NAMES.get(str(operator).removesuffix(".default"))


class Order(TorchDispatchMode):
    """Notes what is prepared, launched and waited for, in order, and says when the first wait begins."""

    def __init__(self, waiting=lambda: None):
        super().__init__()
        self.seen, self.waiting = [], waiting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = named(func)
        if name == "wait" and "wait" not in self.seen:
            self.waiting()
        if name:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def gradients():
    """Leaves of 400 bytes: the params, and gradients of a loss without aux."""
    params = {f"w{k}": torch.full((LEAF_BYTES // 4,), float(k)) for k in range(LEAVES)}
    return params, fs.grad_and_value(lambda params: sum(w.square().sum() for w in params.values()) / 2)


def averaged(bucket_bytes, order):
    """Gradients after an average, its collectives noted; the loss stays at home."""
    params, grads_fn = gradients()
    tx = all_reduce_mean(aux="local", bucket_bytes=bucket_bytes)
    state = tx.init(params)
    with order:
        return tx.update(params, grads_fn, state)[0]


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("leaves_a_bucket", "buckets"), [(1, 6), (2, 3), (4, 2), (6, 1)])
def test_every_launch_precedes_the_first_wait(alone, leaves_a_bucket, buckets):
    """One launch per bucket, the next one filled after it, and no wait among them."""
    order = Order()
    averaged(leaves_a_bucket * LEAF_BYTES, order)
    first = order.seen.index("wait")
    assert order.seen[:first] == ["cat", "launch"] * buckets
    assert set(order.seen[first:]) == {"wait"}


@pytest.mark.compile
def test_a_compiled_step_keeps_the_order(alone):
    """The graph that a compiler backend gets has all launches before the first wait; a backend may move them."""
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph

    params, grads_fn = gradients()
    tx = all_reduce_mean(aux="local", bucket_bytes=2 * LEAF_BYTES)
    torch.compile(lambda p: tx.update(p, grads_fn, ())[0], backend=aot_autograd(fw_compiler=note), fullgraph=True)(
        params
    )
    (graph,) = graphs
    seen = [name for name in (named(node.target) for node in graph.graph.nodes) if name]
    assert seen[: seen.index("wait")] == ["cat", "launch"] * 3
    assert set(seen[seen.index("wait") :]) == {"wait"}


def test_no_launch_waits_for_another_rank(tmp_path):
    """The second rank starts when the first says that it has launched all buckets and begins to wait."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [*launch, __file__, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        grads, seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert seen[: seen.index("wait")] == ["cat", "launch"] * LEAVES
        assert all(torch.equal(grads[f"w{k}"], torch.full((100,), float(k))) for k in range(LEAVES))


def main(out):
    """Averages on two ranks, the second late."""
    dist.init_process_group("gloo")
    launched = out / "launched"

    class Late(Order):
        """Begins with its first collective when the other rank has launched all of its own."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            deadline = time.monotonic() + 60
            while named(func) == "launch" and not launched.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError("the first rank must launch all buckets while the second is late")
                time.sleep(0.01)
            return super().__torch_dispatch__(func, types, args, kwargs)

    order = Order(launched.touch) if dist.get_rank() == 0 else Late()
    torch.save((averaged(LEAF_BYTES, order), order.seen), out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
