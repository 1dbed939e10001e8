"""The `funcsam compare` command, end to end: what it prints and writes, how it stops and goes on, how it says no."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import funcsam as fs
from funcsam import cli
from funcsam.studies import bars, checkpoint, data, judging, networks, optimizers, problem, report, training
from funcsam.studies.errors import StudyError
from funcsam.studies.settings import resolve
from tests.asserts import close, equal

ROOT = Path(__file__).parent.parent
SMALL = ("--no-compile", "--seeds", "2", "--data", "wine", "--batch-size", "32", "--network", "mlp-16")
PAIR = ("-o", "sgd", "-o", "sam:rho=0.5")


def started(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-m", "funcsam", "compare", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def ran(*arguments, **options):
    process = started(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def figures(folder):
    """Everything that does not depend on the clock."""
    content = json.loads((folder / "results.json").read_text())
    for rows in (*content["final"].values(), *content["epochs"].values()):
        rows.pop("seconds_per_step")
        rows.pop("ratio", None)
    return content


def complaint(capfd, *arguments):
    """Runs in this process; returns the one line."""
    assert cli.run(["compare", *map(str, arguments)]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "epoch" not in line or "`" in line]  # progress bars go there too
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run from beginning to end, with what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    code, text, err = ran(*SMALL, *PAIR, "--epochs", 40, "--out", out)
    assert code == 0, err
    return out, text


def test_a_run_prints_its_table_and_writes_its_files(finished):
    out, text = finished
    assert all(word in text for word in ("sgd", "sam:rho=0.5", "test error", "fit to noisy", "sharpness", "times"))
    content = json.loads((out / "results.json").read_text())
    assert content["settings"]["optimizers"] == ["sgd", "sam:rho=0.5"]
    assert {"funcsam", "torch", "optree", "python"} <= set(content["versions"])
    for name in ("sgd", "sam:rho=0.5"):
        epochs, final = content["epochs"][name], content["final"][name]
        assert [len(row) for row in epochs["test_error"]] == [2] * 40
        assert len(epochs["seconds_per_step"]) == 40
        a, b = final["test_error"]["seeds"]
        assert final["test_error"]["seeds"] == epochs["test_error"][-1]
        assert final["test_error"]["mean"] == pytest.approx((a + b) / 2)
        assert final["test_error"]["standard_error"] == pytest.approx(abs(a - b) / 2)
        assert f"{100 * final['test_error']['mean']:.1f} ±" in text
    assert content["final"]["sgd"]["ratio"] == 1
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["sam-rho-0.5-4e5df4f39c33.pt", "sgd.pt"]


RIVALS = ("sam:rho=1e-1", "sam:rho=1e+1")


def test_files_have_names_for_any_system_and_nothing_forks(tmp_path, monkeypatch):
    """Windows knows no fork, and takes none of `<>:"/\\|?*` in a name."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked"))
    short = (*SMALL, *(word for spec in RIVALS for word in ("-o", spec)), "--epochs", "1", "--out", str(tmp_path))
    for more in ((), ("--resume",)):
        assert cli.run(["compare", *short, *more]) == 0
    assert cli.run(["measure", str(tmp_path), "--examples", "9", "--steps", "1", "--draws", "2", "--rho", "0.1"]) == 0
    assert cli.run(["landscape", str(tmp_path), "--examples", "9", "--points", "3"]) == 0
    names = [path.name for path in tmp_path.rglob("*")]
    assert len([name for name in names if name.endswith(".pt")]) == len(RIVALS)
    assert {"results.json", "measures.json", "landscape.html"} <= set(names)
    assert not [name for name in names if set(name) & set('<>:"/\\|?*') or name.endswith((".", " "))]


def test_every_spec_has_a_file_of_its_own():
    """Also where files do not differ by case, and where names may not be long."""
    specs = [
        *RIVALS,
        "sam:rho=0.1",
        "sam:rho=0.10",
        "sgd",
        "sgd:",
        "SGD",
        "sgd-",
        "sam:rho=0,1",
        "sam:rho=0.1,",
        "a" * 300,
        "a" * 300 + "b",
    ]
    names = [checkpoint.path(Path("run"), spec).name for spec in specs]
    assert len({name.lower() for name in names}) == len(specs)
    assert max(map(len, names)) < 80


