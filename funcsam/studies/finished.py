"""Finished comparisons, read back: what they trained on, and the models that they ended with."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from funcsam.studies import checkpoint, devices, problem, report
from funcsam.studies.errors import StudyError
from funcsam.studies.problem import Problem, Tensors
from funcsam.studies.settings import Settings
from funcsam.studies.training import Run


class Models(NamedTuple):
    """What one optimizer ended with, one entry per seed.

    Attributes:
        params: Stacked params.
        buffers: Stacked buffers.
    """

    params: Tensors
    buffers: Tensors


class Finished(NamedTuple):
    """A finished comparison.

    Attributes:
        settings: What it was made of.
        problem: Its data, labels and network, one member per seed.
        models: What each optimizer ended with, by the names of `results.json`; of a sweep the chosen value.
        results: The contents of `results.json`.
    """

    settings: Settings
    problem: Problem
    models: dict[str, Models]
    results: dict[str, Any]


def load(folder: Path, data_dir: Path | None = None, device: str | None = None) -> Finished:
    """Reads a comparison that `funcsam compare --out FOLDER` finished.

    Args:
        folder: Where it is.
        data_dir: Where its data are now, as for `--data-dir`.
        device: Where to put data and models; `None` takes that of the comparison.

    Raises:
        StudyError: If there is no finished comparison, or its files or its data are not what they were.
    """
    results = _results(folder)
    settings = _settings(folder, results)._replace(data_dir=data_dir)
    place = devices.named(device or settings.device, "finished")
    given, _, _, found = problem.make(settings, place)
    if found.copy != settings.copy:
        raise StudyError(
            f"finished: `--data-dir` must hold the copy of {settings.data} that {folder} was made with, "
            f"{settings.copy}, got {found.copy}."
        )
    models = {}
    for spec, name in zip(settings.optimizers, results["final"], strict=True):
        run = _run(folder, spec, settings)
        values = run.loss.shape[1] // settings.seeds
        best = report.best(run, values) if values > 1 else 0
        own = run.of(slice(best * settings.seeds, (best + 1) * settings.seeds))
        trees = ({key: leaf.to(place) for key, leaf in tree.items()} for tree in (own.params, own.buffers))
        models[name] = Models(*trees)
    return Finished(settings, given, models, results)


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        if any((folder / "checkpoints").glob("*.pt")):
            raise StudyError(
                f"finished: `{folder}` must be a finished comparison, got an unfinished one. "
                "Give its command again with --resume."
            )
        raise StudyError(
            f"finished: `{folder}` must be the --out folder of a finished comparison, got no results.json."
        )
    try:
        content = json.loads(path.read_text())
        if not isinstance(content["settings"], dict) or not isinstance(content["final"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise StudyError(f"finished: `{path}` must be what a comparison wrote, got a damaged file.") from None
    return dict(content)


def _settings(folder: Path, results: dict[str, Any]) -> Settings:
    said = results["settings"]
    try:
        return Settings(**{**said, "optimizers": tuple(said["optimizers"])})
    except (KeyError, TypeError):
        raise StudyError(
            f"finished: `{folder / 'results.json'}` must be of this funcsam, got settings that it does not know."
        ) from None


def _run(folder: Path, spec: str, settings: Settings) -> Run:
    path = checkpoint.path(folder, spec)
    if not path.is_file():
        raise StudyError(f"finished: `{path}` must be there, got none: the models of {spec} are lost.")
    content = checkpoint.load(path, {**settings.common(), "optimizer": spec})
    try:
        run = Run(**content["run"])
    except (KeyError, TypeError):
        raise StudyError(f"finished: `{path}` must hold the state of {spec}, got something else.") from None
    if run.epoch < settings.epochs:
        raise StudyError(
            f"finished: `{folder}` must be a finished comparison, got {spec} after {run.epoch} of {settings.epochs} "
            "epochs. Give its command again with --resume."
        )
    return run
