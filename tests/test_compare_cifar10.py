"""`funcsam compare --data cifar10`, end to end, on a few real images."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import funcsam as fs
from funcsam import cli
from funcsam.studies import (
    augment,
    checkpoint,
    cifar10,
    comparison,
    data,
    judging,
    networks,
    optimizers,
    problem,
    training,
)
from funcsam.studies.errors import StudyError
from funcsam.studies.settings import resolve

DATA = Path(__file__).parent / "data"
SHORT = ("--data", "cifar10", "--data-dir", DATA, "--network", "wrn-10-1", "--no-compile", "--batch-size", "20")
PAIR = ("-o", "sgd", "-o", "sam:rho=0.05")


def run(*arguments):
    return cli.run(["compare", *map(str, arguments)])


def complaint(capfd, *arguments):
    assert run(*arguments) == 2
    out, err = capfd.readouterr()
    assert not out
    (line,) = err.splitlines()
    return line


def figures(folder):
    """Everything that does not depend on the clock."""
    content = json.loads((folder / "results.json").read_text())
    for rows in (*content["final"].values(), *content["epochs"].values()):
        rows.pop("seconds_per_step")
        rows.pop("ratio", None)
    return content


def states(folder):
    found = {}
    for path in sorted((folder / "checkpoints").glob("*.pt")):
        run = torch.load(path, weights_only=True)["run"]
        found[path.name] = [*run["params"].values(), *run["buffers"].values(), run["loss"], run["test_error"]]
    return found


def settings(**more):
    given = {"network": "wrn-10-1", "batch_size": 20, "seeds": 2, "epochs": 2, "device": "cpu", "compile": False}
    return resolve("cifar10", **(given | {"data_dir": DATA} | more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with two seeds from beginning to end."""
    out = tmp_path_factory.mktemp("finished") / "run"
    torch.manual_seed(0)
    assert run(*SHORT, *PAIR, "--seeds", 2, "--epochs", 2, "--noise", 0.2, "--out", out) == 0
    return out


def test_the_recipe_is_that_of_the_wide_resnet():
    usual = resolve("cifar10", device="cpu", compile=True)
    assert usual.network == "wrn-16-8"
    assert (usual.batch_size, usual.lr, usual.schedule, usual.epochs) == (128, 0.1, "step_decay", 200)
    assert (usual.weight_decay, usual.label_smoothing, usual.noise) == (5e-4, 0.1, 0)
    assert usual.augment == "crop,flip,cutout"
    assert usual.optimizers == ("sgd", "sam:rho=0.05", "asam:rho=2.0")
    small = resolve("digits", device="cpu", compile=True)
    assert (small.network, small.noise, small.seeds, small.epochs, small.batch_size) == ("mlp", 0.4, 8, 100, 64)
    assert (small.lr, small.schedule, small.weight_decay, small.label_smoothing) == (0.1, "cosine", 0, 0)
    assert (small.augment, small.optimizers) == ("none", ("sgd", "sam:rho=0.5", "asam:rho=2.0"))


def test_the_title_says_what_was_done():
    sizes = "cifar10 (50 training examples, 10 test examples), clean labels"
    expected = f"{sizes}, wrn-10-1, crop + flip + cutout, 2 epochs, 1 seed"
    assert settings(subset=50, test_subset=10, seeds=1).title() == expected
    noisy = settings(noise=0.4, noise_kind="asymmetric", augment="none")
    expected = "cifar10, 40 % of the training labels subject to asymmetric noise, wrn-10-1, 2 epochs, 2 seeds"
    assert noisy.title() == expected


@pytest.mark.parametrize(
    ("spec", "chain"),
    [
        ("sgd", lambda lr: fs.sgd(lr, 0.9, weight_decay=0.5)),
        ("sam", lambda lr: fs.chain(fs.sam(), fs.sgd(lr, 0.9, weight_decay=0.5))),
        ("sam:weight_decay=0.25", lambda lr: fs.chain(fs.sam(), fs.sgd(lr, 0.9, weight_decay=0.25))),
        ("adamw", lambda lr: fs.adamw(fs.constant(1e-3))),
    ],
)
def test_weights_on_sgd_decay_outside_the_ascent(spec, chain):
    w, grads_fn = torch.tensor([1.0, -2.0]), torch.func.grad(lambda w: (w**3).sum())
    tx, written = optimizers.parse(spec, 0.1, "constant", 10, None, 0.5).make(), chain(fs.constant(0.1))
    assert torch.equal(tx.update(w, grads_fn, tx.init(w))[0], written.update(w, grads_fn, written.init(w))[0])