@pytest.mark.parametrize("spec", ["sgd", "sam:rho=0.5"])
def test_a_member_of_the_ensemble_is_the_training_done_alone(finished, spec):
    content = json.loads((finished[0] / "results.json").read_text())
    seed, parts = 1, data.load("wine")
    noisy = data.noisy(parts.y, parts.classes, 0.4, seed)
    torch.manual_seed(seed)
    network = networks.mlp(parts.x.shape[1], (16,), parts.classes)
    steps = len(parts.y) // 32
    base = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, 40 * steps)
    for epoch in range(40):
        for index in data.order(len(parts.y), 32, [seed], epoch)[:, 0]:

            def gradients(index=index):
                loss = F.cross_entropy(network(parts.x[index]), noisy[index])
                return torch.autograd.grad(loss, list(network.parameters()))

            grads = gradients()
            if spec != "sgd":
                norm = torch.cat([g.flatten() for g in grads]).norm()
                start = [p.detach().clone() for p in network.parameters()]
                with torch.no_grad():
                    for p, g in zip(network.parameters(), grads, strict=True):
                        p += 0.5 * g / norm
                grads = gradients()
                with torch.no_grad():
                    for p, w in zip(network.parameters(), start, strict=True):
                        p.copy_(w)
            for p, g in zip(network.parameters(), grads, strict=True):
                p.grad = g
            base.step()
            schedule.step()
    loss = F.cross_entropy(network(parts.x), noisy).item()
    wrong = (network(parts.test_x).argmax(-1) != parts.test_y).float().mean().item()
    fit = (network(parts.x).argmax(-1) == noisy).float().mean().item()
    rows = content["epochs"][spec]
    assert rows["train_loss"][-1][seed] == pytest.approx(loss, rel=1e-3)
    assert rows["test_error"][-1][seed] == pytest.approx(wrong, abs=1e-6)
    assert rows["noisy_fit"][-1][seed] == pytest.approx(fit, abs=1e-6)


SWEEP = ("--hyper-sweep", "rho=0.05,0.5", "-o", "sgd", "-o", "sam", "-o", "asam:rho=1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep, with what it printed."""
    out = tmp_path_factory.mktemp("swept") / "run"
    code, text, err = ran(*SMALL, *SWEEP, "--epochs", 20, "--out", out)
    assert code == 0, err
    return out, text


def test_a_sweep_chooses_on_held_out_noisy_labels(swept):
    out, text = swept
    content = json.loads((out / "results.json").read_text())
    (name,) = content["sweeps"]
    sweep = content["sweeps"][name]
    errors = [figures["mean"] for figures in sweep["held_out_error"]]
    chosen = sweep["values"][errors.index(min(errors))]
    assert (sweep["option"], sweep["values"], sweep["chosen"]) == ("rho", [0.05, 0.5], chosen)
    assert name == f"sam:rho={chosen:g}"
    assert list(content["final"]) == ["sgd", name, "asam:rho=1"]
    assert content["final"][name]["test_error"] == sweep["test_error"][sweep["values"].index(chosen)]
    assert "(chosen)" in text
    assert "rho was chosen on 27 training examples with noisy labels" in text
    assert "never on the test set" in text


def test_a_value_of_a_sweep_does_not_depend_on_the_others(swept, tmp_path):
    """Up to rounding, it is what any other sweep finds for that value."""
    content = json.loads((swept[0] / "results.json").read_text())["sweeps"]
    (sweep,) = content.values()
    for value, figures in zip(sweep["values"], sweep["test_error"], strict=True):
        other = "1.0" if value != 1.0 else "2.0"
        arguments = [*SMALL, "--hyper-sweep", f"rho={other},{value}", "-o", "sam", "--epochs", "20"]
        code, _, err = ran(*arguments, "--out", tmp_path / str(value))
        assert code == 0, err
        (again,) = json.loads((tmp_path / str(value) / "results.json").read_text())["sweeps"].values()
        assert again["test_error"][1]["seeds"] == pytest.approx(figures["seeds"], abs=0.03)


def test_a_chosen_value_beside_the_same_value_given(tmp_path):
    """Both are reported, under names of their own."""
    more = ("--hyper-sweep", "rho=0.05,5", "-o", "sam", "-o", "sam:rho=0.05", "--epochs", 5)
    code, _, err = ran(*SMALL, *more, "--out", tmp_path)
    assert code == 0, err
    names = list(json.loads((tmp_path / "results.json").read_text())["final"])
    assert names == ["sam:rho=0.05 (chosen)", "sam:rho=0.05"]


def test_held_out_examples_are_not_trained_on(swept):
    kept, held = data.held_out(133)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(133))
    assert len(held) == 27
    for path in (swept[0] / "checkpoints").glob("*.pt"):
        run = torch.load(path, weights_only=True)["run"]
        assert run["held_error"].shape == run["loss"].shape
        assert (run["held_error"] > 0).any()


