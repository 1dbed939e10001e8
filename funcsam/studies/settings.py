"""What a comparison is made of, and what it is made of where nothing is said."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from funcsam.studies import augment, data
from funcsam.studies.errors import StudyError


class Settings(NamedTuple):
    """What a comparison is made of; see `funcsam compare --help`.

    `copy` says which copy of the data was read, once it was.
    """

    data: str
    noise: float
    network: str
    optimizers: tuple[str, ...]
    seeds: int
    epochs: int
    batch_size: int
    lr: float
    schedule: str
    device: str
    compile: bool
    hyper_sweep: str | None = None
    noise_kind: str = "symmetric"
    augment: str = "none"
    label_smoothing: float = 0.0
    weight_decay: float = 0.0
    subset: int | None = None
    test_subset: int | None = None
    copy: str | None = None
    data_dir: Path | None = None

    def common(self) -> dict[str, Any]:
        """Returns what must not change between a run and its continuation, as plain values.

        The folder of the data may change, but not the data in it.
        """
        return {name: value for name, value in self._asdict().items() if name not in ("optimizers", "data_dir")}

    def title(self) -> str:
        """Returns the comparison in one line."""
        parts = ((self.subset, "training examples"), (self.test_subset, "test examples"))
        sizes = ", ".join(f"{size:,} {what}" for size, what in parts if size)
        subset = f" ({sizes})" if sizes else ""
        augmented = f", {self.augment.replace(',', ' + ')}" if self.augment != "none" else ""
        sweep = f", {self.hyper_sweep.partition('=')[0]} chosen on held-out noisy labels" if self.hyper_sweep else ""
        length = f"{self.epochs} epochs, {self.seeds} seed{'s' * (self.seeds > 1)}"
        return f"{self.data}{subset}, {self._labels()}, {self.network}{augmented}, {length}{sweep}"

    def _labels(self) -> str:
        if not self.noise:
            return "clean labels"
        kind = "random" if self.noise_kind == "symmetric" else "subject to asymmetric noise"
        return f"{100 * self.noise:g} % of the training labels {kind}"


_RADII = ("sgd", "sam:rho=0.5", "asam:rho=2.0")
_SMALL: dict[str, Any] = {
    "noise": 0.4,
    "network": "mlp",
    "optimizers": _RADII,
    "seeds": 8,
    "epochs": 100,
    "batch_size": 64,
    "lr": 0.1,
    "schedule": "cosine",
    "augment": "none",
    "label_smoothing": 0.0,
    "weight_decay": 0.0,
}
_WIDE_RESNET: dict[str, Any] = {
    "noise": 0.0,
    "network": "wrn-16-8",
    "optimizers": ("sgd", "sam:rho=0.05", "asam:rho=2.0"),
    "seeds": 3,
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "schedule": "step_decay",
    "augment": "standard",
    "label_smoothing": 0.1,
    "weight_decay": 5e-4,
}
_SWEPT = ("sgd", "sam", "asam")


def resolve(name: str, **given: Any) -> Settings:
    """Fills in what was not said: for CIFAR-10 the usual recipe of a Wide ResNet, for small data that of the README.

    Args:
        name: The dataset.
        **given: Fields of `Settings`; `None`, or no optimizers, where nothing was said.

    Raises:
        StudyError: If a value is out of range.

    References:
        Zagoruyko and Komodakis, 2016, section 3; Foret et al., 2021, section 3.1; Kwon et al., 2021, section 5.
    """
    usual = dict(_WIDE_RESNET if name == "cifar10" else _SMALL)
    if given.get("hyper_sweep"):
        usual["optimizers"] = _SWEPT
    said = {key: value for key, value in given.items() if value is not None and value != ()}
    settings = Settings(name, **{**usual, **said})
    names = augment.parse(settings.augment)
    return _checked(settings._replace(augment=",".join(names) or "none"))


def _checked(settings: Settings) -> Settings:
    for name in ("seeds", "epochs", "batch_size", "subset", "test_subset"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise StudyError(f"compare: `--{name.replace('_', '-')}` must be at least 1, got {value}.")
    if not 0 <= settings.noise <= 1:
        raise StudyError(f"compare: `--noise` must be in [0, 1], got {settings.noise}.")
    if settings.noise_kind not in data.NOISE_KINDS:
        known = " or ".join(data.NOISE_KINDS)
        raise StudyError(f"compare: `--noise-kind` must be {known}, got {settings.noise_kind}.")
    for name in ("lr", "weight_decay"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise StudyError(
                f"compare: `--{name.replace('_', '-')}` must be finite and non-negative, got {getattr(settings, name)}."
            )
    if not 0 <= settings.label_smoothing < 1:
        raise StudyError(f"compare: `--label-smoothing` must be in [0, 1), got {settings.label_smoothing}.")
    if settings.augment != "none" and settings.data != "cifar10":
        raise StudyError(
            f"compare: `--augment` must be none where the data are not photographs, got {settings.augment}."
        )
    if settings.data_dir is not None and settings.data != "cifar10":
        raise StudyError(f"compare: `--data-dir` must be left out for {settings.data}, which scikit-learn ships.")
    twice = [name for k, name in enumerate(settings.optimizers) if name in settings.optimizers[:k]]
    if twice:
        raise StudyError(f"compare: every `--optimizer` must be given once, got {twice[0]} twice.")
    return settings