@pytest.mark.parametrize("spec", ["sgd", "sam:rho=0.05"])
def test_a_member_is_the_training_done_alone(finished, spec):
    """The whole recipe, written out for one seed with torch's own optimizer, schedule and module."""
    content, seed = json.loads((finished / "results.json").read_text()), 1
    parts = cifar10.load(DATA)
    noisy = data.noisy(parts.y, 10, 0.2, seed)
    pixels = parts.x.double().transpose(0, 1).reshape(3, -1)
    mean, std = pixels.mean(1), pixels.std(1, correction=0)
    torch.manual_seed(seed)
    network = networks.wide_resnet(10, 1)
    base = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(base, [3, 6, 8], gamma=0.2)

    def standardized(x):
        return ((x.double() - mean[:, None, None]) / std[:, None, None]).float()

    for epoch in range(2):
        numbers = augment.draw(5, 20, [seed], epoch)[:, 0]
        for index, drawn in zip(data.order(100, 20, [seed], epoch)[:, 0], numbers, strict=True):
            images = augment.apply(parts.x[index], drawn, augment.NAMES, mean.round().to(torch.uint8))
            x, y = standardized(images), noisy[index]
            F.cross_entropy(network(x), y, label_smoothing=0.1).backward()
            if spec != "sgd":
                start = {name: t.clone() for name, t in network.state_dict().items()}
                norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
                with torch.no_grad():
                    for p in network.parameters():
                        p += 0.05 * p.grad / norm
                network.zero_grad()
                F.cross_entropy(network(x), y, label_smoothing=0.1).backward()
                network.load_state_dict(start)
            base.step()
            base.zero_grad()
            schedule.step()
    network.eval()
    with torch.no_grad():
        logits = network(standardized(parts.x))
        wrong = (network(standardized(parts.test_x)).argmax(-1) != parts.test_y).float().mean().item()
    rows = content["epochs"][spec]
    assert rows["train_loss"][-1][seed] == pytest.approx(F.cross_entropy(logits, noisy).item(), rel=1e-3)
    assert rows["test_error"][-1][seed] == pytest.approx(wrong, abs=0.051)
    assert rows["noisy_fit"][-1][seed] == pytest.approx((logits.argmax(-1) == noisy).float().mean().item(), abs=0.021)


def test_results_say_what_was_trained_and_measured_on(finished):
    content = json.loads((finished / "results.json").read_text())
    assert content["examples"] == {"trained_on": 100, "measured_on": 100, "held_out": 0, "tested_on": 20}
    assert content["settings"]["copy"] == cifar10.load(DATA).copy
    assert content["settings"]["augment"] == "crop,flip,cutout"
    assert "data_dir" not in content["settings"]
    assert (finished / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch):
    """Bit for bit, params and running statistics included."""
    advance, calls = training.advance, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # in the second epoch of the second optimizer
            raise KeyboardInterrupt
        return advance(*arguments)

    command = (*SHORT, *PAIR, "--seeds", 2, "--epochs", 2, "--noise", 0.2, "--out", tmp_path)
    monkeypatch.setattr(training, "advance", stops)
    assert run(*command) == 130
    monkeypatch.undo()
    epochs = [torch.load(path, weights_only=True)["epoch"] for path in (tmp_path / "checkpoints").glob("*.pt")]
    assert sorted(epochs) == [1, 2]
    assert run(*command, "--resume") == 0
    assert figures(tmp_path) == figures(finished)
    ours, theirs = states(tmp_path), states(finished)
    assert list(ours) == list(theirs) == ["sam-rho-0.05-edf91bc4680a.pt", "sgd.pt"]
    assert all(torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))


def test_a_checkpoint_is_saved_as_soon_as_an_epoch_is_long(tmp_path, monkeypatch):
    """After every optimizer's epoch, not only once all of them are done."""
    saved = []
    monkeypatch.setattr(comparison, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "save", lambda path, *_: saved.append(path.name))
    assert run(*SHORT, *PAIR, "--seeds", 1, "--epochs", 1, "--out", tmp_path) == 0
    assert saved == ["sgd.pt", "sam-rho-0.05-edf91bc4680a.pt"]


def test_another_copy_of_the_data_is_refused(capfd, finished, tmp_path):
    shutil.copytree(DATA / cifar10.FOLDER, tmp_path / cifar10.FOLDER)
    path = tmp_path / cifar10.FOLDER / "test_batch"
    content = path.read_bytes()
    path.write_bytes(content.replace(content[1000:1010], bytes(10), 1))  # ten pixels
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    command = [*SHORT, *PAIR, "--seeds", 2, "--epochs", 2, "--noise", 0.2, "--out", out]
    command[command.index(DATA)] = tmp_path
    assert "must be a folder without a run of other settings" in complaint(capfd, *command)
    assert "must have the settings of this run, got copy " in complaint(capfd, *command, "--resume")


