"""A finished comparison is read back as it ended, and nothing else is."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from funcsam import cli
from funcsam.studies import cifar10, finished, judging
from funcsam.studies.errors import StudyError

DATA = Path(__file__).parent / "data"
WINE = ("--data", "wine", "--network", "mlp-8", "--batch-size", "32", "--seeds", "2", "--epochs", "3", "--no-compile")
IMAGES = ("--data", "cifar10", "--data-dir", DATA, "--network", "wrn-10-1", "--batch-size", "20", "--no-compile")


def run(*arguments):
    assert cli.run(["compare", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "run"
    run(*IMAGES, "-o", "sgd", "-o", "sam", "--seeds", 2, "--epochs", 1, "--noise", 0.4, "--subset", 60, "--out", out)
    return out


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("swept") / "run"
    run(*WINE, "-o", "sgd", "-o", "sam", "--hyper-sweep", "rho=0.05,0.5,5", "--out", out)
    return out


def check(found, folder):
    """What is measured of the models is what the comparison measured of them."""
    results = json.loads((folder / "results.json").read_text())
    assert list(found.models) == list(results["final"])
    for name, models in found.models.items():
        loss, wrong, fit, _ = judging.measure(models.params, models.buffers, found.problem)
        final = results["final"][name]
        assert wrong.tolist() == pytest.approx(final["test_error"]["seeds"])
        assert fit.tolist() == pytest.approx(final["noisy_fit"]["seeds"])
        assert loss.tolist() == pytest.approx(results["epochs"][name]["train_loss"][-1], rel=1e-5) or results["sweeps"]
        sharp = judging.sharpness(models.params, models.buffers, found.problem)
        assert sharp.tolist() == pytest.approx(final["sharpness"]["seeds"], rel=1e-4)


def test_models_of_images_are_those_that_were_reported(images):
    found = finished.load(images, DATA)
    assert found.settings.network == "wrn-10-1"
    assert found.problem.data.x.shape == (60, 3, 32, 32)
    check(found, images)


def test_of_a_sweep_the_chosen_models_are_read(swept):
    found = finished.load(swept)
    assert found.settings.hyper_sweep == "rho=0.05,0.5,5"
    assert all(leaf.shape[0] == 2 for models in found.models.values() for leaf in models.params.values())
    check(found, swept)


def complaint(*arguments):
    with pytest.raises(StudyError) as error:
        finished.load(*arguments)
    (line,) = str(error.value).splitlines()
    return line


def test_a_wrong_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert complaint(folder) == (
            f"finished: `{folder}` must be the --out folder of a finished comparison, got no results.json."
        )


@pytest.fixture
def copied(swept, tmp_path):
    shutil.copytree(swept, tmp_path / "run")
    return tmp_path / "run"


def test_an_unfinished_comparison(copied):
    path = copied / "checkpoints" / "sgd.pt"
    content = torch.load(path, weights_only=True)
    content["run"]["epoch"] = 2
    torch.save(content, path)
    again = "Give its command again with --resume."
    assert (
        complaint(copied) == f"finished: `{copied}` must be a finished comparison, got sgd after 2 of 3 epochs. {again}"
    )
    (copied / "results.json").unlink()
    assert complaint(copied) == f"finished: `{copied}` must be a finished comparison, got an unfinished one. {again}"


def test_a_lost_checkpoint(copied):
    path = copied / "checkpoints" / "sam.pt"
    path.unlink()
    assert complaint(copied) == f"finished: `{path}` must be there, got none: the models of sam are lost."


def test_damaged_files(copied):
    path = copied / "checkpoints" / "sgd.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert "must be a whole checkpoint, got a damaged file" in complaint(copied)
    content = torch.load(copied / "checkpoints" / "sam.pt", weights_only=True)
    content["settings"]["optimizer"], content["run"] = "sgd", {}
    torch.save(content, path)
    assert complaint(copied) == f"finished: `{path}` must hold the state of sgd, got something else."
    results = copied / "results.json"
    for bad in ("", "[]", "{}", '{"settings": 1, "final": 2}'):
        results.write_text(bad)
        assert complaint(copied) == f"finished: `{results}` must be what a comparison wrote, got a damaged file."
    for said in ({}, {"data": "wine", "optimizers": [], "colour": "red"}):
        results.write_text(json.dumps({"settings": said, "final": {}}))
        expected = f"finished: `{results}` must be of this funcsam, got settings that it does not know."
        assert complaint(copied) == expected


def test_another_copy_of_the_data(images, tmp_path):
    shutil.copytree(DATA / cifar10.FOLDER, tmp_path / cifar10.FOLDER)
    path = tmp_path / cifar10.FOLDER / "test_batch"
    content = path.read_bytes()
    path.write_bytes(content.replace(content[1000:1010], bytes(10), 1))
    ours, theirs = cifar10.load(DATA).copy, cifar10.load(tmp_path).copy
    assert complaint(images, tmp_path) == (
        f"finished: `--data-dir` must hold the copy of cifar10 that {images} was made with, {ours}, got {theirs}."
    )


def test_another_device_that_does_not_exist(swept):
    assert "`--device` must be one that torch finds here, e.g. cpu, got abacus." in complaint(swept, None, "abacus")
