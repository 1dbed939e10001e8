"""`funcsam compare` under torchrun: real processes share the seeds, and everything is what it is in one process."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from funcsam import cli
from funcsam.studies import ranks, training
from funcsam.studies.errors import StudyError
from tests.asserts import close
from tests.distributed.launch import ENVIRONMENT, ROOT

DATA = Path(__file__).parent / "data"
EPOCHS = 5
SMALL = ("--no-compile", "--subset", 200, "--test-subset", 100, "--network", "mlp-16", "--batch-size", 32, "--seeds", 3)
RUN = (*SMALL, "-o", "sgd", "-o", "sam", "--hyper-sweep", "rho=0.05,0.5", "--epochs", EPOCHS)
WIDE = ("--no-compile", "--data", "cifar10", "--data-dir", DATA, "--network", "wrn-10-1", "--batch-size", 20)
WIDE = (*WIDE, "--subset", 40, "--test-subset", 20, "--seeds", 3, "--epochs", 2, "-o", "sam:rho=0.05")

pytestmark = pytest.mark.xdist_group("ranks")  # one run in one process and one in two serve all


def alone(*arguments):
    """Runs in this process."""
    return cli.run(["compare", *map(str, arguments)])


def launched(*arguments, script=("-m", "funcsam"), count=2):
    """Starts processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *script]
    command = [*launch, "compare", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    """Returns exit code, stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def saved(folder):
    """What the checkpoints hold, but for the clock."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("*.pt")):
        run = torch.load(path, weights_only=True)["run"]
        found[path.name] = {name: value for name, value in run.items() if name not in ("epoch", "seconds")}
    return found


def same(folder, other):
    """Asserts that two runs end alike, seed by seed."""
    ours, theirs = (json.loads((each / "results.json").read_text()) for each in (folder, other))
    assert ours["settings"] == theirs["settings"]
    assert list(ours["final"]) == list(theirs["final"])
    for name, wanted in theirs["final"].items():
        for key in ("test_error", "noisy_fit", "sharpness"):
            assert ours["final"][name][key]["seeds"] == pytest.approx(wanted[key]["seeds"], abs=1e-6)
        for key in ("train_loss", "test_error", "noisy_fit"):
            for row, expected in zip(ours["epochs"][name][key], theirs["epochs"][name][key], strict=True):
                assert row == pytest.approx(expected, abs=1e-5)
    for name, wanted in theirs["sweeps"].items():
        assert ours["sweeps"][name]["chosen"] == wanted["chosen"]
        for row, expected in zip(ours["sweeps"][name]["held_out_error"], wanted["held_out_error"], strict=True):
            assert row["seeds"] == pytest.approx(expected["seeds"], abs=1e-6)
    states, wanted = saved(folder), saved(other)
    assert list(states) == list(wanted)
    for name in wanted:
        close(states[name], wanted[name], rtol=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run in one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert alone(*RUN, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same in two, with what they printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    code, text, err = ended(launched(*RUN, "--out", out))
    assert code == 0, err
    return out, text, err


def test_the_figures_do_not_depend_on_the_number_of_processes(one, two):
    """Three seeds on two processes, without a sweep and with one: every figure, and the choice, is the same."""
    content = json.loads((one / "results.json").read_text())
    assert len(set(content["epochs"]["sgd"]["train_loss"][-1])) == 3  # seeds that were mixed up would be seen
    same(two[0], one)


def test_it_prints_once_and_writes_once(one, two):
    out, text, err = two
    assert text.count("┃ optimizer") == text.count("Written:") == 1
    assert text.count("rho was chosen on") == 1
    for bar in ("sgd", "sam"):
        assert sum(line.startswith(bar) and f"{EPOCHS}/{EPOCHS}" in line for line in err.splitlines()) == 1
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (one, out)]
    assert names[0] == names[1]


def test_results_say_how_many_processes_there_were(one, two):
    counts = [json.loads((out / "results.json").read_text())["machine"]["ranks"] for out in (one, two[0])]
    assert counts == [1, 2]


def test_time_is_that_of_the_slowest():
    """For the seeds of its own."""
    parts = [run_of(members, seconds) for members, seconds in (([0, 1], 2.0), ([2], 3.0))]
    whole = training.joined(parts, torch.arange(3))
    assert whole.seconds.tolist() == [3.0]
    assert whole.params["w"].tolist() == whole.loss[0].tolist() == [0, 1, 2]
    order = torch.tensor([1, 2, 0])
    assert training.joined(parts, order).loss[0].tolist() == training.joined(parts, order).params["w"].tolist()


def run_of(members, seconds):
    row = torch.tensor([members], dtype=torch.float64)
    return training.Run(1, {"w": row[0]}, {}, {}, row, row, row, row, torch.tensor([seconds]))


def test_killed_and_resumed_by_another_number_of_processes(one, tmp_path, monkeypatch):
    """Two processes, one of which is killed; then one, which is interrupted; then two to the end."""
    out = tmp_path / "run"
    code, text, err = ended(launched(*RUN, "--out", out, script=("tests/distributed/compare.py", "5")))
    assert code != 0, err
    assert not text
    assert sorted(path.name for path in out.rglob("*")) == ["checkpoints", "sam.pt", "sgd.pt"]
    wanted = saved(one)
    for name, found in saved(out).items():
        close(found["loss"], wanted[name]["loss"][:2], rtol=1e-5)  # whole, and two epochs old
    shutil.copytree(out, tmp_path / "copy")
    assert alone(*RUN, "--out", tmp_path / "copy", "--resume") == 0
    same(tmp_path / "copy", one)

    calls, advance = itertools.count(), training.advance

    def interrupted(*given):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return advance(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "advance", interrupted)
        assert alone(*RUN, "--out", out, "--resume") == 130
    assert [len(found["loss"]) for found in saved(out).values()] == [3, 4]
    code, text, err = ended(launched(*RUN, "--out", out, "--resume"))
    assert code == 0, err
    assert text.count("Written:") == 1
    same(out, one)


def test_a_signal_stops_all_after_the_same_epoch(tmp_path):
    """Torchrun passes on what it gets; one process that hears it is enough. What is done is saved, and said once."""
    out = tmp_path / "run"
    many = (*SMALL, "-o", "sgd", "-o", "sam:rho=0.5", "--epochs", 100_000, "--out", out)
    process = launched(*many, script=("tests/distributed/compare.py", "0"))
    while len(list((out / "checkpoints").glob("*.pt"))) != 2:
        time.sleep(0.05)
        assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, text, err = ended(process)
    assert time.monotonic() - begin < 30
    assert code != 0
    assert not text
    assert err.count("the same command with --resume goes on.") == 1
    done = [len(found["loss"]) for found in saved(out).values()]
    assert max(done) - min(done) in (0, 1)
    assert f"compare: stopped after {min(done)} epochs" in err


def test_networks_that_are_trained_one_after_the_other(tmp_path):
    """Wide ResNets, with augmentation: each process has its own."""
    processes = [launched(*WIDE, "--out", tmp_path / name, count=count) for name, count in (("one", 1), ("two", 2))]
    for process in processes:
        code, _, err = ended(process)
        assert code == 0, err
    same(tmp_path / "two", tmp_path / "one")


def test_bad_input_is_said_once(tmp_path):
    code, text, err = ended(launched(*SMALL, "--batch-size", 999, "--out", tmp_path / "run"))
    assert code != 0
    assert not text
    assert err.count("compare: `--batch-size` must be at most the 200 training examples, got 999.") == 1
    assert "StudyError" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "compare: `--seeds` must be at least the number of processes, 4, got 3."),
        (
            ("--seeds", 4, "--device", "cuda:1"),
            "compare: `--device` must be cuda where every process takes a GPU of its own, got cuda:1.",
        ),
    ],
)
def test_what_processes_cannot_share(capfd, monkeypatch, tmp_path, arguments, text):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert alone(*SMALL, *arguments, "--out", tmp_path / "run") == 2
    assert capfd.readouterr().err == f"{text}\n"


def test_the_first_process_complains_first(capfd, monkeypatch):
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert alone("--colour") == 2
    assert waits == [cli.DELAY]


def test_every_seed_is_trained_once():
    for size, seeds, copies in itertools.product(range(1, 5), range(4, 8), (1, 3)):
        shares = [ranks.Ranks(torch.device("cpu"), rank, size).share(seeds, copies) for rank in range(size)]
        assert sorted(itertools.chain(*shares)) == list(range(copies * seeds))
        assert max(map(len, shares)) - min(map(len, shares)) in (0, copies)


def test_a_process_that_is_gone():
    with (
        pytest.raises(
            StudyError,
            match=r"compare: every process must go on to the end, got one that did not \(Connection closed\)\. "
            "The same command with --resume goes on from the last checkpoints",
        ),
        ranks._all_there(),
    ):
        raise RuntimeError("[gloo/pair.cc:553] Connection closed")