def test_members_may_differ_in_a_hyperparameter(tmp_path):
    """A sweep trains each value as it is trained alone."""
    short = (*SHORT, "--seeds", 1, "--epochs", 1, "--subset", 50, "--batch-size", 10)
    for values in ("0.05,0.5", "0.5,1"):
        assert run(*short, "--hyper-sweep", f"rho={values}", "-o", "sam", "--out", tmp_path / values) == 0
    first, second = (json.loads((tmp_path / v / "results.json").read_text()) for v in ("0.05,0.5", "0.5,1"))
    assert first["examples"] == {"trained_on": 40, "measured_on": 40, "held_out": 10, "tested_on": 20}
    (a,), (b,) = first["sweeps"].values(), second["sweeps"].values()
    assert (a["values"][1], b["values"][0]) == (0.5, 0.5)
    assert a["held_out_error"][1] == b["held_out_error"][0]


@pytest.mark.parametrize("network", ["mlp-8", "cnn-4"])
def test_other_networks_train_on_images_as_one_ensemble(tmp_path, network):
    short = [*SHORT, "--seeds", 2, "--epochs", 1, "-o", "sam", "--out", tmp_path]
    short[short.index("wrn-10-1")] = network
    assert run(*short) == 0


def made(**more):
    return problem.make(settings(**more), torch.device("cpu"))


def test_every_epoch_has_batches_and_augmentation_of_its_own():
    given, params, buffers, _ = made()
    seen = []

    def step(hyper, params, buffers, state, x, y, index, numbers):
        seen.append((index, numbers))
        return params, buffers, state

    run = training.start(lambda: fs.sgd(0.1), given, params, buffers)
    for _ in range(2):
        run = training.advance(run, step, given)
    places = [(epoch, seed, k) for epoch in range(2) for seed in range(2) for k in range(5)]
    assert len(seen) == len(places)
    for (index, numbers), (epoch, seed, k) in zip(seen, places, strict=True):
        assert torch.equal(index, data.order(100, 20, [seed], epoch)[k, 0])
        assert torch.equal(numbers, augment.draw(5, 20, [seed], epoch)[k, 0])


