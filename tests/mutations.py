"""Tests the tests: breaks one formula at a time in a copy of the library, and prints what no test noticed.

`python tests/mutations.py [-j COPIES] [words of a mutation ...]`, from the root of the repository; about half an hour
on two cores. Exits with 1 if a mutation lives or cannot be tried.
"""

import argparse
import importlib
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 300
"""Seconds after which a mutation counts as noticed: it loops."""
PRELOADED = ("torch._dynamo.testing", "hypothesis.extra.numpy", "sklearn.model_selection", "matplotlib.figure", "typer")
"""What takes seconds to import, and is imported once for all."""
OPTIONS = ("-x", "-q", "--no-header", "--tb=line", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:nbmake")
OPTIONS += ("-m", "not compile and not parity", "-W", "ignore:Module already imported")
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ["HYPOTHESIS_PROFILE"] = "fast"
sys.dont_write_bytecode = True  # a file may change twice within the second that bytecode is dated by


class Mutation(NamedTuple):
    """One replacement of a text that occurs in a file.

    Attributes:
        name: What breaks.
        file: Where, inside the library.
        old: The text.
        new: What takes its place.
        tests: The test files or tests one of which must notice, the quickest first. Of what takes seconds, the test.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def node(file: str, *names: str) -> tuple[str, ...]:
    """Names tests of a file, in whichever folder it is."""
    (path,) = (path for path in ROOT.glob(f"tests/**/test_{file}.py") if path.parent.name != "parity")
    return tuple(f"{path.relative_to(ROOT)}::test_{name}" for name in names)


def laws(file: str, *names: str) -> tuple[str, ...]:
    """Names laws."""
    return tuple(f"tests/laws/test_{file}.py::test_{name}" for name in names)


CLOSED, SCHEDULES = ("tests/core/test_closed_forms.py",), ("tests/core/test_schedules.py",)
MESSAGES, GRADIENTS = ("tests/core/test_messages.py",), ("tests/core/test_gradients.py",)
ORDERS, NUMERICS = ("tests/laws/test_order.py",), ("tests/laws/test_numerics.py",)
PARITY = ("tests/parity",)

MUTATIONS = [
    Mutation(
        "ascent goes down",
        "family/sam.py",
        "return chain(normalize(), scale(rho))",
        "return chain(normalize(), scale(rho), scale(-1))",
        CLOSED,
    ),
    Mutation(
        "asam multiplies by T once",
        "family/sam.py",
        "chain(magnitude, normalize(), magnitude, scale(rho))",
        "chain(magnitude, normalize(), scale(rho))",
        CLOSED,
    ),
    Mutation(
        "asam ignores its mask", "family/sam.py", "scale_by_magnitude(eta, mask)", "scale_by_magnitude(eta)", CLOSED
    ),
    Mutation(
        "asam ignores eta", "family/sam.py", "scale_by_magnitude(eta, mask)", "scale_by_magnitude(0.0, mask)", CLOSED
    ),
    Mutation(
        "sam_update is never adaptive",
        "family/sam.py",
        "asam(rho) if adaptive else",
        "sam(rho) if adaptive else",
        MESSAGES,
    ),
    Mutation(
        "combine gets its arguments the other way round",
        "family/sharpness_aware.py",
        "combine(grads, probe, state.step)",
        "combine(probe, grads, state.step)",
        laws("family", "combine"),
    ),
    Mutation(
        "when is read one step late",
        "family/sharpness_aware.py",
        "when(state.step)",
        "when(state.step + 1)",
        laws("family", "when"),
    ),
    Mutation(
        "when is inverted",
        "core/evaluations.py",
        "return yes() if pick else no()",
        "return no() if pick else yes()",
        laws("family", "when"),
    ),
    Mutation(
        "several ascents all start at the params",
        "family/sharpness_aware.py",
        "_shifted(grads_fn, offset), state",
        "grads_fn, state",
        laws("family", "several_ascents"),
    ),
    Mutation(
        "several ascents are not shortened",
        "family/sharpness_aware.py",
        "offset = tree.scale(1 / steps, offset)",
        "pass",
        laws("family", "several_ascents"),
    ),
    Mutation(
        "the step of sharpness_aware stands still",
        "family/sharpness_aware.py",
        "SharpnessAwareState(state.step + 1,",
        "SharpnessAwareState(state.step,",
        laws("family", "when"),
    ),
    Mutation(
        "the state of the ascent stands still",
        "family/sharpness_aware.py",
        "SharpnessAwareState(state.step + 1, ascent_state)",
        "SharpnessAwareState(state.step + 1, state.ascent)",
        laws("family", "a_schedule_is_read_at_0_1_2"),
    ),
    Mutation(
        "aux of the probe is kept",
        "family/sharpness_aware.py",
        "            probe, _ = grads_fn(point, *batch)",
        "            nonlocal aux\n            probe, aux = grads_fn(point, *batch)",
        laws("contract", "probes_leave_no_trace"),
    ),
    Mutation(
        "chain runs backwards",
        "core/transform.py",
        "zip(parts, state, strict=True)",
        "reversed(list(zip(parts, state, strict=True)))",
        ORDERS,
    ),
    Mutation("chain drops new states", "core/transform.py", "((*states, new), aux)", "((*states, state), aux)", ORDERS),
    Mutation(
        "norm per leaf",
        "transforms/scaling.py",
        "return tree.unit(grads), state",
        "return tree.map(tree.unit, grads), state",
        CLOSED,
    ),
    Mutation(
        "normalize adds 1e-6",
        "core/tree.py",
        "scale(reciprocal(norm(x)), x)",
        "scale(1 / (norm(x) + 1e-6), x)",
        laws("family", "normalize"),
    ),
    Mutation(
        "sign of lr",
        "transforms/scaling.py",
        "rate = -rate if",
        "rate = rate if",
        CLOSED,
    ),
    Mutation(
        "lr is read one step late",
        "transforms/scaling.py",
        "schedules.at(lr, state.step)",
        "schedules.at(lr, state.step + 1)",
        laws("family", "a_schedule_is_read_at_0_1_2"),
    ),
    Mutation(
        "factor is read one step late",
        "transforms/scaling.py",
        "schedules.at(factor, state.step)",
        "schedules.at(factor, state.step + 1)",
        laws("family", "a_schedule_is_read_at_0_1_2"),
    ),
    Mutation(
        "clip scales always",
        "transforms/scaling.py",
        "torch.where(norm > bound, bound * tree.reciprocal(norm), 1.0)",
        "bound * tree.reciprocal(norm)",
        laws("family", "clipping"),
    ),
    Mutation(
        "clip never scales",
        "transforms/scaling.py",
        "norm > bound, bound",
        "norm > 1e9 * bound, bound",
        laws("family", "clipping"),
    ),
    Mutation("eta is not added", "core/tree.py", "a * (b.abs() + kernels.on(shift, b))", "a * b.abs()", CLOSED),
    Mutation("eta is not added by the fast kernel", "core/tree.py", "if eta:", "if False:", CLOSED),
    Mutation("masks are inverted", "core/masks.py", "return [what(path, leaf)", "return [not what(path, leaf)", CLOSED),
    Mutation(
        "the norm is taken in half precision",
        "core/tree.py",
        "dtype=torch.float32 if x.dtype in kernels.HALF else None",
        "dtype=None",
        NUMERICS,
    ),
    Mutation(
        "1 / 0 is infinite",
        "core/tree.py",
        "torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, x))",
        "(1 / x)",
        laws("family", "derivative_at_a_zero_gradient_is_finite"),
    ),
    Mutation("1 / inf is zero", "core/tree.py", "+ (x - x)", "", laws("family", "bad_gradients_reach_the_ascent")),
    Mutation(
        "the derivative of the root at zero is infinite",
        "core/tree.py",
        "return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, x)))",
        "return torch.sqrt(x)",
        laws("family", "derivative_at_a_zero_gradient_is_finite"),
    ),
    Mutation(
        "nesterov is ignored",
        "transforms/moments.py",
        "tree.add_scaled(grads, factor, total) if nesterov else total",
        "total",
        PARITY,
    ),
    Mutation(
        "dampening on the first step",
        "transforms/moments.py",
        "tree.where(state.step == 0, grads, tree.scale(keep, grads))",
        "tree.scale(keep, grads)",
        PARITY,
    ),
    Mutation(
        "momentum is read one step late",
        "transforms/moments.py",
        "schedules.at(decay, state.step)",
        "schedules.at(decay, state.step + 1)",
        laws("family", "a_schedule_is_read_at_0_1_2"),
    ),
    Mutation("no bias correction", "transforms/moments.py", "tree.scale(1 / (1 - decay**count), m)", "m", PARITY),
    Mutation(
        "bias correction is one step late",
        "transforms/moments.py",
        "count = (state.step + 1)",
        "count = (state.step + 2)",
        PARITY,
    ),
    Mutation(
        "eps under the root",
        "transforms/moments.py",
        "tree.divide(tree.scale(1 / (1 - decay**count), m), tree.shift(root, floor))",
        "tree.divide(tree.scale(1 / (1 - decay**count), m), tree.sqrt(tree.shift(tree.multiply(root, root), floor)))",
        PARITY,
    ),
    Mutation(
        "amsgrad forgets",
        "transforms/moments.py",
        "tree.maximum(tree.real_views(state.largest), v) if amsgrad",
        "v if amsgrad",
        PARITY,
    ),
    Mutation(
        "complex leaves are not pairs of reals",
        "transforms/moments.py",
        "g, m, v = (tree.real_views(each) for each in",
        "g, m, v = (each for each in",
        NUMERICS,
    ),
    Mutation(
        "decay has the wrong sign",
        "transforms/decay.py",
        "tree.add_scaled(grads, factor, params, mask)",
        "tree.add_scaled(grads, -factor, params, mask)",
        ORDERS,
    ),
    Mutation(
        "decay ignores its mask",
        "transforms/decay.py",
        "factor, params, mask)",
        "factor, params)",
        node("closed_forms", "weights_decay_where_the_mask_says"),
    ),
    Mutation(
        "adam decays like adamw",
        "optimizers/adam.py",
        "return chain(*decay, scale_by_adam(*betas, eps, amsgrad=amsgrad), scale",
        "return chain(scale_by_adam(*betas, eps, amsgrad=amsgrad), *decay, scale",
        PARITY,
    ),
    Mutation(
        "every device has float64",
        "core/levels.py",
        '"meta") else torch.float32',
        '"meta") else torch.float64',
        ("tests/core/test_schedules.py",),
    ),
    Mutation(
        "sgd decays behind the momentum",
        "optimizers/sgd.py",
        "chain(*decay, *memory,",
        "chain(*memory, *decay,",
        PARITY,
    ),
    Mutation("a milestone is one step late", "core/schedules.py", ">= start", "> start", SCHEDULES),
    Mutation(
        "cosine goes on",
        "core/schedules.py",
        "torch.clamp(_real(step) / total_steps, max=1.0)",
        "_real(step) / total_steps",
        SCHEDULES,
    ),
    Mutation(
        "warmup starts at one",
        "core/schedules.py",
        "value * _real(step) / warmup_steps",
        "value * _real(step + 1) / warmup_steps",
        SCHEDULES,
    ),
    Mutation("aux keeps its graph", "core/gradients.py", "optree.tree_map(_detached, aux)", "aux", GRADIENTS),
    Mutation(
        "unused leaves have no gradient",
        "core/gradients.py",
        "torch.zeros_like(x) if g is None",
        "g if g is None",
        GRADIENTS,
    ),
]

NN, BATCHES = ("tests/nn/test_nn.py",), ("tests/laws/test_batches.py",)
GROUPS, ENSEMBLE = ("tests/laws/test_groups.py",), ("tests/ensemble/test_ensemble.py",)
SCALING, RANDOM = ("tests/transforms/test_loss_scale.py",), ("tests/transforms/test_randomness.py",)
HYPER = ("tests/core/test_hypergradients.py",)

MUTATIONS += [
    Mutation(
        "the buffers given are written to", "nn/copies.py", "return torch._lazy_clone(x)", "return x.detach()", NN
    ),
    Mutation(
        "what is written to in memory of NumPy goes there",
        "nn/copies.py",
        "buffers[name].clone() if copy",
        "buffers[name] if copy",
        NN,
    ),
    Mutation("what is not written is copied", "nn/copies.py", "return torch._lazy_clone(x)", "return x.clone()", NN),
    Mutation("a new shape does not come back", "nn/copies.py", "own), own.shape, own.stride())", "own),)", NN),
    Mutation("new storage does not come back", "nn/copies.py", "_C._data_address(own), own", "own", NN),
    Mutation(
        "spread buffers come back stacked",
        "nn/copies.py",
        "_with_lazy_mark(torch.where(always, buffer, buffer))",
        "torch.where(always, buffer, buffer)",
        ENSEMBLE,
    ),
    Mutation("replaced parts are not seen", "nn/loss.py", "if self._contents.changed():", "if False:", NN),
    Mutation("tensors that move between dicts are not seen", "nn/layout.py", "sizes == self.sizes and", "True and", NN),
    Mutation("tensors of another name are not seen", "nn/layout.py", "keys == self.keys and", "True and", NN),
    Mutation(
        "the cache of parametrisations is used",
        "nn/loss.py",
        "with levels.uncached() if parametrize._cache_enabled else _NOTHING:\n                yield",
        "with _NOTHING:\n                yield",
        NN,
    ),
    Mutation(
        "what is in neither tree is differentiated",
        "nn/loss.py",
        "first.store[first.key].detach() for",
        "first.store[first.key] for",
        NN,
    ),
    Mutation(
        "checkpointing around the loss is silently wrong", "nn/loss.py", "None if again else _TOO_LATE", "None", NN
    ),
    Mutation("checkpointing is differentiated twice", "nn/loss.py", "_TWICE if differentiated else ", "", NN),
    Mutation("hooks around the loss are refused", "nn/loss.py", "_disable(message, False)", "_disable(message)", NN),
    Mutation(
        "a shared base is stacked",
        "ensemble/step.py",
        "if axis is None and isinstance(leaf, Tensor)",
        "if False",
        ENSEMBLE,
    ),
    Mutation(
        "what one member does not write is shared",
        "ensemble/step.py",
        "shared.get(next(iter(each))) if len(each) == 1 else None",
        "next((shared[address] for address in each if address in shared), None)",
        ENSEMBLE,
    ),
    Mutation(
        "dataclasses keep the tensors of one chunk",
        "ensemble/outputs.py",
        "object.__setattr__(new, name, value)",
        "pass",
        ENSEMBLE,
    ),
    Mutation(
        "checkpointing writes to the buffers twice",
        "nn/loss.py",
        "            if again and after:\n",
        "            if False:\n",
        NN,
    ),
    Mutation(
        "checkpointing runs again with the module's own tensors",
        "nn/loss.py",
        "                yield evaluate\n        finally:",
        "                yield self\n        finally:",
        NN,
    ),
    Mutation(
        "tied tensors are replaced in one place",
        "nn/loss.py",
        "in layout.places[name]:\n",
        "in layout.places[name][:1]:\n",
        NN,
    ),
    Mutation(
        "the tensors of the module do not come back",
        "nn/loss.py",
        "place.store[place.key] = value\n\n    def _current_layout",
        "pass\n\n    def _current_layout",
        NN,
    ),
    Mutation("buffers come out as they went in", "nn/loss.py", "return answer, buffers\n", "return answer, {}\n", NN),
    Mutation(
        "frozen parameters are trained",
        "nn/modules.py",
        "named_parameters() if p.requires_grad}",
        "named_parameters()}",
        NN,
    ),
    Mutation(
        "predictions are made in training mode", "nn/loss.py", "module.training = False", "module.training = True", NN
    ),
    Mutation(
        "shared buffers stay shared under vmap",
        "nn/copies.py",
        "torch.where(always, buffer, buffer)",
        "buffer.clone()",
        BATCHES,
    ),
    Mutation(
        "batch normalisation is differentiated through vmap",
        "nn/loss.py",
        "if not eager and levels.differentiates_vmap(params.values()) else",
        "if False else",
        HYPER,
    ),
    Mutation(
        "slices count alike, whatever their size",
        "transforms/batches.py",
        "count * size / whole.size",
        "count / m",
        BATCHES,
    ),
    Mutation("slices are summed", "transforms/batches.py", "x.mean(0) if", "x.sum(0) if", BATCHES),
    Mutation(
        "the first slice is seen twice", "transforms/batches.py", "            start += now * each\n", "", BATCHES
    ),
    Mutation(
        "examples that are left over are dropped",
        "transforms/batches.py",
        "((longer, size + 1), (m - longer, size))",
        "((m, size),)",
        BATCHES,
    ),
    Mutation(
        "all slices draw the same", "transforms/batches.py", 'randomness="different"', 'randomness="same"', BATCHES
    ),
    Mutation(
        "the ascent sees the whole batch",
        "transforms/batches.py",
        "math.ceil(fraction * whole.size)",
        "whole.size",
        BATCHES,
    ),
    Mutation(
        "the part is rounded down",
        "transforms/batches.py",
        "math.ceil(fraction * whole.size)",
        "int(fraction * whole.size)",
        BATCHES,
    ),
    Mutation(
        "a group moves all leaves",
        "transforms/groups.py",
        "grads_fn(group.put(part, params), *args)",
        "grads_fn(params, *args)",
        GROUPS,
    ),
    Mutation(
        "groups ask again at the params",
        "transforms/groups.py",
        "if _identical(known",
        "if False and _identical(known",
        GROUPS,
    ),
    Mutation(
        "groups that have a batch ask again",
        "transforms/groups.py",
        "tree.flatten_any((group.take(params), batch))",
        "tree.flatten_any((group.take(params), ()))",
        GROUPS,
    ),
    Mutation(
        "a slice is taken for the batch",
        "transforms/groups.py",
        "tree.flatten_any((part, args))[0]",
        "tree.flatten_any((part, batch))[0]",
        GROUPS,
    ),
    Mutation(
        "a mask is inverted",
        "transforms/groups.py",
        "{True: inner, False: identity()}",
        "{False: inner, True: identity()}",
        GROUPS,
    ),
    Mutation(
        "freeze freezes the others",
        "transforms/groups.py",
        "if on else g for g, on in frozen",
        "if not on else g for g, on in frozen",
        GROUPS,
    ),
    Mutation(
        "every step draws the same",
        "transforms/randomness.py",
        "after = _read(state.generators)",
        "after = state.generators",
        RANDOM,
    ),
    Mutation(
        "the generators of the caller go on",
        "transforms/randomness.py",
        "    finally:\n        _write(before)",
        "    finally:\n        pass",
        RANDOM,
    ),
    Mutation(
        "evaluations draw independently",
        "transforms/randomness.py",
        "        _write(generators)\n",
        "        pass\n",
        RANDOM,
    ),
    Mutation(
        "gradients stay scaled",
        "transforms/loss_scale.py",
        "torch.where(finite, 1 / scale, torch.nan)",
        "torch.where(finite, 1.0, torch.nan)",
        SCALING,
    ),
    Mutation(
        "a skipped step of a loss scale moves the state",
        "transforms/finite.py",
        "torch.where(finite, new, old)",
        "new",
        SCALING,
    ),
    Mutation(
        "the first pass is not looked at",
        "transforms/loss_scale.py",
        "(finite == 1) & tree.all_finite",
        "tree.all_finite",
        SCALING,
    ),
    Mutation(
        "the scale grows one step late",
        "transforms/loss_scale.py",
        "(tracker >= growth_interval)",
        "(tracker > growth_interval)",
        SCALING,
    ),
    Mutation(
        "the tracker is not reset by growth",
        "transforms/loss_scale.py",
        "finite & (tracker < growth_interval)",
        "finite",
        SCALING,
    ),
    Mutation("the loss is not scaled", "core/gradients.py", "else loss * self.factor", "else loss", SCALING),
    Mutation(
        "members all start from one seed",
        "ensemble/members.py",
        "_seeded(build, seed) if k else first",
        "first",
        ENSEMBLE,
    ),
    Mutation(
        "the generator of the caller is used", "ensemble/members.py", "        torch.manual_seed(seed)\n", "", ENSEMBLE
    ),
    Mutation(
        "all members have one hyperparameter",
        "ensemble/step.py",
        "transform = make(numbers)\n            transform.check_state",
        "transform = make(member(hyper, 0))\n            transform.check_state",
        ENSEMBLE,
    ),
    Mutation("logits are averaged", "ensemble/metrics.py", "F.log_softmax(logits, -1), 0", "logits, 0", ENSEMBLE),
    Mutation(
        "bins are open on the other side",
        "ensemble/metrics.py",
        "dtype=confidence.dtype, device=confidence.device))",
        "dtype=confidence.dtype, device=confidence.device), right=True)",
        ENSEMBLE,
    ),
    Mutation("gaps of all bins cancel", "ensemble/metrics.py", ".sum(0).abs().sum()", ".sum(0).sum().abs()", ENSEMBLE),
    Mutation("a member disagrees with itself", "ensemble/metrics.py", "(votes**2).sum(-1)", "votes.sum(-1)", ENSEMBLE),
    Mutation("logits stay in half precision", "ensemble/metrics.py", "else logits.float()", "else logits", ENSEMBLE),
    Mutation(
        "edges of bins are those of float32",
        "ensemble/metrics.py",
        "torch.tensor(upper, dtype=confidence.dtype,",
        "torch.tensor(upper, dtype=torch.float32,",
        ENSEMBLE,
    ),
    Mutation("labels may be negative", "ensemble/metrics.py", "(labels < 0) | ", "", ENSEMBLE),
    Mutation("labels may be a column", "ensemble/metrics.py", "if labels.shape != (examples,)", "if False", ENSEMBLE),
    Mutation(
        "the bootstrap draws without replacement",
        "ensemble/members.py",
        "torch.randint(examples, (examples,), ",
        "torch.randperm(examples, ",
        ENSEMBLE,
    ),
    Mutation(
        "counters are one entry seen many times",
        "ensemble/step.py",
        "lambda leaf: leaf.contiguous(), state",
        "lambda leaf: leaf, state",
        ENSEMBLE,
    ),
]

FRONT = ("tests/torch_optim/test_torch_optim.py",)

MUTATIONS += [
    Mutation(
        "the base optimizer steps at the probe",
        "torch_optim/two_step.py",
        "copy(self._values(), self._saved_step.params)",
        "pass",
        FRONT,
    ),
    Mutation(
        "the second pass writes to the buffers",
        "torch_optim/two_step.py",
        "copy([self._buffers()], [self._saved_step.buffers])",
        "pass",
        FRONT,
    ),
    Mutation(
        "groups have one rho",
        "torch_optim/two_step.py",
        '(group["rho"], bool(group["adaptive"])) for',
        '(self.defaults["rho"], bool(group["adaptive"])) for',
        FRONT,
    ),
    Mutation(
        "groups are all adaptive or none is",
        "torch_optim/two_step.py",
        '(group["rho"], bool(group["adaptive"])) for',
        '(group["rho"], bool(self.defaults["adaptive"])) for',
        FRONT,
    ),
    Mutation(
        "a radius that moves is read once",
        "torch_optim/two_step.py",
        "if numbers != self._numbers",
        "if not self._numbers",
        FRONT,
    ),
    Mutation(
        "loading leaves the base optimizer behind",
        "torch_optim/two_step.py",
        "self.base_optimizer.load_state_dict(",
        "super().load_state_dict(",
        FRONT,
    ),
    Mutation(
        "the state of the ascent is not saved",
        "torch_optim/two_step.py",
        "**self.base_optimizer.state_dict(), KEY: self._state",
        "**self.base_optimizer.state_dict(), KEY: None",
        FRONT,
    ),
    Mutation(
        "the loss of the second pass is returned",
        "torch_optim/two_step.py",
        "return second if present else first",
        "return second",
        FRONT,
    ),
    Mutation(
        "gradients stay after a step",
        "torch_optim/two_step.py",
        "        self.restore()\n        self.zero_grad()\n        return",
        "        self.restore()\n        return",
        FRONT,
    ),
    Mutation(
        "a first pass that overflows is used",
        "torch_optim/two_step.py",
        "saved.finite is None or saved.finite",
        "True",
        FRONT,
    ),
    Mutation(
        "norms are scaled",
        "torch_optim/two_step.py",
        "                scaler.unscale_(self)\n",
        "                pass\n",
        FRONT,
    ),
    Mutation(
        "schedulers think that nothing stepped", "torch_optim/two_step.py", "self._opt_called = True", "pass", FRONT
    ),
    Mutation(
        "a gradient of one pass is lost",
        "torch_optim/two_step.py",
        "if p.grad is not None or g is not None:",
        "if p.grad is not None:",
        FRONT,
    ),
    Mutation(
        "a chain keeps the buffers of its probe",
        "torch_optim/optimizer.py",
        "copy([self._buffers()], [first[0]])",
        "pass",
        FRONT,
    ),
]


FAULTS = ("tests/distributed/test_faults.py",)
SHARDED = ("tests/distributed/test_sharded.py",)
RESUME = ("tests/distributed/test_resume.py",)
FRONT_END = ("tests/torch_optim/test_torch_optim.py",)
FINITE = ("tests/transforms/test_finite.py",)

MUTATIONS += [
    Mutation(
        "gradients are summed over ranks",
        "distributed/average.py",
        "bucket = bucket / group.size()",
        "pass",
        node("distributed", "before_sam_it_is_one_ascent_for_all[2]"),
    ),
    Mutation(
        "aux stays local",
        "distributed/average.py",
        "_Message(found, aux)",
        '_Message(found, "local")',
        node("distributed", "buffers_are_averaged_taken_from_the_first_rank_or_kept[2]"),
    ),
    Mutation(
        "the last rank is the first",
        "distributed/average.py",
        "get_rank(group) == 0",
        "get_rank(group) == 1",
        node("distributed", "buffers_are_averaged_taken_from_the_first_rank_or_kept[2]"),
    ),
    Mutation(
        "params may differ",
        "distributed/average.py",
        '_check_equal(params, _group("all_reduce_mean", group))',
        "pass",
        node("distributed", "ranks_that_start_from_different_seeds_are_refused[2]"),
    ),
    Mutation(
        "states upstream stay local",
        "distributed/average.py",
        '_Message(found.extra, "mean")',
        '_Message(found.extra, "local")',
        node("distributed", "states_upstream_are_averaged[2]"),
    ),
    Mutation(
        "a missing rank is not explained", "distributed/average.py", "except RuntimeError", "except ValueError", FAULTS
    ),
    Mutation(
        "norms are those of a shard",
        "core/shards.py",
        "return leaf.to_local(), (leaf",
        "return leaf.to_local(), None if dims else (leaf",
        SHARDED,
    ),
    Mutation("copies count twice", "core/shards.py", "if not placement.is_replicate())", "if True)", SHARDED),
    Mutation(
        "shards are not added up", "core/shards.py", "value = _all_reduce(value, mesh.get_group(dim))", "pass", SHARDED
    ),
    Mutation("gradients of shards are summed", "distributed/sharding.py", 'Partial("avg")', "Partial()", SHARDED),
    Mutation(
        "a checkpoint is written over",
        "distributed/checkpoint.py",
        "if _metadata(folder).exists():",
        "if False:",
        RESUME,
    ),
    Mutation(
        "a tree of other shapes is loaded", "distributed/checkpoint.py", "wanted[name] != saved[name]", "False", RESUME
    ),
    Mutation(
        "a loaded base optimizer is lost",
        "torch_optim/two_step.py",
        "lambda base: _share_state(me())",
        "lambda base: None",
        FRONT_END,
    ),
    Mutation("a skipped step moves the state", "transforms/finite.py", "torch.where(finite, new, old)", "new", FINITE),
    Mutation(
        "a skipped step moves the params",
        "transforms/finite.py",
        "tree.where(finite, updates, tree.zeros_like(updates))",
        "updates",
        FINITE,
    ),
    Mutation(
        "skipped steps are counted wrongly",
        "transforms/finite.py",
        "state.skipped + ~finite",
        "state.skipped + finite",
        FINITE,
    ),
    Mutation(
        "every average is over all ranks",
        "distributed/average.py",
        "group = group.get_group()",
        "group = None",
        node("distributed", "one_ascent_per_node[4]"),
    ),
]


PLANE = ("tests/measures/test_landscape.py",)
PICTURES = ("tests/test_pictures.py",)
IMAGES = ("tests/test_augment.py", "tests/test_cifar10.py")
COMPARE = ("tests/test_compare_cifar10.py",)
RANKS = ("tests/test_ranks.py",)

MUTATIONS += [
    Mutation(
        "directions have the norm of the layer",
        "landscape.py",
        "tuple(range(1, x.ndim))",
        "tuple(range(x.ndim))",
        PLANE,
    ),
    Mutation("biases move with the filters", "landscape.py", "if weight.ndim < 2:", "if weight.ndim < 1:", PLANE),
    Mutation(
        "numbers are those of float32",
        "landscape.py",
        "given, dtype), dtype=dtype,",
        "given, dtype), dtype=torch.float32,",
        PLANE,
    ),
    Mutation(
        "losses stay in half precision",
        "landscape.py",
        "losses.to(torch.promote_types",
        "(lambda *_: losses)(torch.promote_types",
        PLANE,
    ),
    Mutation("both directions are one", "landscape.py", "return first, second", "return first, first", PLANE),
    Mutation(
        "directions are drawn in the precision of the params",
        "landscape.py",
        "else torch.float32\n        return",
        "else leaf.dtype\n        return",
        PLANE,
    ),
    Mutation(
        "a grid is transposed", "landscape.py", ".view(len(rows), len(columns))", ".view(len(columns), -1).T", PLANE
    ),
    Mutation(
        "a line is as exact as its difference",
        "landscape.py",
        "tree.add(tree.scale(1 - t, start), tree.scale(t, end))",
        "tree.add(start, tree.scale(t, tree.map(torch.sub, end, start)))",
        PLANE,
    ),
    Mutation("progress counts batches", "landscape.py", "progress(len(part[0]))", "progress(1)", PLANE),
    Mutation("statistics of the batch fade in", "studies/survey.py", "= True, 1.0", "= True, 0.1", PICTURES),
    Mutation(
        "batch normalisation is evaluated",
        "studies/survey.py",
        "norm.training, norm.momentum = True",
        "_, _ = True",
        PICTURES,
    ),
    Mutation(
        "every picture has its own colours",
        "studies/pictures.py",
        "cmap=COLOURS, norm=shared.norm())",
        "cmap=COLOURS, norm=scale(landscape.losses[k]).norm())",
        PICTURES,
    ),
    Mutation("corners are not cut", "studies/pictures.py", "high = min(largest, cut)", "high = largest", PICTURES),
]


MEASURES = ("tests/measures/test_measures.py",)

MUTATIONS += [
    Mutation(
        "not the best point but the last", "measures/worst.py", "torch.stack(rises).amax()", "rises[-1]", MEASURES
    ),
    Mutation(
        "the ascent leaves the ball", "measures/worst.py", "torch.where(norm > rho,", "torch.where(norm < 0,", MEASURES
    ),
    Mutation(
        "later steps are twice as long",
        "measures/worst.py",
        "length = rho",
        "length = (2 if step else 1) * rho",
        MEASURES,
    ),
    Mutation(
        "T once instead of twice",
        "measures/worst.py",
        "scaled = near.stretch(grads, params)",
        "scaled = grads",
        MEASURES,
    ),
    Mutation("m counts slices", "measures/worst.py", "math.ceil(examples / m)", "m", MEASURES),
    Mutation("the neighbourhood ignores eta", "measures/support.py", "params, self.eta,", "params, 0.0,", MEASURES),
    Mutation("the neighbourhood ignores its mask", "measures/support.py", "self.mask)", "None)", MEASURES),
    Mutation(
        "the error is the deviation", "measures/support.py", "values.std() / math.sqrt(draws)", "values.std()", MEASURES
    ),
    Mutation("every seed is 0", "measures/support.py", ".manual_seed(seed)", ".manual_seed(0)", MEASURES),
    Mutation(
        "half of the signs are 0", "measures/support.py", "2 * torch.randint(0, 2,", "torch.randint(0, 3,", MEASURES
    ),
    Mutation("the level counts, not the rise", "measures/average.py", "*batch) - start", "*batch)", MEASURES),
    Mutation("largest in size", "measures/spectra.py", 'which="LA"', 'which="LM"', MEASURES),
    Mutation("small spectra ascend", "measures/spectra.py", "values[-k:].flip(0)", "values[-k:]", MEASURES),
    Mutation("vectors in the order of SciPy", "measures/spectra.py", "vectors.T.flip(0)", "vectors.T", MEASURES),
    Mutation("products of members are not batched", "measures/spectra.py", "torch.where(w == w, a, a)", "a", MEASURES),
    Mutation("crops are wrapped in white", "studies/augment.py", "(PAD,) * 4)", "(PAD,) * 4, value=255)", IMAGES),
    Mutation(
        "rows are cropped as columns",
        "studies/augment.py",
        "rows + top, columns + left",
        "rows + left, columns + top",
        IMAGES,
    ),
    Mutation(
        "every image is flipped", "studies/augment.py", "torch.where(flip == 1,", "torch.where(flip >= 0,", IMAGES
    ),
    Mutation("every image has a hole", "studies/augment.py", "(hole == 1)", "(hole >= 0)", IMAGES),
    Mutation(
        "a hole is a pixel too large",
        "studies/augment.py",
        "place < hole_top + HOLE",
        "place <= hole_top + HOLE",
        IMAGES,
    ),
    Mutation("holes lie inside", "studies/augment.py", "0, -HOLE // 2, -HOLE // 2)", "0, 0, 0)", IMAGES),
    Mutation("epochs augment alike", "studies/augment.py", "(_AUGMENT, seed, epoch)", "(_AUGMENT, seed)", IMAGES),
    Mutation("seeds augment alike", "studies/augment.py", "(_AUGMENT, seed, epoch)", "(_AUGMENT, epoch)", IMAGES),
    Mutation(
        "green is red",
        "studies/cifar10.py",
        "data.reshape(-1, *SHAPE)",
        "data.reshape(-1, *SHAPE)[:, [1, 0, 2]]",
        IMAGES,
    ),
    Mutation(
        "any pickle runs",
        "studies/cifar10.py",
        'raise pickle.UnpicklingError(f"it asks for {module}.{name}")',
        "return super().find_class(module, name)",
        IMAGES,
    ),
    Mutation(
        "the last label may be missing", "studies/cifar10.py", "len(labels) != rows", "len(labels) < rows - 1", IMAGES
    ),
    Mutation(
        "label 10 exists", "studies/cifar10.py", "0 <= label < len(CLASSES)", "0 <= label <= len(CLASSES)", IMAGES
    ),
    Mutation(
        "variance in the place of deviation",
        "studies/problem.py",
        "mean**2).sqrt()",
        "mean**2)",
        node("compare_cifar10", "images_are_standardized_by_what_is_trained_on"),
    ),
    Mutation(
        "training is not smoothed",
        "studies/training.py",
        "kind, smoothing = problem.noisy.device.type, problem.label_smoothing",
        "kind, smoothing = problem.noisy.device.type, 0.0",
        node("compare_cifar10", "a_member_is_the_training_done_alone"),
    ),
    Mutation(
        "weights do not decay",
        "studies/optimizers.py",
        '"weight_decay": weight_decay}',
        '"weight_decay": 0.0}',
        node("compare_cifar10", "weights_on_sgd_decay_outside_the_ascent"),
    ),
    Mutation(
        "every member has the labels of the first",
        "studies/training.py",
        "            problem.noisy[k],",
        "            problem.noisy[0],",
        node("compare_cifar10", "one_after_the_other_is_all_at_once"),
    ),
    Mutation(
        "every member is augmented as the first",
        "studies/training.py",
        "numbers[:, k] if",
        "numbers[:, 0] if",
        node("compare_cifar10", "every_epoch_has_batches_and_augmentation_of_its_own"),
    ),
    Mutation(
        "every epoch is the first",
        "studies/training.py",
        "_parts(run, problem, run.epoch,",
        "_parts(run, problem, 0,",
        node("compare_cifar10", "every_epoch_has_batches_and_augmentation_of_its_own"),
    ),
    Mutation(
        "batches do not share the loss fairly",
        "studies/judging.py",
        "len(labels) / len(y)",
        "1 / len(parts)",
        node("compare_cifar10", "measuring_in_batches_changes_nothing"),
    ),
    Mutation(
        "dogs stay dogs",
        "studies/data.py",
        "3: 5, 5: 3}",
        "3: 5}",
        node("compare_cifar10", "asymmetric_noise_moves_classes_to_those_like_them"),
    ),
    Mutation(
        "names of checkpoints are cut only",
        "studies/checkpoint.py",
        "-{hashlib.sha256(spec.encode()).hexdigest()[:12]}",
        "",
        ("tests/test_compare.py",),
    ),
    Mutation(
        "subsets are not stratified",
        "studies/data.py",
        'mixed[np.argsort(turn, kind="stable")[:size]]',
        "mixed[:size]",
        node("compare_cifar10", "a_subset_has_every_class_and_holds_the_smaller_ones"),
    ),
    Mutation(
        "sweeps read the first value",
        "studies/finished.py",
        "if values > 1 else 0",
        "if values > 9 else 0",
        node("finished", "of_a_sweep_the_chosen_models_are_read"),
    ),
    Mutation(
        "unfinished is finished",
        "studies/finished.py",
        "run.epoch < settings.epochs",
        "run.epoch < 0",
        node("finished", "an_unfinished_comparison"),
    ),
    Mutation(
        "ranks: members stay in the order of the processes",
        "studies/comparison.py",
        "torch.tensor(members).argsort()",
        "torch.arange(len(members))",
        RANKS,
    ),
    Mutation(
        "ranks: all report",
        "studies/comparison.py",
        "if not self.ranks.first:",
        "if False:",
        node("ranks", "it_prints_once_and_writes_once"),
    ),
    Mutation(
        "ranks: all show bars",
        "studies/app.py",
        "quiet=not team.first",
        "quiet=False",
        node("ranks", "it_prints_once_and_writes_once"),
    ),
    Mutation(
        "ranks: all must hear a signal",
        "studies/ranks.py",
        "ReduceOp.MAX",
        "ReduceOp.MIN",
        node("ranks", "a_signal_stops_all_after_the_same_epoch"),
    ),
    Mutation(
        "ranks: the time of the quickest",
        "studies/training.py",
        ".amax(0)",
        ".amin(0)",
        node("ranks", "time_is_that_of_the_slowest"),
    ),
    Mutation(
        "ranks: labels of the first seeds", "studies/problem.py", "self.noisy[own]", "self.noisy[: len(own)]", RANKS
    ),
    Mutation(
        "ranks: batches of the first seeds", "studies/problem.py", "self.seeds[k] for k", "self.seeds[0] for k", RANKS
    ),
    Mutation("ranks: first swept values", "studies/problem.py", "values[own] for", "values[: len(own)] for", RANKS),
    Mutation(
        "ranks: more than seeds",
        "studies/ranks.py",
        "if seeds < count",
        "if seeds < 1",
        node("ranks", "what_processes_cannot_share"),
    ),
    Mutation(
        "ranks: all complain", "cli.py", "time.sleep(DELAY)", "time.sleep(0)", node("ranks", "bad_input_is_said_once")
    ),
]

SWEEP = node("compare", "a_sweep_chooses_by_the_mean_held_out_error_of_the_last_epoch")
BARS = node("compare", "error_bars_are_the_deviation_over_the_root_of_the_number_of_seeds")
SUMMARY = node("compare", "a_summary_has_the_last_epoch_and_times_over_sgds")
SHOWN = node("compare", "bars_show_the_means_of_the_last_epoch")
OWN_LABELS = node("compare", "every_seed_has_labels_of_its_own_also_those_held_out")
MEMBERS = node("compare", "a_sweep_has_a_member_for_each_seed_and_value")
JUDGED = node("compare", "what_is_measured_of_a_member")
MEASURED = node("looking", "every_seed_is_measured_on_its_own_labels")
DRAWN = node("looking", "pictures_are_of_the_seed_that_is_named")
FAILING = node("torch_optim", "a_failing_closure_leaves_everything")
MIXED = laws("numerics", "a_norm_of_mixed_types_has_the_widest")
SPARSE = node("gradients", "sparse_gradients_come_back_dense", "sparse_gradients_among_others")
SPARSE_FRONT = node("torch_optim", "sparse_and_missing_gradients_among_others")
WHOLE_NUMBERS = laws("batches", "of_whole_numbers_the_first_slice_counts")
MIDDLE = node("pictures", "the_middle_of_the_line_is_the_mean_of_the_solutions")
NEARLY = node("distributed", "ranks_that_are_nearly_alike_are_refused[2]")
CENTRE = node("pictures", "the_middle_of_a_picture_is_the_solution")

MUTATIONS += [
    Mutation(
        "a sweep chooses by test error", "studies/report.py", "int(run.held_error[-1]", "int(run.test_error[-1]", SWEEP
    ),
    Mutation("a sweep chooses by the first seed", "studies/report.py", ".mean(1).argmin", "[:, 0].argmin", SWEEP),
    Mutation("a sweep chooses by the best seed", "studies/report.py", ".mean(1).argmin", ".amin(1).argmin", SWEEP),
    Mutation("a sweep takes the worst", "studies/report.py", "mean(1).argmin", "mean(1).argmax", SWEEP),
    Mutation(
        "a sweep mixes values and seeds",
        "studies/report.py",
        "view(values, -1).mean(1).argmin",
        "view(-1, values).mean(0).argmin",
        SWEEP,
    ),
    Mutation(
        "a sweep reports test errors as held-out ones",
        "studies/report.py",
        "for rows in (run.held_error, run.test_error)",
        "for rows in (run.test_error, run.held_error)",
        SWEEP,
    ),
    Mutation(
        "error bars are deviations", "studies/report.py", "values.std() / math.sqrt(len(values))", "values.std()", BARS
    ),
    Mutation(
        "error bars of the picture are deviations",
        "studies/report.py",
        "values.std(-1) / math.sqrt(values.shape[-1])",
        "values.std(-1)",
        BARS,
    ),
    Mutation("error bars are not percentages", "studies/report.py", " ± {factor * error", " ± {error", BARS),
    Mutation(
        "the table has the first epoch",
        "studies/report.py",
        "figures(run.test_error[-1])",
        "figures(run.test_error[0])",
        SUMMARY,
    ),
    Mutation(
        "the fit is of the first epoch",
        "studies/report.py",
        "figures(run.noisy_fit[-1])",
        "figures(run.noisy_fit[0])",
        SUMMARY,
    ),
    Mutation("the slowest epoch counts", "studies/report.py", "run.seconds.median()", "run.seconds.max()", SUMMARY),
    Mutation(
        "ratios are inverted",
        "studies/report.py",
        "seconds[name] / seconds[base]",
        "seconds[base] / seconds[name]",
        SUMMARY,
    ),
    Mutation(
        "an sgd with options is not sgd",
        "studies/report.py",
        'name == "sgd" or name.startswith("sgd:")), next',
        'name == "sgd"), next',
        SUMMARY,
    ),
    Mutation(
        "bars show errors",
        "studies/bars.py",
        "100 * (1 - run.test_error[-1].mean().item())",
        "100 * run.test_error[-1].mean().item()",
        SHOWN,
    ),
    Mutation(
        "bars show the best seed", "studies/bars.py", "run.test_error[-1].mean()", "run.test_error[-1].min()", SHOWN
    ),
    Mutation("bars show the first loss", "studies/bars.py", "run.loss[-1].mean()", "run.loss[0].mean()", SHOWN),
    Mutation(
        "held-out labels are clean",
        "studies/problem.py",
        "noisy[:, held].to(device)",
        "parts.y[held].repeat(len(seeds), 1).to(device)",
        OWN_LABELS,
    ),
    Mutation(
        "all seeds have the labels of seed 0",
        "studies/problem.py",
        "settings.noise, seed, like)",
        "settings.noise, 0, like)",
        OWN_LABELS,
    ),
    Mutation(
        "swept seeds have the labels of others",
        "studies/problem.py",
        "rows.repeat(copies, 1)",
        "rows.repeat_interleave(copies, 0)",
        MEMBERS,
    ),
    Mutation(
        "swept values alternate",
        "studies/problem.py",
        ".repeat_interleave(len(self.seeds))",
        ".repeat(len(self.seeds))",
        MEMBERS,
    ),
    Mutation(
        "held-out errors are those of the first seed's labels",
        "studies/judging.py",
        "problem.held_noisy) if",
        "problem.held_noisy[:1]) if",
        JUDGED,
    ),
    Mutation(
        "sharpness is on the labels of the first seed",
        "studies/judging.py",
        "y[k]) for k, own",
        "y[0]) for k, own",
        JUDGED,
    ),
    Mutation(
        "sharpness has the wrong sign", "studies/judging.py", "torch.sub(high, low)", "torch.sub(low, high)", JUDGED
    ),
    Mutation(
        "sharpness of one has the wrong sign",
        "studies/judging.py",
        "torch.sub(loss(climbed), low)",
        "torch.sub(low, loss(climbed))",
        JUDGED,
    ),
    Mutation(
        "sharpness is measured far away",
        "studies/judging.py",
        "SHARPNESS_RADIUS = 0.05",
        "SHARPNESS_RADIUS = 0.1",
        JUDGED,
    ),
    Mutation(
        "only the first batch is measured",
        "studies/judging.py",
        "in torch.split(x, TOGETHER)]",
        "in torch.split(x[:TOGETHER], TOGETHER)]",
        JUDGED,
    ),
    Mutation("measure: labels of seed 0", "studies/measuring.py", "x, y[k])", "x, y[0])", MEASURED),
    Mutation(
        "measure: labels of seed 0 on a subset",
        "studies/measuring.py",
        "return x[index], y[:, index]",
        "return x[index], y[:1, index].expand(len(y), -1)",
        MEASURED,
    ),
    Mutation(
        "measure: the first model", "studies/measuring.py", "models.buffers), k)", "models.buffers), 0)", MEASURED
    ),
    Mutation(
        "measure: the first radius",
        "studies/measuring.py",
        "options.radii[len(options.radii) // 2]",
        "options.radii[0]",
        MEASURED,
    ),
    Mutation(
        "measure: halves of the examples", "studies/measuring.py", "max(count // 4, 1)", "max(count // 2, 1)", MEASURED
    ),
    Mutation(
        "measure: one step everywhere",
        "studies/measuring.py",
        "_worst(rho=rho, steps=steps)",
        "_worst(rho=rho)",
        MEASURED,
    ),
    Mutation(
        "measure: one step is many",
        "studies/measuring.py",
        "_worst(rho=middle)",
        "_worst(rho=middle, steps=steps)",
        MEASURED,
    ),
    Mutation("measure: adaptive is not", "studies/measuring.py", "steps=steps, adaptive=True", "steps=steps", MEASURED),
    Mutation(
        "landscape: models of seed 0",
        "studies/looking.py",
        "found.models[name].buffers), seed)",
        "found.models[name].buffers), 0)",
        DRAWN,
    ),
    Mutation("landscape: labels of seed 0", "studies/looking.py", "            y[seed],", "            y[0],", DRAWN),
    Mutation("landscape: radius is ignored", "studies/looking.py", "            radius=radius,\n", "", DRAWN),
    Mutation(
        "landscape: training labels for the test set",
        "studies/looking.py",
        "given.test_y[: len(x)]",
        "given.y[: len(x)]",
        DRAWN,
    ),
    Mutation(
        "the middle of the survey line lies elsewhere",
        "studies/survey.py",
        "first, second, ts, buffers, x, y, **how)",
        "first, second, ts**2 * ts.sign(), buffers, x, y, **how)",
        MIDDLE,
    ),
    Mutation(
        "errors of the survey line stay at the first",
        "studies/survey.py",
        "(wrong, first, second,",
        "(wrong, first, first,",
        MIDDLE,
    ),
    Mutation(
        "the survey counts what is right",
        "studies/survey.py",
        "torch.ne(logits.argmax(-1)",
        "torch.eq(logits.argmax(-1)",
        MIDDLE,
    ),
    Mutation(
        "the middle of the survey is beside the solution",
        "studies/survey.py",
        "    steps[points // 2] = 0.0\n",
        "",
        CENTRE,
    ),
    Mutation(
        "the centre of the survey is a neighbour",
        "studies/survey.py",
        "losses[:, points // 2, points // 2]",
        "losses[:, points // 2, points // 2 - 1]",
        CENTRE,
    ),
    Mutation(
        "a closure that fails leaves a chain at the probe",
        "torch_optim/optimizer.py",
        "        finally:\n            copy(values, params)\n",
        "        else:\n            copy(values, params)\n        finally:\n",
        FAILING,
    ),
    Mutation(
        "a closure that fails leaves a chain's buffers",
        "torch_optim/optimizer.py",
        "first[:] = [buffers]",
        "pass",
        FAILING,
    ),
    Mutation(
        "a closure that fails leaves params at the probe",
        "torch_optim/two_step.py",
        "            self.restore()\n            with",
        "            with",
        FAILING,
    ),
    Mutation(
        "a closure that fails leaves buffers",
        "torch_optim/two_step.py",
        "copy([self._buffers()], [buffers])",
        "pass",
        FAILING,
    ),
    Mutation(
        "a closure that fails leaves gradients",
        "torch_optim/two_step.py",
        "            self.zero_grad()\n            raise",
        "            raise",
        FAILING,
    ),
    Mutation(
        "a norm of mixed types has the first", "core/tree.py", "torch.promote_types(dtype, each.dtype)", "dtype", MIXED
    ),
    Mutation(
        "a norm is wide only where all leaves are half",
        "core/tree.py",
        "any(leaf.dtype in kernels.HALF for leaf in leaves)",
        "all(leaf.dtype in _HALF for leaf in leaves)",
        MIXED,
    ),
    Mutation(
        "gradients stay sparse in the front end",
        "torch_optim/base.py",
        "kernels.dense(p.grad.detach())",
        "p.grad.detach()",
        SPARSE_FRONT,
    ),
    Mutation(
        "gradients are present if all are",
        "torch_optim/base.py",
        "any(p.grad is not None",
        "all(p.grad is not None",
        SPARSE_FRONT,
    ),
    Mutation(
        "gradients stay sparse in func",
        "core/gradients.py",
        "if any(g.layout is not torch.strided for g in leaves):",
        "if False:",
        SPARSE,
    ),
    Mutation(
        "gradients stay sparse in func if some are dense",
        "core/gradients.py",
        "if any(g.layout",
        "if all(g.layout",
        SPARSE,
    ),
    Mutation(
        "gradients of a caller stay sparse",
        "core/transform.py",
        "map(kernels.dense, grads)",
        "grads",
        SPARSE,
    ),
    Mutation(
        "gradients of a caller stay sparse if some are dense",
        "core/transform.py",
        "if all(g.layout",
        "if any(g.layout",
        SPARSE,
    ),
    Mutation(
        "groups have one rho if two have",
        "torch_optim/two_step.py",
        "all(each == rhos[0]",
        "any(each == rhos[0]",
        node("torch_optim", "groups_that_differ_in_one"),
    ),
    Mutation(
        "groups are adaptive if one is",
        "torch_optim/two_step.py",
        "None if all(adaptive)",
        "None if any(adaptive)",
        node("torch_optim", "groups_that_differ_in_one"),
    ),
    Mutation(
        "groups are adaptive only if all are",
        "torch_optim/two_step.py",
        "if any(adaptive)",
        "if all(adaptive)",
        node("torch_optim", "groups_that_differ_in_one"),
    ),
    Mutation(
        "the loss scale grows to infinity",
        "transforms/loss_scale.py",
        " & grown.isfinite()",
        "",
        node("loss_scale", "the_scale_stops_growing_at_the_largest_number"),
    ),
    Mutation(
        "params of ranks are compared by their sums",
        "distributed/average.py",
        "(leaf.sum(), leaf.square().sum())",
        "(leaf.sum(),)",
        NEARLY,
    ),
    Mutation(
        "params of ranks are compared by their lengths",
        "distributed/average.py",
        "(leaf.sum(), leaf.square().sum())",
        "(leaf.square().sum(),)",
        NEARLY,
    ),
    Mutation(
        "the first params of ranks are compared",
        "distributed/average.py",
        "for leaf in wide for",
        "for leaf in wide[:1] for",
        NEARLY,
    ),
    Mutation(
        "adamw decays everywhere",
        "optimizers/adam.py",
        "add_decayed_weights(weight_decay, mask)",
        "add_decayed_weights(weight_decay)",
        node("closed_forms", "weights_decay_where_the_mask_says"),
    ),
    Mutation(
        "whole numbers are those of the last slice",
        "transforms/batches.py",
        "x[0].clone()",
        "x[-1].clone()",
        WHOLE_NUMBERS,
    ),
    Mutation(
        "whole numbers are those of the last chunk",
        "transforms/batches.py",
        "else sum_ for sum_, x in pairs",
        "else x for sum_, x in pairs",
        WHOLE_NUMBERS,
    ),
    Mutation(
        "chunks weigh alike",
        "transforms/batches.py",
        "sum_ + weight * _wide(x)",
        "sum_ + parts[0][0] * _wide(x)",
        WHOLE_NUMBERS,
    ),
    Mutation(
        "sums of slices stall in half precision",
        "transforms/batches.py",
        "x.float() if x.dtype in",
        "x if x.dtype in",
        laws("batches", "means_of_half_precision_are_taken_in_float32"),
    ),
    Mutation(
        "norms of filters are taken in half precision",
        "landscape.py",
        "torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None",
        "None",
        node("landscape", "norms_of_half_filters_are_exact"),
    ),
    Mutation(
        "milestones are not rounded",
        "core/schedules.py",
        "round(fraction * total_steps, 9)",
        "fraction * total_steps",
        node("schedules", "a_milestone_is_what_its_digits_say"),
    ),
    Mutation(
        "milestones are cut off",
        "core/schedules.py",
        "round(fraction * total_steps, 9)",
        "int(fraction * total_steps)",
        node("schedules", "a_milestone_is_what_its_digits_say", "step_decay_rounds_up"),
    ),
]

UNSAID = node("closed_forms", "numbers_that_are_not_given")
WIDEST = laws("numerics", "scalars_are_computed_in_the_widest_type")
NOTHING_SAID = node("torch_optim", "gradients_stay_where_nothing_is_said")
COMBINED = node("torch_optim", "a_combination_gets_the_gradients_in_this_order")
SLICES = node("measures", "slices_pass_on_every_number")
SHARES = node("compare", "parts_of_a_run_have_their_share_of_the_time")
TIMES = node("compare", "the_time_of_a_step_is_the_median_over_the_epoch")
SCALED = node("compare", "features_are_scaled_by_the_training_part")
NOISE = node("compare", "noise_is_exact_and_symmetric_noise_draws_from_all_classes")
SHUFFLES = node("compare", "every_seed_and_every_epoch_shuffles_anew")

MUTATIONS += [
    Mutation(
        "sam has another radius", "family/sam.py", "def sam(rho: Hyper = 0.05)", "def sam(rho: Hyper = 0.1)", UNSAID
    ),
    Mutation(
        "asam has another radius", "family/sam.py", "def asam(rho: Hyper = 2.0", "def asam(rho: Hyper = 0.5", UNSAID
    ),
    Mutation(
        "sam_update has another radius",
        "family/sam.py",
        "*batch: object, rho: Hyper = 0.05",
        "*batch: object, rho: Hyper = 0.1",
        UNSAID,
    ),
    Mutation(
        "trace has another decay",
        "transforms/moments.py",
        "decay: ScalarOrSchedule = 0.9,",
        "decay: ScalarOrSchedule = 0.99,",
        UNSAID,
    ),
    Mutation(
        "scalars have the type of the last leaf",
        "core/tree.py",
        "torch.promote_types(dtype, (leaf",
        "torch.promote_types(torch.float32, (leaf",
        WIDEST,
    ),
    Mutation(
        "the loss scale backs off as it grows",
        "transforms/loss_scale.py",
        "state.scale * backoff_factor",
        "state.scale / growth_factor",
        node("loss_scale", "the_scale_moves_as_in_torchs_grad_scaler"),
    ),
    Mutation(
        "most slices are enough",
        "transforms/loss_scale.py",
        "(finite == 1)",
        "(finite >= 0.5)",
        node("loss_scale", "one_bad_slice_that_no_update_sees_skips_the_step"),
    ),
    Mutation(
        "the loss scale grows too soon",
        "transforms/loss_scale.py",
        "growth_interval: int = 2000",
        "growth_interval: int = 200",
        node("loss_scale", "numbers_that_are_not_given_are_those_of_torch"),
    ),
    Mutation(
        "first_step clears gradients unasked",
        "torch_optim/two_step.py",
        "        add(values, offset)\n        if zero_grad:",
        "        add(values, offset)\n        if True:",
        NOTHING_SAID,
    ),
    Mutation(
        "second_step clears gradients unasked",
        "torch_optim/two_step.py",
        "look at\n        if zero_grad:",
        "look at\n        if True:",
        NOTHING_SAID,
    ),
    Mutation(
        "the front end combines the other way round",
        "torch_optim/two_step.py",
        "combine(first, self._grads(), step)",
        "combine(self._grads(), first, step)",
        COMBINED,
    ),
    Mutation(
        "gradients of the first pass are kept in place",
        "torch_optim/two_step.py",
        "None if p.grad is None else g.clone()",
        "None if p.grad is None else g",
        COMBINED,
    ),
    Mutation(
        "only the first radius may move",
        "torch_optim/two_step.py",
        "if numbers != self._numbers",
        "if numbers[:1] != (self._numbers or [])[:1]",
        node("torch_optim", "the_radius_of_any_group_may_move"),
    ),
    Mutation(
        "closures run without gradients",
        "torch_optim/two_step.py",
        "closure = torch.enable_grad()(closure)",
        "pass",
        node("torch_optim", "a_step_where_no_gradients_are_taken"),
    ),
    Mutation(
        "a group that moves in part does not move",
        "transforms/groups.py",
        "all(x is y",
        "any(x is y",
        laws("groups", "leaves_that_stay_do_not_hide_those_that_move"),
    ),
    Mutation(
        "a member is a view",
        "ensemble/members.py",
        "leaf[index].clone()",
        "leaf[index]",
        node("ensemble", "a_member_is_a_copy"),
    ),
    Mutation(
        "members in a loop never draw the same",
        "ensemble/step.py",
        'chunk_size == 1 and randomness != "same"',
        "chunk_size == 1",
        node("ensemble", "dropout_differs_between_members_unless_it_is_to_be_the_same"),
    ),
    Mutation(
        "members draw the same where nothing is said",
        "ensemble/step.py",
        'randomness: Randomness = "different"',
        'randomness: Randomness = "same"',
        node("ensemble", "dropout_differs_between_members_unless_it_is_to_be_the_same"),
    ),
    Mutation(
        "slices ignore the mask",
        "measures/worst.py",
        "near = neighbourhood(where, rho, adaptive, eta, mask)\n    checks.count(where, m",
        "near = neighbourhood(where, rho, adaptive, eta, None)\n    checks.count(where, m",
        SLICES,
    ),
    Mutation(
        "slices ignore eta",
        "measures/worst.py",
        "near = neighbourhood(where, rho, adaptive, eta, mask)\n    checks.count(where, m",
        "near = neighbourhood(where, rho, adaptive, 0.0, mask)\n    checks.count(where, m",
        SLICES,
    ),
    Mutation("slices take one step", "measures/worst.py", "part, rho, steps, near)", "part, rho, 1, near)", SLICES),
    Mutation(
        "the trace has one seed",
        "measures/spectra.py",
        "rademacher, real, draws, seed,",
        "rademacher, real, draws, 0,",
        node("measures", "seeds_draw_anew"),
    ),
    Mutation(
        "complex directions are real",
        "landscape.py",
        "torch.complex64 if leaf.is_complex() else torch.float32",
        "torch.float32",
        node("landscape", "directions_of_complex_weights_are_complex"),
    ),
    Mutation(
        "a part of a run takes all of its time", "studies/training.py", "share * self.seconds", "self.seconds", SHARES
    ),
    Mutation(
        "parts of a run stay in the order of the processes",
        "studies/training.py",
        "for part in parts], 1)[:, order]",
        "for part in parts], 1)",
        SHARES,
    ),
    Mutation("one slow step counts", "studies/training.py", "statistics.median(", "statistics.mean(", TIMES),
    Mutation(
        "the slowest member counts",
        "studies/training.py",
        "torch.tensor(sum(seconds))",
        "torch.tensor(max(seconds))",
        TIMES,
    ),
    Mutation(
        "an epoch has one step too many",
        "studies/problem.py",
        "len(self.data.y) // self.batch_size",
        "-(-len(self.data.y) // self.batch_size)",
        TIMES,
    ),
    Mutation(
        "some examples are measured on clean labels",
        "studies/problem.py",
        "self.noisy[:, self.judged]",
        "self.data.y[self.judged].expand(len(self.noisy), -1)",
        node("compare", "some_examples_are_measured_on_their_own_labels"),
    ),
    Mutation("pixels end above 1", "studies/data.py", "(0.0, 16.0)", "(0.0, 15.0)", SCALED),
    Mutation(
        "the test part scales the features",
        "studies/data.py",
        "(x.mean(0), x.std(0))",
        "(features.mean(0), features.std(0))",
        SCALED,
    ),
    Mutation("the test part is a fifth", "studies/data.py", "TEST_FRACTION = 0.25", "TEST_FRACTION = 0.2", SCALED),
    Mutation("noise is rounded down", "studies/data.py", "round(noise * len(y))", "int(noise * len(y))", NOISE),
    Mutation(
        "noise never draws the last class",
        "studies/data.py",
        "integers(0, classes, len",
        "integers(0, classes - 1, len",
        NOISE,
    ),
    Mutation("every seed has one noise", "studies/data.py", "(_NOISE, seed)", "(_NOISE, 0)", NOISE),
    Mutation("every epoch has one order", "studies/data.py", "(_SHUFFLE, seed, epoch)", "(_SHUFFLE, seed)", SHUFFLES),
    Mutation(
        "every seed has one order", "studies/data.py", "(_SHUFFLE, seed, epoch)", "(_SHUFFLE, 0, epoch)", SHUFFLES
    ),
    Mutation(
        "any format is read",
        "studies/checkpoint.py",
        'content["format"] == FORMAT',
        "True",
        node("compare", "a_checkpoint_of_another_format_is_refused"),
    ),
    Mutation(
        "errors of a table have the size of the mean",
        "studies/measuring.py",
        "figures['standard_error']:.1g",
        "figures['mean']:.1g",
        node("looking", "numbers_of_a_table_are_short"),
    ),
    Mutation(
        "types of a broadcast are lost",
        "distributed/average.py",
        ".view(leaves[k].shape).to(leaves[k].dtype)",
        ".view(leaves[k].shape)",
        node("distributed", "a_broadcast_keeps_every_type[2]"),
    ),
    Mutation(
        "only numbers with a point are broadcast",
        "distributed/average.py",
        'rule == "first" or (rule == "mean" and',
        'rule != "local" and (',
        node("distributed", "a_broadcast_keeps_every_type[2]"),
    ),
    Mutation(
        "whole numbers are averaged over ranks",
        "distributed/average.py",
        'rule == "first" or (rule == "mean" and',
        'rule == "first" or (rule == "mean" or',
        node("distributed", "the_mean_of_a_tree[2]"),
    ),
]


OBJECTS = ("tests/laws/test_objects.py",)

MUTATIONS += [
    Mutation("objects: foreign states are taken", "core/transform.py", "if problem is not None:", "if False:", OBJECTS),
    Mutation(
        "objects: states inside are not looked at",
        "core/transform.py",
        "if self._inside is not None:",
        "if False:",
        OBJECTS,
    ),
    Mutation(
        "objects: counters have any shape",
        "core/states.py",
        "not isinstance(value, Tensor) or value.ndim",
        "not isinstance(value, Tensor)",
        OBJECTS,
    ),
    Mutation("objects: chains are of any length", "core/transform.py", "len(state) != len(parts)", "False", OBJECTS),
    Mutation(
        "objects: a chain hides what probes",
        "core/transform.py",
        "in entries(self._record[1:])",
        "in self._record[1]",
        OBJECTS,
    ),
    Mutation(
        "objects: a transform of the user's own does not probe",
        "core/transform.py",
        "self._probes = probes",
        "self._probes = False",
        OBJECTS,
    ),
    Mutation(
        "objects: an ascent may probe", "family/sharpness_aware.py", "if found is not None:", "if False:", OBJECTS
    ),
    Mutation(
        "objects: the state of the ascent is not looked at",
        "family/sharpness_aware.py",
        "lambda state: [(ascent, state.ascent)]",
        "None",
        OBJECTS,
    ),
    Mutation(
        "objects: apply_if_finite hides states",
        "transforms/finite.py",
        "lambda state: [(inner, state.inner)]",
        "None",
        OBJECTS,
    ),
    Mutation(
        "objects: dynamic_loss_scale hides states",
        "transforms/loss_scale.py",
        "lambda state: [(inner, state.inner)]",
        "None",
        OBJECTS,
    ),
    Mutation(
        "objects: microbatch hides states", "transforms/batches.py", "lambda state: [(inner, state)]", "None", OBJECTS
    ),
    Mutation(
        "objects: groups hide states", "transforms/groups.py", "if not isinstance(state, dict):", "if True:", OBJECTS
    ),
    Mutation("objects: states need not be stacked", "ensemble/step.py", "if got is not None:", "if False:", OBJECTS),
    Mutation(
        "objects: states of members are not looked at",
        "ensemble/step.py",
        "            transform.check_state(state)\n",
        "",
        OBJECTS,
    ),
    Mutation("objects: any generators will do", "transforms/randomness.py", "if not fits:", "if False:", OBJECTS),
    Mutation(
        "objects: only the first moment is looked at",
        "transforms/moments.py",
        "zip(state[1:], (params, params, params if amsgrad else ()), strict=True)",
        "zip(state[1:2], (params,), strict=True)",
        OBJECTS,
    ),
    Mutation("objects: arguments have no names", "core/records.py", "yield name, value", 'yield "*", value', OBJECTS),
    Mutation(
        "objects: a deepcopy shares its tensors",
        "core/records.py",
        "return copy.deepcopy(leaf, memo) if deep else leaf",
        "return leaf",
        OBJECTS,
    ),
    Mutation(
        "objects: pickle speaks for itself",
        "core/records.py",
        "_check_pickles(self._name, name, leaf)",
        "pass",
        OBJECTS,
    ),
    Mutation(
        "objects: schedules of one kind are equal",
        "core/records.py",
        " and _equal(_all_arguments(one), _all_arguments(other))",
        "",
        OBJECTS,
    ),
    Mutation(
        "momentum stays below 1", "optimizers/sgd.py", 'checks.share("sgd"', 'checks.fraction("sgd"', ("tests/parity",)
    ),
]


DERIVATIVES = ("tests/core/test_derivatives.py",)
MODES = ("tests/core/test_modes.py",)


def cells(*whats: str) -> tuple[str, ...]:
    """Returns rows of the table of derivatives."""
    return tuple(f"tests/core/test_derivatives.py::test_each_cell_of_the_table[{what}]" for what in whats)


MUTATIONS += [
    Mutation(
        "params that require grad grow a graph",
        "core/tree.py",
        "if not any(found) or frames.differentiating():",
        "if True:",
        (*laws("contract", "no_graph_from_nothing"), "tests/core/test_gradients.py"),
    ),
    Mutation(
        "params that are no leaves are values", "core/tree.py", "else x.is_leaf)", "else True)", cells("initial params")
    ),
    Mutation(
        "a step in a loss takes leaves as values",
        "core/frames.py",
        'return _frame.get() == "loss" or ',
        "return ",
        DERIVATIVES,
    ),
    Mutation(
        "duals are eager",
        "core/levels.py",
        " is None and forward_ad._current_level < 0",
        " is None",
        cells("initial params"),
    ),
    Mutation(
        "autograd.functional gets zeros",
        "core/tree.py",
        "levels.refuse_functional(where)",
        "pass",
        node("derivatives", "autograd_functional_is_refused_where_it_would_be_zero"),
    ),
    Mutation(
        "what a loss captures is not looked for",
        "core/gradients.py",
        "more = searches and",
        "more = False and",
        cells("a number in the loss"),
    ),
    Mutation(
        "a batch made before is not looked for",
        "core/graphs.py",
        "            found = True  # made before this evaluation",
        "            pass",
        node("derivatives", "batches_that_require_grad"),
    ),
    Mutation(
        "captured parameters are differentiated in a step",
        "core/graphs.py",
        "return found or not captures_are_values",
        "return True",
        node("derivatives", "parameters_that_the_loss_captures_are_values"),
    ),
    Mutation(
        "captured parameters are values everywhere",
        "core/graphs.py",
        "return found or not captures_are_values",
        "return found",
        node("derivatives", "a_tensor_that_starts_to_require_grad"),
    ),
    Mutation(
        "some evaluations differentiate a captured parameter",
        "core/graphs.py",
        "if captures_are_values and found:",
        "if False:",
        node("derivatives", "a_differentiated_step_with_such_values_is_refused"),
    ),
    Mutation(
        "func keeps the graph of captured parameters",
        "core/gradients.py",
        "return graphs.detach_values((grads, loss, aux), params, since)",
        "return grads, loss, aux",
        node("derivatives", "parameters_that_the_loss_captures_are_values"),
    ),
    Mutation(
        "bare gradients keep the graph of captured parameters",
        "core/transform.py",
        "graphs.detach_values(self.grads_fn(params, *batch), params, since)",
        "self.grads_fn(params, *batch)",
        node("derivatives", "parameters_that_a_bare_gradient_captures_are_values"),
    ),
    Mutation(
        "inner values are captured",
        "core/graphs.py",
        'if hasattr(variable, "_funcsam_inner"):',
        "if False:",
        node("derivatives", "derivatives_of_derivatives_keep_no_graph"),
    ),
    Mutation(
        "params are not told from what the loss captures",
        "core/gradients.py",
        "leaf.view_as(leaf) if leaf",
        "leaf if leaf",
        node("derivatives", "params_used_a_second_time_by_the_loss"),
    ),
    Mutation(
        "gradients are not differentiated",
        "core/gradients.py",
        "_grads(target, inputs, differentiable)",
        "_grads(target, inputs)",
        cells("rho"),
    ),
    Mutation(
        "the loss of a differentiated step is a value",
        "core/gradients.py",
        "if not differentiable:",
        "if True:",
        cells("a step's own loss"),
    ),
    Mutation(
        "a foreach kernel multiplies by what is differentiated",
        "core/kernels.py",
        "and not factor.requires_grad",
        "and True",
        cells("lr"),
    ),
    Mutation(
        "the derivative of a root at zero is infinite",
        "core/tree.py",
        "None if tracked else torch._foreach_sqrt",
        "torch._foreach_sqrt",
        node("derivatives", "a_gradient_of_zero_has_a_derivative"),
    ),
    Mutation(
        "batch normalisation is differentiated through vmap by backward",
        "core/levels.py",
        "or any(unwrapped(x).requires_grad for x in leaves)",
        "",
        HYPER,
    ),
    Mutation(
        "linearize draws anew",
        "core/levels.py",
        "return disable_proxy_modes_tracing()",
        "return nullcontext()",
        cells("average-case sharpness"),
    ),
    Mutation(
        "a landscape is a graph of captured parameters",
        "landscape.py",
        "found.append(graphs.detach_values(losses, (), since))",
        "found.append(losses)",
        node("derivatives", "a_landscape_takes_leaves_as_values"),
    ),
    Mutation(
        "eigenvalues have no derivative",
        "measures/spectra.py",
        "if any(tracked):",
        "if False:",
        cells("eigenvalues of the Hessian"),
    ),
    Mutation(
        "inference mode is plain",
        "core/gradients.py",
        "levels.eager() and not _in_inference_mode(leaves)",
        "levels.eager()",
        MODES,
    ),
    Mutation(
        "inference tensors are plain",
        "core/gradients.py",
        " or any(map(Tensor.is_inference, leaves))",
        "",
        node("modes", "inference_tensors_outside_of_their_mode"),
    ),
    Mutation(
        "parametrised weights are those of other params",
        "core/levels.py",
        "parametrize._cache_enabled, parametrize._cache = 0, {}",
        "pass",
        MODES,
    ),
    Mutation(
        "casts of older weights are taken",
        "core/levels.py",
        "_fresh() -> Iterator[None]:\n    torch.clear_autocast_cache()",
        "_fresh() -> Iterator[None]:",
        node("modes", "casts_of_other_evaluations"),
    ),
    Mutation(
        "casts pile up",
        "core/levels.py",
        "        yield\n    torch.clear_autocast_cache()",
        "        yield",
        node("modes", "casts_do_not_pile_up"),
    ),
    Mutation(
        "measures of half precision compute in it",
        "measures/support.py",
        "wide = tree.widened(given)",
        "wide = given",
        node("measures", "arithmetic_in_half_precision_is_that_of_float32"),
    ),
    Mutation(
        "a scaled loss takes any backend",
        "core/gradients.py",
        "return GradAndValue(self.loss_fn, self.has_aux, self.backend, factor)",
        'return GradAndValue(self.loss_fn, self.has_aux, "auto", factor)',
        node("gradients", "a_scaled_loss_keeps_its_backend"),
    ),
    Mutation(
        "gradients stay sparse in autograd",
        "core/gradients.py",
        "else kernels.dense(g) for",
        "else g for",
        ("tests/core/test_gradients.py",),
    ),
    Mutation(
        "any word is a choice",
        "core/checks.py",
        "if not (isinstance(value, str) and value in options):",
        "if False:",
        node("messages", "backends"),
    ),
    Mutation(
        "a bool is a whole number",
        "core/checks.py",
        "if isinstance(value, bool) or not isinstance(value, int):",
        "if not isinstance(value, int):",
        ("tests/core/test_messages.py",),
    ),
    Mutation(
        "anything is a transform",
        "core/transform.py",
        "        if not isinstance(value, Transform):",
        "        if False:",
        GROUPS,
    ),
]


CHOICE = node(
    "evaluations", "plain_code_calls_one", "vmap_calls_both_and_chooses_for_each_member", "meta_has_no_value_to_look_at"
)
REFUSED = node("evaluations", "branches_that_differ_are_refused", "other_picks_are_refused")
COMBINATION = node("evaluations", "a_combination_is_given_the_step", "a_combination_of_other_arguments_is_refused")
HELD = node("evaluations", "nothing_else_is_held_at_the_probe")
TREE, MEMBERS_OF_THE_FAMILY = ("tests/core/test_tree.py",), ("tests/family/test_family_members.py",)
NO_ASCENT = laws("objects", "an_ascent_that_probes_is_refused")
READ = laws("family", "a_schedule_is_read_at_0_1_2")
COUNTED = node("torch_optim", "a_combination_sees_the_step", "the_number_of_steps_is_saved")
OLD_STATE = node("torch_optim", "a_state_without_the_number_of_steps")

MUTATIONS += [
    Mutation(
        "either calls both in plain code",
        "core/evaluations.py",
        " or (levels.eager() and not pick.is_meta)",
        "",
        CHOICE,
    ),
    Mutation("either looks at what has no value", "core/evaluations.py", " and not pick.is_meta", "", CHOICE),
    Mutation(
        "either chooses the other tree",
        "core/evaluations.py",
        "tree.where(pick, chosen, other)",
        "tree.where(pick, other, chosen)",
        CHOICE,
    ),
    Mutation("either takes any tensor", "core/evaluations.py", " and not pick.ndim", "", REFUSED),
    Mutation(
        "branches of other shapes pass",
        "core/evaluations.py",
        'checks.same("either", "no", other, chosen, "yes")',
        "pass",
        REFUSED,
    ),
    Mutation(
        "branches of other dtypes pass",
        "core/evaluations.py",
        'checks.dtypes("either", "no", other, chosen, "yes")',
        "pass",
        REFUSED,
    ),
    Mutation(
        "a branch may hold numbers", "core/evaluations.py", 'checks.tensors("either", "yes", chosen)', "pass", REFUSED
    ),
    Mutation(
        "a gradient in hand has another aux",
        "core/evaluations.py",
        "return grads, ()",
        "return grads, grads",
        node("evaluations", "a_gradient_in_hand"),
    ),
    Mutation(
        "the inner product of complex leaves is not conjugated",
        "core/tree.py",
        "(x.conj() * y).real",
        "(x * y).real",
        TREE,
    ),
    Mutation(
        "products are taken in half precision",
        "core/tree.py",
        "x, y = (a.float() if a.dtype in kernels.HALF else a for a in (x, y))",
        "pass",
        TREE,
    ),
    Mutation(
        "the inner product has the type of the first leaf",
        "core/tree.py",
        "dtype = real_dtype(leaves)",
        "dtype = leaves[0].dtype",
        TREE,
    ),
    Mutation(
        "the inner product of shards is that of one rank",
        "core/tree.py",
        "shards.total(products, _sum) if shards.any_sharded(products) else _sum(products)",
        "_sum([a.to_local() if shards.sharded(a) else a for a in products])",
        SHARDED,
    ),
    Mutation(
        "the rest has the part twice", "core/tree.py", "_add_scaled(a, -share, b)", "_add_scaled(a, share, b)", TREE
    ),
    Mutation("rounding is left", "core/tree.py", "torch.where(lost, 0.0, a)", "a", TREE),
    Mutation(
        "the rounding of the entries is forgotten",
        "core/tree.py",
        "tolerance = eps + 64 * min",
        "tolerance = 64 * min",
        TREE,
    ),
    Mutation(
        "the rounding of the sums is forgotten",
        "core/tree.py",
        "tolerance = eps + 64 * min(eps, torch.finfo(torch.float32).eps)",
        "tolerance = eps",
        TREE,
    ),
    Mutation("the finest type says what rounding is", "core/tree.py", "eps = max(torch", "eps = min(torch", TREE),
    Mutation(
        "sums in half precision round as it does",
        "core/tree.py",
        "64 * min(eps, torch.finfo(torch.float32).eps)",
        "64 * eps",
        TREE,
    ),
    Mutation(
        "the part along zero is NaN",
        "core/tree.py",
        "torch.where(zero, 0.0, dot(wide, other) / torch.where(zero, 1.0, square))",
        "dot(wide, other) / square",
        TREE,
    ),
    Mutation(
        "a square out of range is taken for zero",
        "core/tree.py",
        "share = share + (square - square)",
        "share = share + 0.0",
        TREE,
    ),
    Mutation(
        "the rest of half precision is computed in it",
        "core/tree.py",
        "wide, other = widened(xs), widened(ys)",
        "wide, other = xs, ys",
        TREE,
    ),
    Mutation(
        "a combination is given the next step",
        "family/sharpness_aware.py",
        "combine(grads, probe, state.step)",
        "combine(grads, probe, state.step + 1)",
        COMBINATION,
    ),
    Mutation(
        "a combination may take two arguments",
        "family/sharpness_aware.py",
        "signature.bind((), (), ())",
        "signature.bind_partial()",
        COMBINATION,
    ),
    Mutation("the offset is held at the probe", "family/sharpness_aware.py", "offsets.pop()", "offsets[0]", HELD),
    Mutation(
        "gsam adds the orthogonal part",
        "family/gsam.py",
        "-schedules.at(alpha, step)",
        "schedules.at(alpha, step)",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "gsam takes the part of the probe",
        "family/gsam.py",
        "tree.reject(grads, probe)",
        "tree.reject(probe, grads)",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "alpha of gsam is read one step late",
        "family/gsam.py",
        "schedules.at(alpha, step)",
        "schedules.at(alpha, step + 1)",
        READ,
    ),
    Mutation(
        "looksam keeps the part of the plain gradient",
        "family/looksam.py",
        "tree.reject(probe, grads)",
        "tree.reject(grads, probe)",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "looksam looks one step late",
        "family/looksam.py",
        "state.step % k == 0",
        "(state.step + 1) % k == 0",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "looksam reuses at a length of its own",
        "family/looksam.py",
        " * tree.norm(grads) * ",
        " * ",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "looksam reuses at the old length",
        "family/looksam.py",
        " * tree.norm(grads) * tree.reciprocal(tree.norm(state.across))",
        "",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "looksam forgets what it has reused",
        "family/looksam.py",
        "state.across), state.across",
        "state.across), tree.zeros_like(grads)",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "looksam stays where it is",
        "family/looksam.py",
        "tree.unit(grads)",
        "tree.zeros_like(grads)",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "rho of looksam is read one step late",
        "family/looksam.py",
        "schedules.at(rho, state.step)",
        "schedules.at(rho, state.step + 1)",
        READ,
    ),
    Mutation(
        "alpha of looksam is read one step late",
        "family/looksam.py",
        "schedules.at(alpha, state.step)",
        "schedules.at(alpha, state.step + 1)",
        READ,
    ),
    Mutation("looksam passes for an ascent", "family/looksam.py", "probes=True", "probes=False", NO_ASCENT),
    Mutation(
        "msam goes the other way",
        "family/msam.py",
        "tree.add_scaled(params, -1,",
        "tree.add_scaled(params, 1,",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "msam does not normalise", "family/msam.py", "tree.unit(state.trace)", "state.trace", MEMBERS_OF_THE_FAMILY
    ),
    Mutation(
        "msam is not perturbed",
        "family/msam.py",
        "grads_fn(tree.add_scaled(params, -1, tree.scale(length, tree.unit(state.trace))), *batch)",
        "grads_fn(params, *batch)",
        MEMBERS_OF_THE_FAMILY,
    ),
    Mutation(
        "rho of msam is read one step late",
        "family/msam.py",
        "schedules.at(rho, state.step)",
        "schedules.at(rho, state.step + 1)",
        READ,
    ),
    Mutation(
        "the radius of msam is read one step late",
        "family/msam.py",
        "schedules.at(rho, state.step)",
        "schedules.at(rho, state.step + 1)",
        READ,
    ),
    Mutation("msam passes for an ascent", "family/msam.py", "probes=True", "probes=False", NO_ASCENT),
    Mutation(
        "the front end does not count",
        "torch_optim/two_step.py",
        "saved.state._replace(step=saved.state.step + 1)",
        "saved.state",
        COUNTED,
    ),
    Mutation(
        "the front end counts a step early",
        "torch_optim/two_step.py",
        "saved.grads, saved.state.step)",
        "saved.grads, saved.state.step + 1)",
        COUNTED,
    ),
    Mutation(
        "an old state is taken as it is",
        "torch_optim/two_step.py",
        "SharpnessAwareState(tree.counter(self._values()), state) if old else state",
        "state",
        OLD_STATE,
    ),
    Mutation(
        "an old pickle is taken as it is",
        "torch_optim/two_step.py",
        "        self._put_state(self._state)\n",
        "",
        OLD_STATE,
    ),
    Mutation(
        "the first gradient is asked for elsewhere",
        "transforms/moments.py",
        "return lift(init, update, TraceState)",
        "return Transform(init, lambda w, f, s, *b: (*update(f(tree.map(torch.neg, w), *b)[0], s, w), f(w)[1]))",
        laws("contract", "the_first_gradient_is_asked_for_at_the_params"),
    ),
]


def mutated(mutation: Mutation) -> str:
    """Returns the text of the file that is broken, or `""` if it has not the text to be replaced."""
    path = ROOT / "funcsam" / mutation.file
    text = path.read_text() if path.exists() else ""
    return text.replace(mutation.old, mutation.new) if mutation.old in text else ""


def missing(test: str) -> bool:
    """Tells whether there is no such file, or no such test in it."""
    file, _, name = test.partition("::")
    path, name = ROOT / file, name.partition("[")[0]
    return not path.exists() or (bool(name) and f"def {name}(" not in path.read_text())


def stale() -> list[str]:
    """Lists the mutations of which the text or the tests are no longer there, and those with the name of another."""
    names = [m.name for m in MUTATIONS]
    return [
        f"{m.name!r} ({m.file})"
        for m in MUTATIONS
        if not mutated(m) or names.count(m.name) > 1 or not m.tests or any(map(missing, m.tests))
    ]


def child(mutation: Mutation, copy: pathlib.Path) -> int:
    """Breaks a copy and starts its tests in a process that has imported torch already; returns its number."""
    (copy / "funcsam" / mutation.file).write_text(mutated(mutation))
    number = os.fork()
    if number:
        return number
    with (copy / "output").open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    signal.alarm(TIMEOUT)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[0] = str(copy)
    code = 70
    try:
        code = pytest.main([*OPTIONS, *mutation.tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(status: int, output: str) -> tuple[str, str]:
    """Tells `alive`, `killed` or `broken`, and by which test, from how the tests ended and what they printed."""
    if os.WIFSIGNALED(status):
        return "killed", f"by signal {os.WTERMSIG(status)}; after {TIMEOUT} s it is {signal.SIGALRM:d}"
    if not os.waitstatus_to_exitcode(status):
        return "alive", ""
    lines = [line.split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    by = [line.partition(" ")[2] for line in lines if "::" in line]  # an error without a test: nothing was run
    return ("killed", by[0]) if by else ("broken", output[-500:])


class Trials:
    """Mutations that are tried side by side, each in a copy of the library and its tests."""

    def __init__(self, folder: pathlib.Path, copies: int) -> None:
        self.free = [folder / str(k) for k in range(copies)]
        self.running: dict[int, tuple[Mutation, pathlib.Path, float]] = {}
        self.ends: dict[str, str] = {}
        for copy in self.free:
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "notebooks", "results"))

    def start(self, mutation: Mutation) -> None:
        """Starts one, as soon as a copy is free."""
        if not self.free:
            self.wait()
        copy = self.free.pop()
        self.running[child(mutation, copy)] = mutation, copy, time.monotonic()

    def wait(self) -> None:
        """Waits for one, mends its copy, and says how it ended."""
        number, status = os.wait()
        mutation, copy, begin = self.running.pop(number)
        shutil.copy(ROOT / "funcsam" / mutation.file, copy / "funcsam" / mutation.file)
        end, why = outcome(status, (copy / "output").read_text())
        self.free.append(copy)
        self.ends[mutation.name] = end
        print(f"{end}  {time.monotonic() - begin:5.1f} s  {mutation.name}  {why}", flush=True)


def main() -> None:
    """Tries the mutations that contain one of the words, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of the mutations; all if none are given")
    parser.add_argument("-j", type=int, default=2, metavar="COPIES", help="how many are tried at once")
    given = parser.parse_args()
    if old := stale():
        sys.exit(f"mutations: `old` and `tests` must occur, and names once, got nothing or two for {', '.join(old)}.")
    chosen = [m for m in MUTATIONS if not given.words or any(word in m.name for word in given.words)]
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(pathlib.Path(folder), given.j)
        for mutation in chosen:
            trials.start(mutation)
        while trials.running:
            trials.wait()
    left = [name for name, end in trials.ends.items() if end != "killed"]
    print(f"{len(chosen) - len(left)} of {len(chosen)} killed" + (f", not: {left}" if left else ""))
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
