"""Optimizers by name: `sam:rho=0.5` is `chain(sam(rho=0.5), sgd(lr, momentum=0.9))`."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import funcsam as fs
from funcsam.studies.errors import StudyError

BASES: dict[str, Callable[..., fs.Transform]] = {"sgd": fs.sgd, "adam": fs.adam, "adamw": fs.adamw}
METHODS: dict[str, Callable[..., fs.Transform]] = {"sam": fs.sam, "asam": fs.asam}
SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "constant": lambda value, steps: fs.constant(value),
    "step_decay": fs.step_decay,
    "cosine": fs.cosine,
}
MOMENTUM = 0.9
"""Momentum of `sgd` where none is given."""


class Maker(NamedTuple):
    """How a chain is made.

    Attributes:
        make: Takes the swept option by its name, or nothing.
        sweeps: The option that is swept, if this optimizer has it.
    """

    make: Callable[..., fs.Transform]
    sweeps: str | None


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


def parse(
    spec: str, lr: float, schedule: str, total_steps: int, sweep: str | None = None, weight_decay: float = 0.0
) -> Maker:
    """Turns `name` or `name:option=value,option=value` into a function that makes the chain.

    A sharpness-aware method takes its own options, `base` (sgd, adam or adamw; sgd if left out) and those of its base.
    `sgd` takes the learning rate `lr`, momentum 0.9 and `weight_decay` unless it says otherwise, adam and adamw their
    own defaults.

    Args:
        spec: E.g. `sgd:weight_decay=5e-4` or `sam:rho=0.05,base=adamw,lr=1e-3`.
        lr: Learning rate of the optimizers on `sgd`.
        schedule: What every learning rate follows: `constant`, `step_decay` or `cosine`.
        total_steps: Length of the run.
        sweep: An option that is swept.
        weight_decay: Weight decay of the optimizers on `sgd`, outside the ascent.

    Returns:
        A function of the swept option, if the optimizer has it and the spec does not give it; of nothing otherwise.

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
    options_known = own | below
    for option in options:
        if option not in options_known:
            names = ", ".join([*own, *(["base"] if own else []), *below])
            raise StudyError(f"{spec}: an option must be one of {names}, got {option}.")
    given = {option: _value(spec, option, text, options_known[option]) for option, text in options.items()}
    usual = {"lr": lr, "momentum": MOMENTUM, "weight_decay": weight_decay}
    defaults = usual if base == "sgd" else {"lr": below["lr"]}

    def make(**swept: Any) -> fs.Transform:
        chosen = defaults | given | swept
        try:
            rate = SCHEDULES[schedule](chosen["lr"], total_steps)
            optimizer = BASES[base](**{k: v for k, v in chosen.items() if k in below} | {"lr": rate})
            if name in METHODS:
                optimizer = fs.chain(METHODS[name](**{k: v for k, v in chosen.items() if k in own}), optimizer)
        except (TypeError, ValueError) as error:
            raise StudyError(str(error)) from None
        return optimizer

    make()
    has = sweep is not None and sweep not in given and isinstance(options_known.get(sweep), float)
    return Maker(make, sweep if has else None)


def sweep(text: str) -> tuple[str, tuple[float, ...]]:
    """Reads `name=value,value,...`.

    Raises:
        StudyError: If it is not written so.
    """
    name, equals, values = text.partition("=")
    try:
        numbers = tuple(float(value) for value in values.split(","))
    except ValueError:
        numbers = ()
    if not (name and equals and len(numbers) > 1):
        raise StudyError(
            "compare: `--hyper-sweep` must be written as name=value,value with two values at least, "
            f"got {text or 'nothing'}."
        )
    if len(set(numbers)) < len(numbers):
        raise StudyError(f"compare: every value of `--hyper-sweep` must be given once, got {values}.")
    return name, numbers


def with_option(spec: str, name: str, value: float) -> str:
    """Returns a spec with one more option.

    >>> with_option("sam:base=adamw", "rho", 0.5), with_option("sam", "rho", 0.5)
    ('sam:base=adamw,rho=0.5', 'sam:rho=0.5')
    """
    return f"{spec}{',' if ':' in spec else ':'}{name}={value:g}"