def test_one_after_the_other_is_all_at_once():
    """The loop over members is the vectorised ensemble, up to rounding."""
    given, params, buffers, _ = made(noise=0.4)

    make = optimizers.parse("asam:rho=0.5", 0.001, "step_decay", 10, None, 5e-4).make
    found = []
    for each in (given, given._replace(looped=False)):
        run = training.start(make, each, params, buffers)
        run = training.advance(run, training.stepper(make, each), each)
        found.append((run.loss, judging.sharpness(run.params, run.buffers, each), *run.buffers.values()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("change", [{"half": True}, {"channels_last": False}])
def test_precision_and_layout_change_rounding_only(change):
    """bfloat16 autocast, as on an accelerator, and the layout of memory: float32 params, nearly the same loss."""
    given, params, buffers, _ = made(seeds=1)
    make = optimizers.parse("sam:rho=0.05", 0.01, "step_decay", 10, None, 5e-4).make
    plain, other = (
        training.advance(training.start(make, each, params, buffers), training.stepper(make, each), each)
        for each in (given, given._replace(**change))
    )
    assert all(leaf.dtype == torch.float32 for leaf in other.params.values())
    assert all(leaf.is_contiguous() for leaf in other.params.values())
    assert not torch.equal(plain.loss, other.loss)
    torch.testing.assert_close(plain.loss, other.loss, rtol=0.02, atol=0)


class Waits(TorchDispatchMode):
    """Notes operations for which a program must wait for its accelerator: those that give Python a value or a size."""

    NAMES = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "repeat_interleave.Tensor")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.").removesuffix(".default")
        by_mask = name == "index.Tensor" and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in self.NAMES or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", ["sgd", "sam:rho=0.05", "asam:rho=0.5"])
def test_nothing_inside_an_epoch_waits_for_the_device(spec):
    """Augmentation, both passes under autocast, the schedule and the update only hand work over."""
    given, params, buffers, _ = made(seeds=1)
    given = given._replace(half=True)
    make = optimizers.parse(spec, 0.1, "step_decay", 10, None, 5e-4).make
    (part,) = training._parts(training.start(make, given, params, buffers), given, 0, 2)
    step, carry = training.stepper(make, given), part.carry
    with Waits() as waits:
        for index, numbers in zip(part.batches, part.numbers, strict=True):
            carry = step(part.hyper, *carry, given.data.x, part.labels, index, numbers)
    assert waits.seen == []
    with Waits() as waits:  # the test can see what it looks for
        torch.ones(2)[torch.ones(2) > 0].sum().item()
    assert waits.seen == ["index.Tensor", "_local_scalar_dense"]


def test_measuring_in_batches_changes_nothing(monkeypatch):
    given, params, buffers, _ = made(seeds=2, noise=0.4)
    for looped in (True, False):
        each = given._replace(looped=looped)
        whole = (*judging.measure(params, buffers, each), judging.sharpness(params, buffers, each))
        monkeypatch.setattr(judging, "ALONE", 7)
        monkeypatch.setattr(judging, "TOGETHER", 7)
        parts = (*judging.measure(params, buffers, each), judging.sharpness(params, buffers, each))
        monkeypatch.undo()
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_at_most_so_many_training_examples_are_measured(monkeypatch):
    assert made()[0].judged is None
    monkeypatch.setattr(problem, "JUDGED", 30)
    given = made()[0]
    x, y = given.examined()
    assert x.shape[0] == y.shape[1] == 30
    assert given.data.y[given.judged].bincount().tolist() == [3] * 10


def test_images_are_standardized_by_what_is_trained_on():
    given, _, buffers, _ = made(subset=50)
    pixels = given.data.x.double().transpose(0, 1).reshape(3, -1)
    assert given.data.x.dtype == torch.uint8
    torch.testing.assert_close(buffers["0.mean"][0].flatten(), pixels.mean(1).float())
    torch.testing.assert_close(buffers["0.std"][1].flatten(), pixels.std(1, correction=0).float())
    assert given.fill.tolist() == [round(value) for value in pixels.mean(1).tolist()]


def test_a_subset_has_every_class_and_holds_the_smaller_ones():
    y = torch.arange(10).repeat(50)
    y = torch.cat([y, torch.zeros(7, dtype=torch.int64)])
    found = [set(data.subset(y, size).tolist()) for size in (10, 35, 200, 507)]
    assert all(a < b for a, b in itertools.pairwise(found))
    assert y[data.subset(y, 200)].bincount().tolist() == [20] * 10
    assert sorted(y[data.subset(y, 35)].bincount().tolist()) == [3] * 5 + [4] * 5
    assert data.subset(y, 507).tolist() == list(range(507))
    with pytest.raises(
        StudyError, match=r"compare: `--subset` must be at most the 507 examples that there are, got 508"
    ):
        data.subset(y, 508)


def test_asymmetric_noise_moves_classes_to_those_like_them():
    y = torch.arange(10).repeat_interleave(1000)
    noisy = data.noisy(y, 10, 0.4, 0, data.confused("cifar10", 10))
    counts = torch.zeros(10, 10).index_put((y, noisy), torch.ones(len(y)), accumulate=True)
    moved = {(9, 1), (2, 0), (4, 7), (3, 5), (5, 3)}  # truck, bird, deer, cat and dog
    for k in range(10):
        for j in range(10):
            if (k, j) in moved:
                assert 350 < counts[k, j] < 450
            elif k != j:
                assert counts[k, j] == 0
    names = cifar10.CLASSES
    assert {(names[k], names[j]) for k, j in moved} == {
        ("truck", "automobile"), ("bird", "airplane"), ("deer", "horse"), ("cat", "dog"), ("dog", "cat"),
    }  # fmt: skip
    assert data.confused("wine", 3) == {0: 1, 1: 2, 2: 0}


BAD = [
    (
        ("--network", "wrn-15-1"),
        "compare: `--network` wrn must have a depth of 10, 16, 22, 28, ..., got 15 in wrn-15-1.",
    ),
    (("--network", "wrn-4-1"), "compare: `--network` wrn must have a depth of 10, 16, 22, 28, ..., got 4 in wrn-4-1."),
    (("--subset", "101"), "compare: `--subset` must be at most the 100 examples that there are, got 101."),
    (("--test-subset", "21"), "compare: `--test-subset` must be at most the 20 examples that there are, got 21."),
    (("--test-subset", "0"), "compare: `--test-subset` must be at least 1, got 0."),
    (("--batch-size", "101"), "compare: `--batch-size` must be at most the 100 training examples, got 101."),
    (
        ("--augment", "crop,blur"),
        "compare: `--augment` must be none, standard or some of crop,flip,cutout, got crop,blur.",
    ),
    (("--data-dir", "nowhere"), "compare: `--data-dir` must hold cifar-10-batches-py or cifar-10-python.tar.gz, got "),
]


@pytest.mark.parametrize(("arguments", "text"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_gets_one_line(capfd, tmp_path, arguments, text):
    assert text in complaint(capfd, *SHORT, "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_gets_one_line(capfd, tmp_path):
    shutil.copytree(DATA / cifar10.FOLDER, tmp_path / cifar10.FOLDER)
    (tmp_path / cifar10.FOLDER / "data_batch_2").write_bytes(b"")
    line = complaint(capfd, *SHORT, "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert line.startswith("cifar10: `data_batch_2` must be a whole file of CIFAR-10, got a damaged one (")
