"""The same random numbers for every evaluation of a step."""

import contextlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from funcsam.core import checks, levels, tree
from funcsam.core.records import factory
from funcsam.core.states import kind_of, saveable
from funcsam.core.transform import Transform
from funcsam.core.types import Aux, P, PairedGradsFn, Params, State


@saveable
class RandomnessState(NamedTuple):
    """State of `common_randomness`.

    Attributes:
        step: Number of updates so far, int64 of shape ().
        generators: States that torch's global generators are set to before an evaluation, by device: uint8 on the CPU.
    """

    step: Tensor
    generators: dict[str, Tensor]


def _generator(device: str) -> tuple[ModuleType, tuple[str, ...]]:
    """Returns the module with `get_rng_state` and `set_rng_state` for a device, and the last argument of these."""
    kind = torch.device(device).type
    return (torch, ()) if kind == "cpu" else (torch.get_device_module(kind), (device,))


def _devices(params: Params) -> list[str]:
    devices = {str(leaf.device) for leaf in optree.tree_leaves(params)}
    return [] if "meta" in devices else sorted(devices | {"cpu"})


def _check_generators(generators: object, devices: list[str]) -> None:
    fits = False
    if isinstance(generators, dict) and generators.keys() == set(devices):
        shapes = {device: state.shape for device, state in _read(devices).items()}
        fits = all(
            isinstance(x, Tensor) and x.dtype is torch.uint8 and x.shape == shapes[d] for d, x in generators.items()
        )
    if not fits:
        got = f"a dict of {sorted(map(str, generators))}" if isinstance(generators, dict) else kind_of(generators)
        raise ValueError(
            "common_randomness: `state` must be a RandomnessState whose `generators` are states of the generators of "
            f"{devices}, got {got}. Make it with `init`."
        )


def _read(devices: Iterable[str]) -> dict[str, Tensor]:
    found = {}
    for device in devices:
        module, where = _generator(device)
        found[device] = module.get_rng_state(*where)
    return found


def _write(generators: dict[str, Tensor]) -> None:
    for device, state in generators.items():
        module, where = _generator(device)
        module.set_rng_state(levels.first_unwrapped(state.cpu()), *where)


@contextlib.contextmanager
def _global_generators_at(generators: dict[str, Tensor]) -> Iterator[None]:
    """Sets the states of the global generators inside, and restores them afterwards."""
    before = _read(generators)
    try:
        _write(generators)
        yield
    finally:
        _write(before)


@factory
def common_randomness(seed: int = 0) -> Transform:
    """Draws the same random numbers in every evaluation of a step: one set of dropout masks for `w` and `w + e`.

    `chain(common_randomness(seed), sam(rho), ...)`. The state of torch's global generators (of the CPU and of the
    devices of the params) is part of the state of the transform: the next step draws other numbers, a resumed run draws
    the numbers of a run without a break, and the generators of the caller do not change. Without this transform each
    evaluation draws other numbers.

    Under `vmap` the members share one generator; the argument `randomness` of `vmap` says whether they draw the same
    numbers. Compiled code has its own generator, so this works in eager code only.

    Args:
        seed: Seed of the generators, a whole number.

    Raises:
        TypeError: If `seed` is not a whole number.
        RuntimeError: On a step, if it is compiled.

    References:
        Foret et al., 2021: their code evaluates both gradients with one dropout key.
    """
    checks.integer("common_randomness", seed=seed)

    def init(params: Params) -> RandomnessState:
        states = {device: torch.Generator(device).manual_seed(seed).get_state() for device in _devices(params)}
        return RandomnessState(tree.counter(params), states)

    def update(params: P, grads_fn: PairedGradsFn, state: RandomnessState, *batch: object) -> tuple[P, State, Aux]:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "common_randomness: must run eagerly, got a call that is being compiled. "
                "Leave it out of compiled steps: there evaluations draw independently."
            )
        _check_generators(state.generators, _devices(params))
        with _global_generators_at(state.generators):
            grads, aux = grads_fn(params, *batch)
            after = _read(state.generators)
        return grads, RandomnessState(state.step + 1, after), aux

    return Transform(init, update, RandomnessState)
