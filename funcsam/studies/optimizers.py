"""Optimizers by name: `sam:rho=0.5` is `chain(sam(rho=0.5), sgd(lr, momentum=0.9))`."""

import inspect
from collections.abc import Callable
from typing import Any

import funcsam as fs
from funcsam.studies.errors import StudyError

BASES: dict[str, Callable[..., fs.Transform]] = {"sgd": fs.sgd, "adam": fs.adam, "adamw": fs.adamw}
METHODS: dict[str, Callable[..., fs.Transform]] = {"sam": fs.sam, "asam": fs.asam}
SCHEDULES: dict[str, Callable[[float, int], Any]] = {
    "constant": lambda value, steps: fs.constant(value),
    "step_decay": fs.step_decay,
    "cosine": fs.cosine,
}
MOMENTUM = 0.9
"""Momentum of `sgd` where none is given."""


def _numbers(factory: Callable[..., fs.Transform]) -> dict[str, float | bool]:
    """Lists the hyperparameters of a factory that are one number or one switch, with their defaults."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, float | bool)}


def _value(where: str, name: str, text: str, default: float | bool) -> float | bool:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise StudyError(f"{where}: `{name}` must be true or false, got {text}.")
        return text == "true"
    try:
        return float(text)
    except ValueError:
        raise StudyError(f"{where}: `{name}` must be a number, got {text}.") from None


def _options(spec: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in text.split(",") if text else []:
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise StudyError(f"{spec}: an option must be written as name=value, got {part or 'nothing'}.")
        if name in options:
            raise StudyError(f"{spec}: `{name}` must be given once, got it twice.")
        options[name] = value
    return options


def parse(spec: str, lr: float, schedule: str, total_steps: int) -> fs.Transform:
    """Turns `name` or `name:option=value,option=value` into a chain.

    A sharpness-aware method takes its own options, `base` (sgd, adam or adamw; sgd if left out) and those of its base.
    `sgd` takes the learning rate `lr` and momentum 0.9 unless it says otherwise, adam and adamw their own defaults.

    Args:
        spec: E.g. `sgd:weight_decay=5e-4` or `sam:rho=0.05,base=adamw,lr=1e-3`.
        lr: Learning rate of the optimizers on `sgd`.
        schedule: What every learning rate follows: `constant`, `step_decay` or `cosine`.
        total_steps: Length of the run.

    Raises:
        StudyError: If a name is unknown or a value out of range.
    """
    name, _, text = spec.partition(":")
    if name not in BASES and name not in METHODS:
        known = ", ".join([*BASES, *METHODS])
        raise StudyError(f"compare: `--optimizer` must be one of {known}, got {name or 'nothing'}.")
    if schedule not in SCHEDULES:
        raise StudyError(f"compare: `--schedule` must be one of {', '.join(SCHEDULES)}, got {schedule}.")
    options = _options(spec, text)
    base = options.pop("base", "sgd") if name in METHODS else name
    if base not in BASES:
        raise StudyError(f"{spec}: `base` must be one of {', '.join(BASES)}, got {base}.")
    own, below = _numbers(METHODS[name]) if name in METHODS else {}, _numbers(BASES[base])
    for option in options:
        if option not in own and option not in below:
            known = ", ".join([*own, *(["base"] if own else []), *below])
            raise StudyError(f"{spec}: an option must be one of {known}, got {option}.")
    given = {option: _value(spec, option, text, (own | below)[option]) for option, text in options.items()}
    settings = {"lr": lr, "momentum": MOMENTUM} if base == "sgd" else {"lr": below["lr"]}
    settings |= {option: value for option, value in given.items() if option in below}
    try:
        rate = {"lr": SCHEDULES[schedule](settings.pop("lr"), total_steps)}
        optimizer = BASES[base](**settings, **rate)
        if name in METHODS:
            optimizer = fs.chain(METHODS[name](**{k: v for k, v in given.items() if k in own}), optimizer)
    except (TypeError, ValueError) as error:
        raise StudyError(str(error)) from None
    return optimizer
