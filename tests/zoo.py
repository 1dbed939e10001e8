"""The registry: at least one entry for each exported factory, with what it claims.

A law runs on every entry that claims it. Claims are positive: nothing is exempt from a law by name.
"""

import functools
from collections.abc import Callable
from enum import Flag, auto
from typing import Any, NamedTuple

import optree
import pytest
import torch

import funcsam as fs
from funcsam.core import tree


class Claim(Flag):
    """What an entry says about itself."""

    NONE = 0
    LINEAR = auto()  # the updates are linear in the gradients so far
    TRANSLATIONS = auto()  # updates do not depend on the origin of the params
    ROTATIONS = auto()  # nor, beyond turning with them, on their axes
    PERMUTATIONS = auto()  # the same for signed permutations of all entries
    RELABELLING = auto()  # nor on the names and the nesting of leaves
    SCALES = auto()  # an elementwise rescaling of the params that keeps the function keeps the step
    SPHERE = auto()  # climbs by `rho T^2 g / ||T g||`; `size` is `T`
    IDENTITY_AT_ZERO_RHO = auto()  # is `base` if `rho` is zero
    FIXED_POINT = auto()  # a zero gradient gives a zero update at first
    AT_PARAMS = auto()  # the first gradient is asked for at the params


C = Claim
ISOTROPIC = C.TRANSLATIONS | C.ROTATIONS | C.PERMUTATIONS | C.RELABELLING
FAMILY = C.IDENTITY_AT_ZERO_RHO | C.FIXED_POINT


def _ones(params):
    return optree.tree_map(torch.ones_like, params)


class Entry(NamedTuple):
    """A transform, how to make it, and what it claims.

    Attributes:
        name: What a test is called by.
        exports: Exported factories that it covers.
        make: Makes the transform from its numbers.
        numbers: Hyperparameters and their values; each may be a number, a tensor of shape () or a schedule.
        claims: Laws that hold.
        evaluations: Gradients asked for at step 0, 1, ..., in plain code; nothing if that depends on the params.
        size: `T` as a function of the params.
        base: What is left if `rho` is zero.
        compiles: Whether `torch.compile` takes it as one graph.
    """

    name: str
    exports: tuple[Callable[..., fs.Transform], ...]
    make: Callable[..., fs.Transform]
    numbers: dict[str, float] = {}  # noqa: RUF012
    claims: Claim = C.NONE
    evaluations: tuple[int, ...] = (1, 1)
    size: Callable[[Any], Any] = _ones
    base: Callable[[], fs.Transform] = fs.identity
    compiles: bool = True

    def __call__(self, **numbers):
        """Makes the transform, with some of the numbers replaced."""
        return self.make(**{**self.numbers, **numbers})

    def __repr__(self):
        return self.name


def is_weight(path, leaf):
    """The mask of tests: leaves called `w`."""
    return path[-1:] == ("w",)


def _weights(params):
    return optree.tree_map_with_path(
        lambda path, leaf: leaf.abs() + 0.01 if is_weight(path, leaf) else torch.ones_like(leaf), params
    )


def _mean(grads, probe, step):
    return tree.scale(0.5, tree.add(grads, probe))


def _climb(rho):
    return fs.chain(fs.normalize(), fs.scale(rho))


def _even(step):
    return step % 2 == 0


def _update_batched(tx, params, grads_fn, state, *batch):
    return tx.update(params, lambda params, *examples: grads_fn(params), state, torch.arange(4.0), *batch)


def _batched(tx):
    """The transform on a batch of four examples that a problem, whose loss has none, does not look at."""
    return fs.Transform(tx.init, functools.partial(_update_batched, tx))


class _Scalable:
    """Any grads_fn, made to look like one of `grad_and_value`, whose loss can be scaled."""

    def __init__(self, grads_fn, factor=1):
        self.grads_fn, self.factor = grads_fn, factor

    def scaled(self, factor):
        return _Scalable(self.grads_fn, factor)

    def __call__(self, params, *batch):
        grads, aux = self.grads_fn(params, *batch)
        return tree.scale(self.factor, grads), aux


def _update_scalable(tx, params, grads_fn, state, *batch):
    return tx.update(params, _Scalable(grads_fn), state, *batch)


def _scalable(tx):
    return fs.Transform(tx.init, functools.partial(_update_scalable, tx))