def test_a_sweep_resumes(swept, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(swept[0], out)
    before = figures(out)
    assert cli.run(["compare", *SMALL, *SWEEP, "--epochs", "20", "--out", str(out), "--resume"]) == 0
    assert figures(out) == before


CNN = ("--no-compile", "--seeds", "2", "--network", "cnn-4-8", "-o", "sam:rho=0.2", "--epochs", "2")


def test_a_convolutional_net_with_batch_norm(tmp_path):
    """Trains as the plain loop does, running statistics included; they are what it is evaluated with."""
    out = tmp_path / "run"
    code, _, err = ran(*CNN, "--out", out)
    assert code == 0, err
    content = json.loads((out / "results.json").read_text())
    seed, parts = 1, data.load("digits")
    noisy = data.noisy(parts.y, parts.classes, 0.4, seed)
    torch.manual_seed(seed)
    network = networks.cnn((1, 8, 8), (4, 8), 10)
    steps = len(parts.y) // 64
    base = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, 2 * steps)
    for epoch in range(2):
        for index in data.order(len(parts.y), 64, [seed], epoch)[:, 0]:
            F.cross_entropy(network(parts.x[index]), noisy[index]).backward()
            grads = [p.grad.clone() for p in network.parameters()]
            norm = torch.cat([g.flatten() for g in grads]).norm()
            start = {name: t.clone() for name, t in network.state_dict().items()}
            with torch.no_grad():
                for p, g in zip(network.parameters(), grads, strict=True):
                    p += 0.2 * g / norm
            base.zero_grad()
            F.cross_entropy(network(parts.x[index]), noisy[index]).backward()
            network.load_state_dict(start)
            base.step()
            base.zero_grad()
            schedule.step()
    network.eval()
    with torch.no_grad():
        loss = F.cross_entropy(network(parts.x), noisy).item()
        wrong = (network(parts.test_x).argmax(-1) != parts.test_y).float().mean().item()
    assert content["epochs"]["sam:rho=0.2"]["train_loss"][-1][seed] == pytest.approx(loss, rel=1e-3)
    assert content["epochs"]["sam:rho=0.2"]["test_error"][-1][seed] == pytest.approx(wrong, abs=0.005)
    before = figures(out)
    assert cli.run(["compare", *CNN, "--out", str(out), "--resume"]) == 0
    assert figures(out) == before


