"""`funcsam measure` and `funcsam landscape` on finished comparisons."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import funcsam as fs
from funcsam import cli
from funcsam.studies import data, finished, measuring, survey
from funcsam.studies.problem import Problem
from tests.asserts import equal

DATA = Path(__file__).parent / "data"
QUICK = ("--examples", 40, "--steps", 2, "--draws", 2, "--rho", 0.1, "--rho", 0.3)
PICTURES = {"landscape-contours.png", "landscape-surfaces.png", "landscape-line.png", "landscape.html"}


def run(*arguments):
    return cli.run([*map(str, arguments)])


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    out = tmp_path_factory.mktemp("wine") / "run"
    small = ("--data", "wine", "--network", "mlp-8", "--batch-size", 32, "--seeds", 2, "--epochs", 3, "--no-compile")
    assert run("compare", *small, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "run"
    small = ("--network", "wrn-10-1", "--batch-size", 20, "--no-compile", "--seeds", 1, "--epochs", 1, "--subset", 60)
    data = ("--data", "cifar10", "--data-dir", DATA)
    assert run("compare", *data, *small, "-o", "sgd", "-o", "sam", "--out", out) == 0
    return out


def test_what_is_measured_is_what_the_measures_say(wine, capsys):
    """Of the models that were saved, on the labels that they were trained on, in evaluation mode."""
    assert run("measure", wine, *QUICK) == 0
    shown = capsys.readouterr().out
    written = json.loads((wine / "measures.json").read_text())
    found = finished.load(wine)
    x, y = measuring.chosen(found.problem, 40)
    assert len(x) == written["examples"] == 40
    for name, models in found.models.items():
        for k, (wanted, loss) in enumerate(
            zip(
                written["measures"]["worst case, rho 0.3"][name]["seeds"],
                written["measures"]["loss"][name]["seeds"],
                strict=True,
            )
        ):
            params, buffers = fs.ensemble.member((models.params, models.buffers), k)

            def loss_fn(params, x, y, buffers=buffers):
                return F.cross_entropy(fs.nn.predict(found.problem.network, params, buffers, x), y)

            assert loss_fn(params, x, y[k]).item() == pytest.approx(loss)
            value = fs.measures.worst_case_sharpness(loss_fn, params, x, y[k], rho=0.3, steps=2)
            assert value.item() == pytest.approx(wanted, rel=1e-5)
        assert written["test_error"][name] == found.results["final"][name]["test_error"]
    for name in ("largest eigenvalue", "worst case, rho 0.1", "m-sharpness, rho 0.3, m 10", "40 training examples"):
        assert name in " ".join(shown.split())


def test_every_seed_is_measured_on_its_own_labels():
    """Each row is what its measure says of one model after the other, with the numbers that its name has."""
    network = torch.nn.Linear(3, 3)
    x, labels = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    noisy = torch.stack([labels, labels.flip(0), labels.roll(1)])
    given = Problem(data.Data(x, labels, x, labels, 3), noisy, x[:0], noisy[:, :0], network, range(3), 4)
    params, buffers = fs.ensemble.init(lambda: torch.nn.Linear(3, 3), range(3))
    found = finished.Finished(None, given, {"sgd": finished.Models(params, buffers)}, {})
    options = measuring.Options(6, (0.1, 0.2, 0.4), 3, 0.7, 0.1, 4)
    steps = []
    values = measuring.values(found, options, steps.append)
    assert sum(steps) == measuring.work(found, options) == 3 * len(values)
    x, noisy = x[data.subset(labels, 6)], noisy[:, data.subset(labels, 6)]
    m = fs.measures
    wanted = {
        "loss": lambda loss, *args: loss(*args),
        "gradient norm": m.gradient_norm,
        "worst case, rho 0.1": lambda *args: m.worst_case_sharpness(*args, rho=0.1, steps=3),
        "worst case, rho 0.2": lambda *args: m.worst_case_sharpness(*args, rho=0.2, steps=3),
        "worst case, rho 0.4": lambda *args: m.worst_case_sharpness(*args, rho=0.4, steps=3),
        "one step, rho 0.2": lambda *args: m.worst_case_sharpness(*args, rho=0.2),
        "m-sharpness, rho 0.2, m 1": lambda *args: m.m_sharpness(*args, m=1, rho=0.2, steps=3),
        "adaptive, rho 0.7": lambda *args: m.worst_case_sharpness(*args, rho=0.7, steps=3, adaptive=True),
        "average case, sigma 0.1": lambda *args: m.average_case_sharpness(*args, rho=0.1, draws=4).mean,
        "largest eigenvalue": lambda *args: m.hessian_eigenpairs(*args).values[0],
        "trace": lambda *args: m.hessian_trace(*args, draws=4).mean,
    }
    assert list(values) == list(wanted)
    loss = fs.nn.loss_fn(network, lambda network, x, y: F.cross_entropy(network(x), y))
    for name, measure in wanted.items():
        each = [
            measure(lambda params, x, y: loss(params, {}, x, y)[0], fs.ensemble.member(params, k), x, noisy[k]).item()
            for k in range(3)
        ]
        assert values[name]["sgd"].tolist() == pytest.approx(each, rel=1e-4, abs=1e-7), name
        assert len({round(value, 8) for value in each}) == 3


def test_numbers_of_a_table_are_short():
    """Three digits of the mean, one of its error."""
    seeds = {"mean": 0.123456, "standard_error": 0.00678, "seeds": []}
    assert measuring._short(seeds) == "0.123 ± 0.007"
    assert measuring._short(seeds | {"standard_error": None}) == "0.123"
    assert measuring._short(seeds | {"mean": None}) == "not finite"


def test_measures_of_images(images):
    """On all of them, where there are fewer than are asked for."""
    assert run("measure", images, *QUICK, "--examples", 500, "--data-dir", DATA) == 0
    written = json.loads((images / "measures.json").read_text())
    assert written["examples"] == 60
    assert "m-sharpness, rho 0.3, m 15" in written["measures"]
    assert all(
        each["mean"] is not None and each["standard_error"] is None
        for row in written["measures"].values()
        for each in row.values()
    )


def test_pictures_of_two_optimizers(wine, tmp_path):
    """By default the first two, in the folder of the run."""
    assert run("landscape", wine, "--points", 3, "--examples", 20) == 0
    assert {path.name for path in wine.iterdir()} >= PICTURES
    named = ("--first", "asam:rho=2.0", "--second", "sgd", "--seed", 1, "--out", tmp_path)
    assert run("landscape", wine, "--points", 3, *named) == 0
    page = (tmp_path / "landscape.html").read_text()
    assert page.index("asam:rho=2.0") < page.rindex("sgd")
    assert "seed 1" in page
    assert (tmp_path / "landscape-line.png").read_bytes() != (wine / "landscape-line.png").read_bytes()


def test_pictures_are_of_the_seed_that_is_named(wine, tmp_path, monkeypatch):
    """Its models, the labels that it was trained on, and clean labels of the test set."""
    seen = []
    around = survey.around
    monkeypatch.setattr(survey, "around", lambda *args, **more: (seen.append((args, more)), around(*args, **more))[1])
    command = ("landscape", wine, "--points", 3, "--radius", 0.25, "--examples", 20, "--seed", 1, "--out", tmp_path)
    assert run(*command) == 0
    (((_, solutions, x, y, _, test), more),) = seen
    found = finished.load(wine)
    examples, noisy = measuring.chosen(found.problem, 20)
    assert list(solutions) == list(found.models)[:2]
    for name, (params, buffers) in solutions.items():
        equal((params, buffers), fs.ensemble.member(tuple(found.models[name]), 1))
    equal((x, y), (examples, noisy[1]))
    equal(test, (found.problem.data.test_x[:20], found.problem.data.test_y[:20]))
    assert (more["radius"], more["points"]) == (0.25, 3)


def test_pictures_of_images(images, tmp_path):
    """Batch normalisation takes the statistics of the examples, and the page says so."""
    assert run("landscape", images, "--points", 3, "--examples", 20, "--data-dir", DATA, "--out", tmp_path) == 0
    assert "batch-norm statistics" in (tmp_path / "landscape.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("measure", "--examples", 0), "measure: `--examples` must be at least 1, got 0."),
        (("measure", "--steps", 0), "measure: `--steps` must be at least 1, got 0."),
        (("measure", "--draws", 1), "measure: `--draws` must be at least 2, got 1."),
        (("measure", "--rho", 0), "measure: `--rho` must be finite and positive, got 0.0."),
        (("measure", "--adaptive-rho", -1), "measure: `--adaptive-rho` must be finite and positive, got -1.0."),
        (("measure", "--sigma", "inf"), "measure: `--sigma` must be finite and positive, got inf."),
        (("measure", "--steps", "x"), "Try: funcsam measure --help"),
        (("landscape", "--first", "adam"), "`--first` must be one of sgd, sam:rho=0.5, asam:rho=2.0, got adam."),
        (("landscape", "--second", "adam"), "`--second` must be one of sgd, sam:rho=0.5, asam:rho=2.0, got adam."),
        (("landscape", "--second", "sgd"), "`--second` must be another optimizer than `--first`, got sgd for both."),
        (("landscape", "--seed", 2), "landscape: `--seed` must be one of the 2 seeds, from 0, got 2."),
        (("landscape", "--points", 4), "landscape: `--points` must be odd and at least 3, got 4."),
        (("landscape", "--radius", 0), "landscape: `--radius` must be finite and positive, got 0.0."),
        (("landscape", "--examples", 0), "landscape: `--examples` must be at least 1, got 0."),
        (("landscape", "--chunk-size", 0), "landscape: `--chunk-size` must be at least 1, got 0."),
    ],
)
def test_bad_input_gets_one_line(wine, capsys, arguments, wanted):
    command, *rest = arguments
    assert run(command, wine, *rest) == cli.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert wanted in line


def test_a_run_that_is_not_there_or_of_one_optimizer(tmp_path, capsys):
    for command in ("measure", "landscape"):
        assert run(command, tmp_path / "none") == cli.BAD_INPUT
        assert "must be the --out folder of a finished comparison" in capsys.readouterr().err
    small = ("--data", "wine", "--network", "mlp-8", "--batch-size", 32, "--seeds", 1, "--epochs", 1, "--no-compile")
    assert run("compare", *small, "-o", "sgd", "--out", tmp_path / "one") == 0
    assert run("landscape", tmp_path / "one") == cli.BAD_INPUT
    assert "must be a comparison of two optimizers at least, got sgd alone." in capsys.readouterr().err


def test_of_few_examples_all_are_measured(wine):
    found = finished.load(wine)
    x, y = measuring.chosen(found.problem, 10**6)
    assert torch.equal(x, found.problem.data.x)
    assert torch.equal(y, found.problem.noisy)
