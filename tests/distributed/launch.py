"""Starts scripts of this folder as real processes."""

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}


def torchrun(script, count, out, *arguments):
    """Runs a script on some processes and returns what each has written."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*launch, f"tests/distributed/{script}.py", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(count)]