def _label(path, leaf):
    return "weights" if is_weight(path, leaf) else "others"


def _groups(rho, lr):
    return fs.partition(_label, {"weights": fs.chain(fs.sam(rho), fs.sgd(lr, momentum=0.5)), "others": fs.sgd(0.2)})


def _nothing(params):
    return ()


def _halve(grads, state, params):
    return tree.scale(0.5, grads), state


ZOO = [
    Entry("identity", (fs.identity,), fs.identity, claims=C.AT_PARAMS | C.LINEAR | C.FIXED_POINT | ISOTROPIC),
    Entry(
        "lift",
        (fs.lift,),
        lambda: fs.lift(_nothing, _halve, ()),
        claims=C.AT_PARAMS | C.LINEAR | C.FIXED_POINT | ISOTROPIC,
    ),
    Entry("scale", (fs.scale,), fs.scale, {"factor": -0.7}, C.AT_PARAMS | C.LINEAR | C.FIXED_POINT | ISOTROPIC),
    Entry(
        "scale_by_learning_rate",
        (fs.scale_by_learning_rate,),
        fs.scale_by_learning_rate,
        {"lr": 0.1},
        C.AT_PARAMS | C.LINEAR | C.FIXED_POINT | ISOTROPIC,
    ),
    Entry("normalize", (fs.normalize,), fs.normalize, claims=C.AT_PARAMS | C.FIXED_POINT | ISOTROPIC),
    Entry(
        "scale_by_magnitude",
        (fs.scale_by_magnitude,),
        fs.scale_by_magnitude,
        {"eta": 0.1},
        C.AT_PARAMS | C.LINEAR | C.FIXED_POINT | C.PERMUTATIONS | C.RELABELLING,
    ),
    Entry(
        "scale_by_magnitude(mask)",
        (fs.scale_by_magnitude,),
        lambda eta: fs.scale_by_magnitude(eta, is_weight),
        {"eta": 0.1},
        C.AT_PARAMS | C.LINEAR | C.FIXED_POINT,
    ),
    Entry(
        "clip_by_global_norm",
        (fs.clip_by_global_norm,),
        fs.clip_by_global_norm,
        {"max_norm": 1.3},
        C.AT_PARAMS | C.FIXED_POINT | ISOTROPIC,
    ),
    Entry(
        "add_decayed_weights",
        (fs.add_decayed_weights,),
        fs.add_decayed_weights,
        {"weight_decay": 0.3},
        C.AT_PARAMS | C.ROTATIONS | C.PERMUTATIONS | C.RELABELLING,
    ),
    Entry(
        "add_decayed_weights(mask)",
        (fs.add_decayed_weights,),
        lambda weight_decay: fs.add_decayed_weights(weight_decay, is_weight),
        {"weight_decay": 0.3},
        C.AT_PARAMS,
    ),
    Entry("trace", (fs.trace,), fs.trace, {"decay": 0.6}, C.AT_PARAMS | C.LINEAR | C.FIXED_POINT | ISOTROPIC),
    Entry(
        "trace(nesterov)",
        (fs.trace,),
        lambda decay: fs.trace(decay, nesterov=True),
        {"decay": 0.6},
        C.AT_PARAMS | C.LINEAR | C.FIXED_POINT | ISOTROPIC,
    ),
    Entry(
        "trace(dampening)",
        (fs.trace,),
        fs.trace,
        {"decay": 0.6, "dampening": 0.2},
        C.AT_PARAMS | C.LINEAR | C.FIXED_POINT | ISOTROPIC,
    ),
    Entry(
        "scale_by_adam",
        (fs.scale_by_adam,),
        fs.scale_by_adam,
        {"b1": 0.8, "b2": 0.9, "eps": 0.01},
        C.AT_PARAMS | C.FIXED_POINT | C.TRANSLATIONS | C.PERMUTATIONS | C.RELABELLING,
    ),
    Entry(
        "scale_by_adam(amsgrad)",
        (fs.scale_by_adam,),
        lambda b1, b2, eps: fs.scale_by_adam(b1, b2, eps, amsgrad=True),
        {"b1": 0.8, "b2": 0.9, "eps": 0.01},
        C.AT_PARAMS | C.FIXED_POINT | C.TRANSLATIONS | C.PERMUTATIONS | C.RELABELLING,
    ),
    Entry(
        "sgd",
        (fs.sgd,),
        lambda lr, momentum: fs.sgd(lr, momentum, nesterov=True),
        {"lr": 0.1, "momentum": 0.5},
        C.AT_PARAMS | C.LINEAR | C.FIXED_POINT | ISOTROPIC,
    ),
    Entry(
        "adam",
        (fs.adam,),
        lambda lr, b1, b2, eps, weight_decay: fs.adam(lr, (b1, b2), eps, weight_decay),
        {"lr": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "weight_decay": 0.1},
        C.AT_PARAMS | C.PERMUTATIONS | C.RELABELLING,
    ),
    Entry(
        "adamw",
        (fs.adamw,),
        lambda lr, b1, b2, eps, weight_decay: fs.adamw(lr, (b1, b2), eps, weight_decay, mask=is_weight),
        {"lr": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "weight_decay": 0.1},
        C.AT_PARAMS,
    ),
    Entry("sam", (fs.sam,), fs.sam, {"rho": 0.25}, C.AT_PARAMS | C.SPHERE | FAMILY | ISOTROPIC, (2, 2)),
    Entry(
        "asam",
        (fs.asam,),
        fs.asam,
        {"rho": 0.25},
        C.AT_PARAMS | C.SPHERE | C.SCALES | FAMILY | C.PERMUTATIONS | C.RELABELLING,
        (2, 2),
        lambda params: optree.tree_map(torch.abs, params),
    ),
    Entry(
        "asam(authors)",
        (fs.asam,),
        lambda rho, eta: fs.asam(rho, eta, is_weight),
        {"rho": 0.25, "eta": 0.01},
        C.AT_PARAMS | C.SPHERE | FAMILY,
        (2, 2),
        _weights,
    ),
    Entry(
        "sharpness_aware(combine)",
        (fs.sharpness_aware,),
        lambda rho: fs.sharpness_aware(_climb(rho), combine=_mean),
        {"rho": 0.25},
        C.AT_PARAMS | C.SPHERE | FAMILY | ISOTROPIC,
        (2, 2),
    ),
    Entry(
        "sharpness_aware(when)",
        (fs.sharpness_aware,),
        lambda rho: fs.sharpness_aware(_climb(rho), when=_even),
        {"rho": 0.25},
        C.AT_PARAMS | C.SPHERE | FAMILY | ISOTROPIC,
        (2, 1),
    ),
    Entry(
        "sharpness_aware(steps)",
        (fs.sharpness_aware,),
        lambda rho: fs.sharpness_aware(_climb(rho), steps=2),
        {"rho": 0.25},
        C.AT_PARAMS | FAMILY | ISOTROPIC,
        (3, 3),
    ),
    Entry(
        "gsam",
        (fs.gsam,),
        fs.gsam,
        {"rho": 0.25, "alpha": 0.4},
        C.AT_PARAMS | C.SPHERE | FAMILY | ISOTROPIC,
        (2, 2),
    ),
    Entry(
        "looksam",
        (fs.looksam,),
        lambda rho, alpha: fs.looksam(rho, alpha, k=2),
        {"rho": 0.25, "alpha": 0.7},
        C.AT_PARAMS | C.SPHERE | FAMILY | ISOTROPIC,
        (2, 1, 2),
    ),
    Entry(
        "msam",
        (fs.msam,),
        fs.msam,
        {"rho": 0.25, "momentum": 0.6},
        FAMILY | ISOTROPIC,
        base=lambda: fs.trace(0.6),
    ),
    Entry(
        "chain(sam, sgd)",
        (fs.chain,),
        lambda rho, lr: fs.chain(fs.sam(rho), fs.sgd(lr, momentum=0.5)),
        {"rho": 0.25, "lr": 0.1},
        C.AT_PARAMS | C.SPHERE | FAMILY | ISOTROPIC,
        (2, 2),
        base=lambda: fs.sgd(0.1, momentum=0.5),
    ),
    Entry(
        "chain(asam, decay, adam)",
        (fs.chain,),
        lambda rho, lr: fs.chain(fs.asam(rho), fs.adam(lr, eps=0.01, weight_decay=0.1)),
        {"rho": 0.25, "lr": 0.1},
        C.AT_PARAMS | C.SPHERE | C.IDENTITY_AT_ZERO_RHO | C.PERMUTATIONS | C.RELABELLING,
        (2, 2),
        lambda params: optree.tree_map(torch.abs, params),
        lambda: fs.adam(0.1, eps=0.01, weight_decay=0.1),
    ),
    Entry(
        "chain(decay, clip, sam, trace)",
        (fs.chain,),
        lambda rho, max_norm: fs.chain(
            fs.add_decayed_weights(0.1), fs.clip_by_global_norm(max_norm), fs.sam(rho), fs.trace(0.5)
        ),
        {"rho": 0.25, "max_norm": 1.3},
        C.AT_PARAMS | C.IDENTITY_AT_ZERO_RHO | C.ROTATIONS | C.PERMUTATIONS | C.RELABELLING,
        (2, 2),
        base=lambda: fs.chain(fs.add_decayed_weights(0.1), fs.clip_by_global_norm(1.3), fs.trace(0.5)),
    ),
    Entry(
        "freeze",
        (fs.freeze,),
        lambda: fs.freeze(is_weight),
        claims=C.AT_PARAMS | C.LINEAR | C.FIXED_POINT,
    ),
    Entry(
        "masked",
        (fs.masked,),
        lambda factor: fs.masked(fs.scale(factor), is_weight),
        {"factor": -0.7},
        C.AT_PARAMS | C.LINEAR | C.FIXED_POINT,
    ),
    Entry(
        "partition",
        (fs.partition,),
        _groups,
        {"rho": 0.25, "lr": 0.1},
        C.AT_PARAMS | FAMILY,
        (),
        base=lambda: fs.partition(_label, {"weights": fs.sgd(0.1, momentum=0.5), "others": fs.sgd(0.2)}),
    ),
    Entry(
        "microbatch(loop)",
        (fs.microbatch,),
        lambda rho: _batched(fs.microbatch(fs.sam(rho), 3, chunk_size=1)),
        {"rho": 0.25},
        C.AT_PARAMS | FAMILY | ISOTROPIC,
        (6, 6),
    ),
    Entry(
        "microbatch(vmap)",
        (fs.microbatch,),
        lambda rho: _batched(fs.chain(fs.microbatch(fs.trace(0.5), 4), fs.sam(rho))),
        {"rho": 0.25},
        C.AT_PARAMS | ISOTROPIC,
        (2, 2),
    ),
    Entry(
        "ascent_batch",
        (fs.ascent_batch,),
        lambda rho: _batched(fs.sharpness_aware(fs.chain(fs.ascent_batch(0.3), _climb(rho)))),
        {"rho": 0.25},
        C.AT_PARAMS | C.SPHERE | FAMILY | ISOTROPIC,
        (2, 2),
    ),
    Entry(
        "common_randomness",
        (fs.common_randomness,),
        lambda rho: fs.chain(fs.common_randomness(), fs.sam(rho)),
        {"rho": 0.25},
        C.AT_PARAMS | C.SPHERE | FAMILY | ISOTROPIC,
        (2, 2),
        compiles=False,
    ),
    Entry(
        "dynamic_loss_scale",
        (fs.dynamic_loss_scale,),
        lambda rho, lr: _scalable(
            fs.dynamic_loss_scale(fs.chain(fs.sam(rho), fs.sgd(lr, momentum=0.5)), growth_interval=1)
        ),
        {"rho": 0.25, "lr": 0.1},
        C.AT_PARAMS | C.SPHERE | C.IDENTITY_AT_ZERO_RHO | C.FIXED_POINT | ISOTROPIC,
        (2, 2),
        base=lambda: fs.sgd(0.1, momentum=0.5),
    ),
    Entry(
        "apply_if_finite",
        (fs.apply_if_finite,),
        lambda rho, lr: fs.apply_if_finite(fs.chain(fs.sam(rho), fs.sgd(lr, momentum=0.5))),
        {"rho": 0.25, "lr": 0.1},
        C.AT_PARAMS | C.IDENTITY_AT_ZERO_RHO | C.FIXED_POINT | ISOTROPIC,
        (2, 2),
        base=lambda: fs.sgd(0.1, momentum=0.5),
    ),
]

each = pytest.mark.parametrize("entry", ZOO, ids=repr)


def claiming(claim):
    """Runs a law on every entry that claims it."""
    return pytest.mark.parametrize("entry", [entry for entry in ZOO if claim in entry.claims], ids=repr)


with_numbers = pytest.mark.parametrize("entry", [entry for entry in ZOO if entry.numbers], ids=repr)
