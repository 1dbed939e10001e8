"""A rank that raises, dies or hangs makes the others stop, with a clear message, within the time-out."""

import socket
import subprocess
import sys

import pytest

from tests.distributed.faults import TIMEOUT
from tests.distributed.launch import ENVIRONMENT, ROOT


def start(how):
    """Two processes without torchrun, which would end them all by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "tests/distributed/faults.py", how]
    shared = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def ended(how):
    """What the rank that did nothing wrong says."""
    ranks = start(how)
    try:
        out, _ = ranks[0].communicate(timeout=90)
        assert ranks[0].returncode == (0 if how == "nothing" else 3)
        if how == "raise":
            assert "the data of this rank are bad" in ranks[1].communicate(timeout=90)[1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return out


@pytest.mark.parametrize("how", ["raise", "kill", "hang"])
def test_the_others_stop(how):
    step, seconds, message = ended(how).split(maxsplit=2)
    assert step == "2"
    assert float(seconds) < 2 * TIMEOUT + 5
    assert "distributed: every rank of the group must take part within the time-out" in message
    assert "Look at the logs of the other ranks." in message
    assert ("Timed out" in message) == (how == "hang")


def test_nothing_is_said_where_nothing_fails():
    assert ended("nothing") == "done\n"


def test_torchrun_ends_them_all():
    """With the exit status of a failure, and the message of the rank that raised."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "tests/distributed/faults.py", "raise"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the data of this rank are bad" in done.stderr