def interrupted(out, number):
    """Starts a run, sends it a signal once it has written checkpoints, and returns what it said."""
    code = "from funcsam.studies import comparison; comparison.SAVE_EVERY = 0.0"
    program = f"{code}\nfrom funcsam.cli import main; import sys; sys.argv[0] = 'funcsam'; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, "compare", *SMALL, *PAIR, "--epochs", "40", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while len(list((out / "checkpoints").glob("*.pt"))) != 2:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert not (out / "results.json").exists()
    return process.returncode, err


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path):
    out = tmp_path / "run"
    assert interrupted(out, signal.SIGKILL)[0] == -signal.SIGKILL
    epochs = [torch.load(path, weights_only=True)["epoch"] for path in (out / "checkpoints").glob("*.pt")]
    assert all(epoch < 40 for epoch in epochs)
    code, _, err = ran(*SMALL, *PAIR, "--epochs", 40, "--out", out)
    assert code == 2
    assert "must be a folder without an unfinished run" in err
    code, _, err = ran(*SMALL, *PAIR, "--epochs", 40, "--out", out, "--resume")
    assert code == 0, err
    assert figures(out) == figures(finished[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path, number):
    code, err = interrupted(tmp_path / "run", number)
    assert code == 130
    assert "Traceback" not in err
    assert "the same command with --resume goes on." in err.splitlines()[-1]
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.pt"))) == 2


def test_a_finished_run_may_be_repeated_and_reported_again(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    for more in ((), ("--resume",)):
        assert cli.run(["compare", *SMALL, *PAIR, "--epochs", "40", "--out", str(out), *more]) == 0
        assert figures(out)["final"] == figures(finished[0])["final"]


BAD = [
    (("-o", "lion"), "compare: `--optimizer` must be one of sgd, adam, adamw, sam, asam, got lion."),
    (("-o", "sam:radius=1"), "sam:radius=1: an option must be one of rho, base, "),
    (("-o", "sam:rho"), "sam:rho: an option must be written as name=value, got rho."),
    (("-o", "sam:rho=big"), "sam:rho=big: `rho` must be a number, got big."),
    (("-o", "sam:rho=-1"), "sam: `rho` must be finite and non-negative, got -1.0."),
    (("-o", "sam:rho=1,rho=2"), "`rho` must be given once, got it twice."),
    (("-o", "sam:base=lion"), "`base` must be one of sgd, adam, adamw, got lion."),
    (("-o", "sgd:nesterov=maybe"), "`nesterov` must be true or false, got maybe."),
    (("-o", "sgd", "-o", "sgd"), "compare: every `--optimizer` must be given once, got sgd twice."),
    (("--data", "cifar"), "compare: `--data` must be one of digits, breast-cancer, wine, cifar10, got cifar."),
    (
        ("--network", "mlp-0"),
        "compare: `--network` must be mlp, cnn, or mlp-64-64 or cnn-16-32 with widths of your own, or wrn-16-8 with "
        "depth and width, got mlp-0.",
    ),
    (("--network", "cnn"), "compare: `--network` must be mlp where the data are not images, got cnn."),
    (("--network", "wrn-16"), "or wrn-16-8 with depth and width, got wrn-16."),
    (("--network", "wrn-16-1"), "compare: `--network` must be mlp where the data are not images, got wrn-16-1."),
    (
        ("--data", "digits", "--network", "wrn-16-1"),
        "compare: `--network` must be mlp or cnn where the images have no colours, got wrn-16-1.",
    ),
    (("--augment", "blur"), "compare: `--augment` must be none, standard or some of crop,flip,cutout, got blur."),
    (("--augment", "flip"), "compare: `--augment` must be none where the data are not photographs, got flip."),
    (("--data-dir", "."), "compare: `--data-dir` must be left out for wine, which scikit-learn ships."),
    (("--subset", "0"), "compare: `--subset` must be at least 1, got 0."),
    (("--subset", "134"), "compare: `--subset` must be at most the 133 examples that there are, got 134."),
    (("--test-subset", "99"), "compare: `--test-subset` must be at most the 45 examples that there are, got 99."),
    (("--noise-kind", "odd"), "compare: `--noise-kind` must be symmetric or asymmetric, got odd."),
    (("--label-smoothing", "1"), "compare: `--label-smoothing` must be in [0, 1), got 1.0."),
    (("--weight-decay", "-1"), "compare: `--weight-decay` must be finite and non-negative, got -1.0."),
    (("--hyper-sweep", "rho"), "compare: `--hyper-sweep` must be written as name=value,value with two values at least"),
    (
        ("--hyper-sweep", "rho=0.1"),
        "`--hyper-sweep` must be written as name=value,value with two values at least, got rho",
    ),
    (("--hyper-sweep", "rho=0.1,big"), "`--hyper-sweep` must be written as name=value,value with two values at least"),
    (("--hyper-sweep", "rho=0.1,0.1"), "every value of `--hyper-sweep` must be given once, got 0.1,0.1."),
    (("--hyper-sweep", "rho=0.1,-1"), "sam: `rho` must be finite and non-negative, got -1.0."),
    (
        ("--hyper-sweep", "nu=0.1,1"),
        "`--hyper-sweep` must name an option that an `--optimizer` has and does not give itself",
    ),
    (("--hyper-sweep", "rho=0.1,1", "-o", "sam:rho=1"), "and does not give itself, got rho."),
    (("--hyper-sweep", "nesterov=0,1", "-o", "sgd"), "must name an option that an `--optimizer` has"),
    (
        ("--hyper-sweep", "rho=0.1,1", "--batch-size", "120"),
        "`--batch-size` must be at most the 106 training examples, got 120.",
    ),
    (("--schedule", "linear"), "compare: `--schedule` must be one of constant, step_decay, cosine, got linear."),
    (("--noise", "2"), "compare: `--noise` must be in [0, 1], got 2.0."),
    (("--noise", "abc"), "Invalid value for '--noise': "),
    (("--seeds", "0"), "compare: `--seeds` must be at least 1, got 0."),
    (("--epochs", "0"), "compare: `--epochs` must be at least 1, got 0."),
    (("--batch-size", "0"), "compare: `--batch-size` must be at least 1, got 0."),
    (("--batch-size", "9999"), "compare: `--batch-size` must be at most the 133 training examples, got 9999."),
    (("--lr", "-1"), "compare: `--lr` must be finite and non-negative, got -1.0."),
    (("-o", "sgd:lr=nan"), "must be finite and non-negative, got nan."),
    (("--device", "abacus"), "compare: `--device` must be one that torch finds here, e.g. cpu, got abacus."),
    (("--device", "meta"), "compare: `--device` must be one that torch finds here, e.g. cpu, got meta."),
    (("--colour",), "No such option"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_gets_one_line(capfd, tmp_path, arguments, text):
    assert text in complaint(capfd, *SMALL, "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_other_settings_or_a_damaged_one(capfd, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    command = (*SMALL, *PAIR, "--epochs", 40, "--out", out)
    before = (out / "results.json").read_bytes()
    other = complaint(capfd, *command, "--lr", "0.2", "--resume")
    assert "must have the settings of this run, got lr 0.1 for 0.2." in other
    assert "must be a folder without a run of other settings" in complaint(capfd, *command, "--lr", "0.2")
    path = out / "checkpoints" / "sgd.pt"
    whole = path.read_bytes()
    for bad in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:900] + b"\xff\xff\xff" + whole[903:]):
        path.write_bytes(bad)
        assert "must be a whole checkpoint, got a damaged file" in complaint(capfd, *command, "--resume")
        assert path.read_bytes() == bad
    assert (out / "results.json").read_bytes() == before


def test_an_out_that_cannot_be_written(capfd, tmp_path):
    (tmp_path / "file").write_text("mine")
    short = (*SMALL, "-o", "sgd", "--epochs", 1)
    for more in ((), ("--resume",)):
        line = complaint(capfd, *short, "--out", tmp_path / "file", *more)
        assert "compare: `--out` must be a folder, got the file" in line
    line = complaint(capfd, *short, "--out", tmp_path / "file" / "run")
    assert "must be a folder that can be written to, got" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path, content = tmp_path / "sgd.pt", {"epoch": 1, "run": {"w": torch.ones(10_000)}}
    checkpoint.save(path, {"lr": 0.1}, content)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StudyError, match="must be a folder that can be written to, got File too large"):
            checkpoint.save(path, {"lr": 0.1}, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert checkpoint.load(path, {"lr": 0.1})["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["sgd.pt"]


def test_a_missing_extra_is_named(capfd, monkeypatch):
    monkeypatch.setattr(cli, "NEEDS", ("typer", "no_such_package"))
    assert cli.run(["compare"]) == 2
    assert capfd.readouterr().err == (
        'funcsam: no_such_package must be installed, try: pip install "funcsam[compare]"\n'
    )


def test_the_library_does_not_import_the_studies():
    code = "import funcsam, sys; assert not {'typer', 'rich', 'sklearn', 'funcsam.studies'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_help_shows_the_defaults(capfd):
    assert cli.run(["compare", "--help"]) == 0
    out = capfd.readouterr().out
    assert all(word in out for word in ("--noise", "0.4", "cosine", "runs/compare", "digits", "sam:rho=0.5"))


@pytest.mark.parametrize(
    ("spec", "chain"),
    [
        ("sgd", lambda lr: fs.sgd(lr, momentum=0.9)),
        ("sgd:momentum=0,nesterov=false", lambda lr: fs.sgd(lr)),
        ("asam:rho=2,eta=0.01", lambda lr: fs.chain(fs.asam(2.0, eta=0.01), fs.sgd(lr, momentum=0.9))),
        ("sam:base=adamw,lr=0.5", lambda lr: fs.chain(fs.sam(), fs.adamw(fs.constant(0.5)))),
        ("adamw", lambda lr: fs.adamw(fs.constant(1e-3))),
    ],
)
def test_a_spec_is_the_chain_it_names(spec, chain):
    w, grads_fn = torch.tensor([1.0, -2.0]), torch.func.grad(lambda w: (w**3).sum())
    parsed, written = optimizers.parse(spec, 0.1, "constant", 10).make(), chain(fs.constant(0.1))
    a, b = parsed.init(w), written.init(w)
    for _ in range(3):
        x, a, _ = parsed.update(w, grads_fn, a)
        y, b, _ = written.update(w, grads_fn, b)
        assert torch.equal(x, y)


def test_figures_that_are_not_finite_stay_valid_json():
    found = report.figures(torch.tensor([1.0, float("nan")]))
    assert found == {"mean": None, "standard_error": None, "seeds": [1.0, None]}
    assert report.figures(torch.tensor([1.0]))["standard_error"] is None


# What is reported, of runs that are made up


def made_up(**figures):
    """A run of some epochs; what is not given is one half everywhere."""
    shape = next(iter(figures.values())).shape
    names = ("loss", "test_error", "noisy_fit", "held_error")
    rows = {name: torch.full(shape, 0.5, dtype=torch.float64) for name in names} | figures
    seconds = figures.get("seconds", torch.ones(shape[0], dtype=torch.float64))
    return training.Run(shape[0], {}, {}, (), **(rows | {"seconds": seconds}))


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_sweep_chooses_by_the_mean_held_out_error_of_the_last_epoch():
    """Not by the test error, the best seed, the first seed or the first epoch. Three values, two seeds."""
    held = rows([0.9, 0.9, 0.9, 0.9, 0.1, 0.1], [0.1, 0.7, 0.2, 0.3, 0.3, 0.4])
    run = made_up(held_error=held, test_error=rows([0.0] * 6, [0.4, 0.4, 0.5, 0.7, 0.1, 0.1]))
    assert report.best(run, 3) == 1
    found = report.sweep(run, "rho", [0.1, 0.2, 0.3])
    assert (found["option"], found["values"], found["chosen"]) == ("rho", [0.1, 0.2, 0.3], 0.2)
    assert [each["seeds"] for each in found["held_out_error"]] == [[0.1, 0.7], [0.2, 0.3], [0.3, 0.4]]
    assert [each["seeds"] for each in found["test_error"]] == [[0.4, 0.4], [0.5, 0.7], [0.1, 0.1]]


def test_error_bars_are_the_deviation_over_the_root_of_the_number_of_seeds():
    """`sqrt(sum (x - mean)^2 / (n - 1) / n)`, in the table, the files and the picture."""
    values = rows(0.1, 0.2, 0.3, 0.6)
    error = (0.14 / 3 / 4) ** 0.5
    found = report.figures(values)
    assert (found["mean"], found["standard_error"]) == pytest.approx((0.3, error))
    mean, spread = report._errors(values[None])
    assert (mean.item(), spread.item()) == pytest.approx((30, 100 * error))
    assert report.cell(found, 100, 1) == "30.0 ± 10.8"
    assert report._errors(rows([0.2]))[1] == 0


def test_a_summary_has_the_last_epoch_and_times_over_sgds():
    """Seconds are the median over the epochs; where there is no sgd, the first optimizer is the measure."""
    runs = {
        "adam": made_up(test_error=rows([0.9, 0.9], [0.2, 0.4], [0.1, 0.3]), seconds=rows(3, 1, 2)),
        "sgd:lr=0.5": made_up(noisy_fit=rows([0.9, 0.9], [0.2, 0.4], [0.6, 0.8]), seconds=rows(4, 4, 9)),
    }
    found = report.summary(runs, {name: rows(1.0, 3.0) for name in runs})
    assert found["adam"]["test_error"]["mean"] == pytest.approx(0.2)
    assert found["sgd:lr=0.5"]["noisy_fit"]["mean"] == pytest.approx(0.7)
    assert [each["seconds_per_step"] for each in found.values()] == [2, 4]
    assert [each["ratio"] for each in found.values()] == [0.5, 1]
    assert found["adam"]["sharpness"]["mean"] == 2
    del runs["sgd:lr=0.5"]
    assert report.summary(runs, {"adam": rows(1.0)})["adam"]["ratio"] == 1


def test_bars_show_the_means_of_the_last_epoch():
    run = made_up(loss=rows([9.0, 9.0], [0.2, 0.4]), test_error=rows([0.9, 0.9], [0.1, 0.3]))
    shown = bars.Bars(5, {"sgd": run}, Console(file=io.StringIO()))
    shown.show("sgd", run)
    (task,) = shown.progress.tasks
    assert (task.completed, task.total, task.fields["note"]) == (2, 5, "loss 0.300  test 80.0 %")


def test_parts_of_a_run_have_their_share_of_the_time():
    """A value of a sweep that of its members; of processes side by side the slowest counts, in the order of seeds."""
    run = made_up(loss=rows([1, 2, 3, 4], [5, 6, 7, 8]), seconds=rows(8, 4))
    part = run.of([1, 3])
    equal((part.loss, part.seconds), (rows([2, 4], [6, 8]), rows(4, 2)))
    other = run.of(slice(0, 2))._replace(seconds=rows(1, 9))
    whole = training.joined([part, other], torch.tensor([2, 0, 3, 1]))
    equal((whole.loss, whole.seconds), (rows([1, 2, 2, 4], [5, 6, 6, 8]), rows(4, 9)))


@pytest.mark.parametrize("looped", [False, True])
def test_the_time_of_a_step_is_the_median_over_the_epoch(looped, monkeypatch):
    """One slow step does not count; where members are trained one after the other their times are added."""
    given, params, buffers = small(batch_size=32)
    run = training.start(lambda: fs.sgd(0.1), given, params, buffers)
    ticks = iter([tick for _ in range(3) for tick in (0, 1, 100, 102, 105)])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(ticks))
    given = given._replace(looped=looped)
    after = training.advance(run, lambda hyper, *carry_and_batch: carry_and_batch[:3], given)
    assert given.steps() == 4
    assert after.seconds.tolist() == [3 * 2.5 if looped else 2.5]  # of 1, 99, 2 and 3


def test_some_examples_are_measured_on_their_own_labels():
    given, _, _ = small()
    judged = torch.tensor([3, 1, 4])
    x, y = given._replace(judged=judged).examined()
    equal((x, y), (given.data.x[judged], given.noisy[:, judged]))
    assert (y != given.data.y[judged]).any()


# The data


def test_features_are_scaled_by_the_training_part():
    """Pixels lie in [0, 1]; other features have mean 0 and variance 1, on the training part; a quarter is test."""
    digits, wine = data.load("digits"), data.load("wine")
    assert (digits.x.min(), digits.x.max()) == (0, 1)
    close(wine.x.double().mean(0), torch.zeros(13, dtype=torch.float64), rtol=1e-6)
    close(wine.x.double().std(0, correction=0), torch.ones(13, dtype=torch.float64), rtol=1e-6)
    assert (len(digits.y), len(digits.test_y), len(wine.y), len(wine.test_y)) == (1347, 450, 133, 45)
    assert (digits.classes, wine.classes) == (10, 3)


def test_noise_is_exact_and_symmetric_noise_draws_from_all_classes():
    """The number of examples is rounded to the nearest; each class comes up, the right one too."""
    y = torch.zeros(100, dtype=torch.int64)
    assert (data.noisy(y, 2, 0.29, 0, {0: 1}) == 1).sum() == 29  # 0.29 * 100 is 28.999999999999996
    drawn = data.noisy(torch.zeros(30_000, dtype=torch.int64), 3, 1.0, 0).bincount(minlength=3)
    assert drawn.sub(10_000).abs().max() < 400
    assert not torch.equal(data.noisy(y, 9, 0.5, 0), data.noisy(y, 9, 0.5, 1))


def test_every_seed_and_every_epoch_shuffles_anew():
    """And sees every example at most once."""
    orders = [data.order(10, 3, [seed], epoch)[:, 0].flatten() for seed in (0, 1) for epoch in (0, 1)]
    for k, order in enumerate(orders):
        assert len(order.unique()) == len(order) == 9
        assert not any(torch.equal(order, other) for other in orders[:k])
    both = data.order(10, 3, [0, 1], 1)
    equal((both[:, 0].flatten(), both[:, 1].flatten()), (orders[1], orders[3]))


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "sgd.pt"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "FORMAT", checkpoint.FORMAT - 1)
        checkpoint.save(path, {}, {})
    with pytest.raises(StudyError, match=f"must have format {checkpoint.FORMAT}, got {checkpoint.FORMAT - 1}"):
        checkpoint.load(path, {})


# What the members of an ensemble train on and are measured on


def small(**more):
    """Three seeds on wine: the problem, params and buffers."""
    given = {"network": "mlp-4", "seeds": 3, "epochs": 1, "device": "cpu", "compile": False}
    return problem.make(resolve("wine", **given, **more), torch.device("cpu"))[:3]


def test_every_seed_has_labels_of_its_own_also_those_held_out():
    """They are those of `data.noisy` by its number, before and after the split."""
    for more in ({}, {"hyper_sweep": "rho=0.1,1", "optimizers": ("sam",)}):
        given, _, _ = small(**more)
        parts = data.load("wine")
        kept, held = data.held_out(len(parts.y)) if more else (torch.arange(len(parts.y)), torch.arange(0))
        for seed in range(3):
            wanted = data.noisy(parts.y, 3, 0.4, seed)
            equal((given.noisy[seed], given.held_noisy[seed]), (wanted[kept], wanted[held]))
        assert not torch.equal(given.noisy[0], given.noisy[1])
        equal((given.data.y, given.held_x), (parts.y[kept], parts.x[held]))


def test_a_sweep_has_a_member_for_each_seed_and_value():
    """One value after another; labels and batches are those of the seed."""
    given, _, _ = small(hyper_sweep="rho=0.1,1", optimizers=("sam",))
    swept = given.swept("rho", (0.1, 1.0))
    assert list(swept.seeds) == [0, 1, 2, 0, 1, 2]
    equal(swept.hyper, {"rho": torch.tensor([0.1, 0.1, 0.1, 1.0, 1.0, 1.0])})
    for member, seed in enumerate(swept.seeds):
        equal((swept.noisy[member], swept.held_noisy[member]), (given.noisy[seed], given.held_noisy[seed]))


@pytest.mark.parametrize("looped", [False, True])
def test_what_is_measured_of_a_member(looped, monkeypatch):
    """Loss, errors and sharpness, written out for each seed; also where the examples come in several batches."""
    given, params, buffers = small(hyper_sweep="rho=0.1,1", optimizers=("sam",))
    given = given._replace(looped=looped)
    for name in ("TOGETHER", "ALONE"):
        monkeypatch.setattr(judging, name, 40)
    found = (*judging.measure(params, buffers, given), judging.sharpness(params, buffers, given))
    network = given.network
    for k in range(3):
        fs.nn.load(network, *fs.ensemble.member((params, buffers), k))
        loss = F.cross_entropy(network(given.data.x), given.noisy[k])
        grads = torch.autograd.grad(loss, list(network.parameters()))
        length = torch.cat([g.flatten() for g in grads]).norm()
        right = [
            (network(x).argmax(-1) == y).float().mean()
            for x, y in (
                (given.data.test_x, given.data.test_y),
                (given.data.x, given.noisy[k]),
                (given.held_x, given.held_noisy[k]),
            )
        ]
        with torch.no_grad():
            for p, g in zip(network.parameters(), grads, strict=True):
                p += 0.05 * g / length
        rise = F.cross_entropy(network(given.data.x), given.noisy[k]) - loss
        wanted = (loss, 1 - right[0], right[1], 1 - right[2], rise)
        close(tuple(each[k].double() for each in found), tuple(each.detach().double() for each in wanted), rtol=1e-6)


@pytest.mark.compile
def test_compiled_and_eager_agree(finished, tmp_path):
    arguments = [argument for argument in SMALL if argument != "--no-compile"]
    code, _, err = ran(*arguments, "-o", "sam:rho=0.5", "--epochs", 3, "--out", tmp_path)
    assert code == 0, err
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["compiled"] == {"sam:rho=0.5": True}
    code, _, err = ran(*SMALL, "-o", "sam:rho=0.5", "--epochs", 3, "--out", tmp_path / "eager")
    eager = json.loads((tmp_path / "eager" / "results.json").read_text())
    for ours, theirs in zip(
        content["epochs"]["sam:rho=0.5"]["train_loss"], eager["epochs"]["sam:rho=0.5"]["train_loss"], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.compile
@pytest.mark.parametrize("compiler", [None, ""])
def test_without_a_compiler_it_says_so_and_goes_on(tmp_path, monkeypatch, compiler):
    monkeypatch.delenv("CXX", raising=False)
    arguments = [argument for argument in SMALL if argument != "--no-compile"]
    bare = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    bare |= {} if compiler is None else {"CXX": compiler}
    code, out, err = ran(*arguments, "-o", "sgd", "--epochs", 1, "--out", tmp_path / "run", env=bare)
    assert code == 0, err
    assert "compare: no working C++ compiler was found, so the steps run eagerly and take longer." in err
    assert "Traceback" not in err
    assert "sgd" in out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["compiled"] == {"sgd": False}
