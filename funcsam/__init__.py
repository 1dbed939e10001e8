"""Sharpness-aware training as pure functions.

A transform acts on gradient functions, a chain is their composition, and the place of a transform in the chain is its
meaning:

    tx = fs.chain(fs.sam(rho=0.05), fs.sgd(lr=0.1, momentum=0.9))
    grads_fn = fs.grad_and_value(loss_fn)
    state = tx.init(params)
    params, state, loss = tx.step(params, grads_fn, state, *batch)
"""

from funcsam import distributed, ensemble, landscape, measures, nn, torch_optim
from funcsam.core import tree
from funcsam.core.evaluations import either, given
from funcsam.core.gradients import grad_and_value
from funcsam.core.schedules import constant, cosine, step_decay, warmup_cosine
from funcsam.core.transform import Transform, apply_updates, chain, identity, lift
from funcsam.family.gsam import gsam
from funcsam.family.looksam import LookSAMState, looksam
from funcsam.family.msam import msam
from funcsam.family.sam import asam, sam, sam_update
from funcsam.family.sharpness_aware import SharpnessAwareState, sharpness_aware
from funcsam.optimizers.adam import adam, adamw
from funcsam.optimizers.sgd import sgd
from funcsam.transforms.batches import ascent_batch, microbatch
from funcsam.transforms.decay import DecayState, add_decayed_weights
from funcsam.transforms.finite import ApplyIfFiniteState, apply_if_finite
from funcsam.transforms.groups import freeze, masked, partition
from funcsam.transforms.loss_scale import LossScaleState, dynamic_loss_scale
from funcsam.transforms.moments import AdamState, TraceState, scale_by_adam, trace
from funcsam.transforms.randomness import RandomnessState, common_randomness
from funcsam.transforms.scaling import (
    ScaleState,
    clip_by_global_norm,
    normalize,
    scale,
    scale_by_learning_rate,
    scale_by_magnitude,
)

__version__ = "0.1.0"

__all__ = [
    "AdamState",
    "ApplyIfFiniteState",
    "DecayState",
    "LookSAMState",
    "LossScaleState",
    "RandomnessState",
    "ScaleState",
    "SharpnessAwareState",
    "TraceState",
    "Transform",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_if_finite",
    "apply_updates",
    "asam",
    "ascent_batch",
    "chain",
    "clip_by_global_norm",
    "common_randomness",
    "constant",
    "cosine",
    "distributed",
    "dynamic_loss_scale",
    "either",
    "ensemble",
    "freeze",
    "given",
    "grad_and_value",
    "gsam",
    "identity",
    "landscape",
    "lift",
    "looksam",
    "masked",
    "measures",
    "microbatch",
    "msam",
    "nn",
    "normalize",
    "partition",
    "sam",
    "sam_update",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_magnitude",
    "sgd",
    "sharpness_aware",
    "step_decay",
    "torch_optim",
    "trace",
    "tree",
    "warmup_cosine",
]
