"""Tests the tests: breaks one formula at a time in a copy of the library, and prints what no test noticed.

`python tests/mutations.py [words of a mutation ...]`, from the root of the repository; some minutes to half an hour.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
ORDER = ["closed_forms", "schedules", "messages", "gradients"]
LAWS = ["family", "order", "numerics", "contract", "transformations"]
TESTS = [*(f"tests/test_{name}.py" for name in ORDER), "tests/parity", *(f"tests/laws/test_{name}.py" for name in LAWS)]


class Mutation(NamedTuple):
    """One replacement of a text that occurs in a file.

    Attributes:
        name: What breaks.
        file: Where, inside the library.
        old: The text.
        new: What takes its place.
        tests: The test files that must notice; all of `TESTS` if none are named.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()


MUTATIONS = [
    Mutation(
        "ascent goes down",
        "family/sam.py",
        "return chain(normalize(), scale(rho))",
        "return chain(normalize(), scale(rho), scale(-1))",
    ),
    Mutation(
        "asam multiplies by T once",
        "family/sam.py",
        "chain(magnitude, normalize(), magnitude, scale(rho))",
        "chain(magnitude, normalize(), scale(rho))",
    ),
    Mutation("asam ignores its mask", "family/sam.py", "scale_by_magnitude(eta, mask)", "scale_by_magnitude(eta)"),
    Mutation("asam ignores eta", "family/sam.py", "scale_by_magnitude(eta, mask)", "scale_by_magnitude(0.0, mask)"),
    Mutation(
        "sam_update is never adaptive", "family/sam.py", "asam(rho) if adaptive else", "sam(rho) if adaptive else"
    ),
    Mutation(
        "combine gets its arguments the other way round",
        "sharpness.py",
        "combine(grads, probe)",
        "combine(probe, grads)",
    ),
    Mutation("when is read one step late", "sharpness.py", "when(state.step)", "when(state.step + 1)"),
    Mutation("when is inverted", "sharpness.py", "if known and not pick", "if known and pick"),
    Mutation(
        "several ascents all start at the params",
        "sharpness.py",
        "_shifted(grads_fn, offset), state",
        "grads_fn, state",
    ),
    Mutation("several ascents are not shortened", "sharpness.py", "offset = tree.scale(1 / steps, offset)", "pass"),
    Mutation(
        "the step of sharpness_aware stands still",
        "sharpness.py",
        "SharpnessAwareState(state.step + 1,",
        "SharpnessAwareState(state.step,",
    ),
    Mutation(
        "the state of the ascent stands still",
        "sharpness.py",
        "SharpnessAwareState(state.step + 1, ascent_state)",
        "SharpnessAwareState(state.step + 1, state.ascent)",
    ),
    Mutation(
        "aux of the probe is kept",
        "sharpness.py",
        "probe, _ = grads_fn(point, *batch)",
        "probe, aux = grads_fn(point, *batch)",
    ),
    Mutation(
        "chain runs backwards",
        "transform.py",
        "zip(parts, state, strict=True)",
        "reversed(list(zip(parts, state, strict=True)))",
    ),
    Mutation("chain drops new states", "transform.py", "((*states, new), aux)", "((*states, state), aux)"),
    Mutation(
        "params that require grad grow a graph",
        "transform.py",
        "self._update(tree.detached(params),",
        "self._update(params,",
    ),
    Mutation(
        "norm per leaf",
        "scaling.py",
        "return tree.scale(tree.reciprocal(tree.norm(grads)), grads), state",
        "return tree.map(lambda g: tree.scale(tree.reciprocal(tree.norm(g)), g), grads), state",
    ),
    Mutation("normalize adds 1e-6", "scaling.py", "tree.reciprocal(tree.norm(grads))", "1 / (tree.norm(grads) + 1e-6)"),
    Mutation(
        "sign of lr", "scaling.py", "optree.tree_map(neg, schedules.at(lr, state.step))", "schedules.at(lr, state.step)"
    ),
    Mutation(
        "lr is read one step late", "scaling.py", "schedules.at(lr, state.step)", "schedules.at(lr, state.step + 1)"
    ),
    Mutation(
        "factor is read one step late",
        "scaling.py",
        "schedules.at(factor, state.step)",
        "schedules.at(factor, state.step + 1)",
    ),
    Mutation(
        "clip scales always",
        "scaling.py",
        "torch.where(norm > bound, bound * tree.reciprocal(norm), 1.0)",
        "bound * tree.reciprocal(norm)",
    ),
    Mutation("clip never scales", "scaling.py", "norm > bound, bound", "norm > 1e9 * bound, bound"),
    Mutation("eta is not added", "tree.py", "a * (b.abs() + _on(shift, b))", "a * b.abs()"),
    Mutation("eta is not added by the fast kernel", "tree.py", "if eta:", "if False:"),
    Mutation("masks are inverted", "tree.py", "return [what(path, leaf)", "return [not what(path, leaf)"),
    Mutation(
        "the norm is taken in half precision",
        "tree.py",
        "dtype=torch.float32 if x.dtype in _HALF else None",
        "dtype=None",
    ),
    Mutation("1 / 0 is infinite", "tree.py", "torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, x))", "(1 / x)"),
    Mutation("1 / inf is zero", "tree.py", "+ (x - x)", ""),
    Mutation(
        "the derivative of the root at zero is infinite",
        "tree.py",
        "return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, x)))",
        "return torch.sqrt(x)",
    ),
    Mutation(
        "nesterov is ignored", "moments.py", "tree.add_scaled(grads, factor, total) if nesterov else total", "total"
    ),
    Mutation(
        "dampening on the first step",
        "moments.py",
        "tree.where(state.step == 0, grads, tree.scale(keep, grads))",
        "tree.scale(keep, grads)",
    ),
    Mutation(
        "momentum is read one step late",
        "moments.py",
        "schedules.at(decay, state.step)",
        "schedules.at(decay, state.step + 1)",
    ),
    Mutation("no bias correction", "moments.py", "tree.scale(1 / (1 - decay**count), m)", "m"),
    Mutation("bias correction is one step late", "moments.py", "count = (state.step + 1)", "count = (state.step + 2)"),
    Mutation(
        "eps under the root",
        "moments.py",
        "tree.divide(tree.scale(1 / (1 - decay**count), m), tree.shift(root, floor))",
        "tree.divide(tree.scale(1 / (1 - decay**count), m), tree.sqrt(tree.shift(tree.multiply(root, root), floor)))",
    ),
    Mutation(
        "amsgrad forgets", "moments.py", "tree.maximum(tree.real_views(state.largest), v) if amsgrad", "v if amsgrad"
    ),
    Mutation(
        "complex leaves are not pairs of reals",
        "moments.py",
        "g, m, v = (tree.real_views(each) for each in",
        "g, m, v = (each for each in",
    ),
    Mutation(
        "decay has the wrong sign",
        "decay.py",
        "tree.add_scaled(grads, factor, params, mask)",
        "tree.add_scaled(grads, -factor, params, mask)",
    ),
    Mutation("decay ignores its mask", "decay.py", "factor, params, mask)", "factor, params)"),
    Mutation(
        "adam decays like adamw",
        "optimizers.py",
        "return chain(*decay, scale_by_adam(*betas, eps, amsgrad=amsgrad), scale",
        "return chain(scale_by_adam(*betas, eps, amsgrad=amsgrad), *decay, scale",
    ),
    Mutation("sgd decays behind the momentum", "optimizers.py", "chain(*decay, *memory,", "chain(*memory, *decay,"),
    Mutation("a milestone is one step late", "schedules.py", "step >= start", "step > start"),
    Mutation(
        "cosine goes on", "schedules.py", "torch.clamp(_real(step) / total_steps, max=1.0)", "_real(step) / total_steps"
    ),
    Mutation(
        "warmup starts at one",
        "schedules.py",
        "value * _real(step) / warmup_steps",
        "value * _real(step + 1) / warmup_steps",
    ),
    Mutation(
        "aux keeps its graph",
        "gradients.py",
        "optree.tree_map(Tensor.detach, aux)",
        "aux",
    ),
    Mutation("unused leaves have no gradient", "gradients.py", ", materialize_grads=True", ", allow_unused=True"),
]

NN, BATCHES = ("tests/test_nn.py",), ("tests/laws/test_batches.py",)
GROUPS, ENSEMBLE = ("tests/laws/test_groups.py",), ("tests/test_ensemble.py",)
SCALING, RANDOM = ("tests/test_loss_scale.py",), ("tests/test_randomness.py",)
HYPER = ("tests/test_hypergradients.py",)

MUTATIONS += [
    Mutation("the buffers given are written to", "nn.py", "return torch._lazy_clone(x)", "return x.detach()", NN),
    Mutation(
        "what is written to in memory of NumPy goes there",
        "nn.py",
        "buffers[name].clone() if copy",
        "buffers[name] if copy",
        NN,
    ),
    Mutation("what is not written is copied", "nn.py", "return torch._lazy_clone(x)", "return x.clone()", NN),
    Mutation("a new shape does not come back", "nn.py", "own), own.shape, own.stride())", "own),)", NN),
    Mutation("new storage does not come back", "nn.py", "_C._data_address(own), own", "own", NN),
    Mutation(
        "spread buffers come back stacked",
        "nn.py",
        "_marked(torch.where(always, buffer, buffer))",
        "torch.where(always, buffer, buffer)",
        ENSEMBLE,
    ),
    Mutation("replaced parts are not seen", "nn.py", "if self._contents.changed():", "if False:", NN),
    Mutation("tensors that move between dicts are not seen", "nn.py", "sizes != self.sizes or", "False or", NN),
    Mutation("tensors of another name are not seen", "nn.py", "keys != self.keys or", "False or", NN),
    Mutation(
        "the cache of parametrisations is used",
        "nn.py",
        "with levels.uncached() if parametrize._cache_enabled else _NOTHING:\n                yield",
        "with _NOTHING:\n                yield",
        NN,
    ),
    Mutation(
        "what is in neither tree is differentiated",
        "nn.py",
        "first.store[first.key].detach() for",
        "first.store[first.key] for",
        NN,
    ),
    Mutation("checkpointing around the loss is silently wrong", "nn.py", "None if again else _INSIDE", "None", NN),
    Mutation("checkpointing is differentiated twice", "nn.py", "_DIFFERENTIATED if differentiated else ", "", NN),
    Mutation("hooks around the loss are refused", "nn.py", "_disable(message, False)", "_disable(message)", NN),
    Mutation(
        "a shared base is stacked", "ensemble.py", "if axis is None and isinstance(leaf, Tensor)", "if False", ENSEMBLE
    ),
    Mutation(
        "what one member does not write is shared",
        "ensemble.py",
        "if len(each) == 1 else None",
        "if True else None",
        ENSEMBLE,
    ),
    Mutation(
        "dataclasses keep the tensors of one chunk",
        "ensemble.py",
        "object.__setattr__(new, name, value)",
        "pass",
        ENSEMBLE,
    ),
    Mutation(
        "checkpointing writes to the buffers twice",
        "nn.py",
        "            if again and after:\n                put(",
        "            if False:\n                put(",
        NN,
    ),
    Mutation(
        "checkpointing runs again with the module's own tensors",
        "nn.py",
        "                yield evaluate\n        finally:",
        "                yield self\n        finally:",
        NN,
    ),
    Mutation(
        "tied tensors are replaced in one place",
        "nn.py",
        "in layout.places[name]:\n",
        "in layout.places[name][:1]:\n",
        NN,
    ),
    Mutation(
        "the tensors of the module do not come back",
        "nn.py",
        "place.store[place.key] = value\n\n    def _now",
        "pass\n\n    def _now",
        NN,
    ),
    Mutation("buffers come out as they went in", "nn.py", "return answer, buffers\n", "return answer, {}\n", NN),
    Mutation(
        "frozen parameters are trained", "nn.py", "named_parameters() if p.requires_grad}", "named_parameters()}", NN
    ),
    Mutation("predictions are made in training mode", "nn.py", "module.training = False", "module.training = True", NN),
    Mutation(
        "shared buffers stay shared under vmap",
        "nn.py",
        "torch.where(always, buffer, buffer)",
        "buffer.clone()",
        BATCHES,
    ),
    Mutation(
        "batch normalisation is differentiated through vmap",
        "nn.py",
        "if not eager and levels.differentiates_vmap() else",
        "if False else",
        HYPER,
    ),
    Mutation(
        "slices count alike, whatever their size", "batches.py", "count * size / whole.size", "count / m", BATCHES
    ),
    Mutation("slices are summed", "batches.py", "x.mean(0) if", "x.sum(0) if", BATCHES),
    Mutation("the first slice is seen twice", "batches.py", "            start += now * each\n", "", BATCHES),
    Mutation(
        "examples that are left over are dropped",
        "batches.py",
        "((longer, size + 1), (m - longer, size))",
        "((m, size),)",
        BATCHES,
    ),
    Mutation("all slices draw the same", "batches.py", 'randomness="different"', 'randomness="same"', BATCHES),
    Mutation(
        "the ascent sees the whole batch", "batches.py", "math.ceil(fraction * whole.size)", "whole.size", BATCHES
    ),
    Mutation(
        "the part is rounded down",
        "batches.py",
        "math.ceil(fraction * whole.size)",
        "int(fraction * whole.size)",
        BATCHES,
    ),
    Mutation(
        "a group moves all leaves",
        "groups.py",
        "grads_fn(group.put(part, params), *args)",
        "grads_fn(params, *args)",
        GROUPS,
    ),
    Mutation("groups ask again at the params", "groups.py", "if _same(here", "if False and _same(here", GROUPS),
    Mutation(
        "groups that have a batch ask again",
        "groups.py",
        "tree.flatten_any((group.of(params), batch))",
        "tree.flatten_any((group.of(params), ()))",
        GROUPS,
    ),
    Mutation(
        "a slice is taken for the batch",
        "groups.py",
        "tree.flatten_any((part, args))[0]",
        "tree.flatten_any((part, batch))[0]",
        GROUPS,
    ),
    Mutation(
        "a mask is inverted",
        "groups.py",
        "{True: inner, False: identity()}",
        "{False: inner, True: identity()}",
        GROUPS,
    ),
    Mutation(
        "freeze freezes the others",
        "groups.py",
        "if on else g for g, on in frozen",
        "if not on else g for g, on in frozen",
        GROUPS,
    ),
    Mutation(
        "every step draws the same",
        "randomness.py",
        "after = _read(state.generators)",
        "after = state.generators",
        RANDOM,
    ),
    Mutation(
        "the generators of the caller go on",
        "randomness.py",
        "    finally:\n        _write(before)",
        "    finally:\n        pass",
        RANDOM,
    ),
    Mutation(
        "evaluations draw independently", "randomness.py", "        _write(generators)\n", "        pass\n", RANDOM
    ),
    Mutation(
        "gradients stay scaled",
        "loss_scale.py",
        "torch.where(finite, 1 / scale, torch.nan)",
        "torch.where(finite, 1.0, torch.nan)",
        SCALING,
    ),
    Mutation(
        "the state moves in a skipped step",
        "loss_scale.py",
        "torch.where(finite, new, old)",
        "torch.where(finite, new, new)",
        SCALING,
    ),
    Mutation(
        "the first pass is not looked at",
        "loss_scale.py",
        "(finite == 1) & tree.all_finite",
        "tree.all_finite",
        SCALING,
    ),
    Mutation(
        "the scale grows one step late",
        "loss_scale.py",
        "(tracker >= growth_interval)",
        "(tracker > growth_interval)",
        SCALING,
    ),
    Mutation(
        "the tracker is not reset by growth", "loss_scale.py", "finite & (tracker < growth_interval)", "finite", SCALING
    ),
    Mutation("the loss is not scaled", "gradients.py", "else loss * self.factor", "else loss", SCALING),
    Mutation(
        "members all start from one seed", "ensemble.py", "_seeded(build, seed) if k else first", "first", ENSEMBLE
    ),
    Mutation("the generator of the caller is used", "ensemble.py", "        torch.manual_seed(seed)\n", "", ENSEMBLE),
    Mutation(
        "all members have one hyperparameter",
        "ensemble.py",
        "made(numbers)._update",
        "made(member(hyper, 0))._update",
        ENSEMBLE,
    ),
    Mutation("logits are averaged", "ensemble.py", "F.log_softmax(logits, -1), 0", "logits, 0", ENSEMBLE),
    Mutation(
        "bins are open on the other side",
        "ensemble.py",
        ".to(confidence.dtype))",
        ".to(confidence.dtype), right=True)",
        ENSEMBLE,
    ),
    Mutation("gaps of all bins cancel", "ensemble.py", ".sum(0).abs().sum()", ".sum(0).sum().abs()", ENSEMBLE),
    Mutation("a member disagrees with itself", "ensemble.py", "(votes * (votes - 1))", "(votes * votes)", ENSEMBLE),
    Mutation(
        "the bootstrap draws without replacement",
        "ensemble.py",
        "torch.randint(examples, (examples,), ",
        "torch.randperm(examples, ",
        ENSEMBLE,
    ),
    Mutation(
        "counters are one entry seen many times",
        "ensemble.py",
        "lambda leaf: leaf.contiguous(), state",
        "lambda leaf: leaf, state",
        ENSEMBLE,
    ),
]

FRONT = ("tests/test_torch_optim.py",)

MUTATIONS += [
    Mutation(
        "the base optimizer steps at the probe",
        "torch_optim/two_step.py",
        "copy(self._values(), self._between.params)",
        "pass",
        FRONT,
    ),
    Mutation(
        "the second pass writes to the buffers",
        "torch_optim/two_step.py",
        "copy([self._buffers()], [self._between.buffers])",
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
        "        self._share()\n        self._state = state_dict",
        "        self._state = state_dict",
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
        "            self.restore()\n        self.zero_grad()\n",
        "            self.restore()\n",
        FRONT,
    ),
    Mutation(
        "a first pass that overflows is used",
        "torch_optim/two_step.py",
        "between.finite is None or between.finite",
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
        "torch_optim/whole.py",
        "copy([self._buffers()], [first[0]])",
        "pass",
        FRONT,
    ),
]


RANKS = ("tests/test_distributed.py",)
FAULTS = ("tests/test_faults.py",)
SHARDED = ("tests/test_sharded.py",)
RESUME = ("tests/test_resume.py",)
FRONT_END = ("tests/test_torch_optim.py",)
FINITE = ("tests/test_finite.py",)

MUTATIONS += [
    Mutation(
        "gradients are summed over ranks", "distributed/average.py", "bucket = bucket / group.size()", "pass", RANKS
    ),
    Mutation("aux stays local", "distributed/average.py", "_Part(found, aux)", '_Part(found, "local")', RANKS),
    Mutation(
        "the last rank is the first", "distributed/average.py", "get_rank(group) == 0", "get_rank(group) == 1", RANKS
    ),
    Mutation(
        "params may differ", "distributed/average.py", '_alike(params, _group("all_reduce_mean", group))', "pass", RANKS
    ),
    Mutation(
        "states upstream stay local",
        "distributed/average.py",
        '_Part(found.states, "mean")',
        '_Part(found.states, "local")',
        RANKS,
    ),
    Mutation(
        "a missing rank is not explained", "distributed/average.py", "except RuntimeError", "except ValueError", FAULTS
    ),
    Mutation(
        "norms are those of a shard",
        "shards.py",
        "return leaf.to_local(), (leaf",
        "return leaf.to_local(), None if dims else (leaf",
        SHARDED,
    ),
    Mutation("copies count twice", "shards.py", "if not placement.is_replicate())", "if True)", SHARDED),
    Mutation(
        "shards are not added up", "shards.py", "value = _all_reduce(value, mesh.get_group(dim))", "pass", SHARDED
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
        "lambda base: _share(me())",
        "lambda base: None",
        FRONT_END,
    ),
    Mutation("a skipped step moves the state", "finite.py", "torch.where(finite, new, old)", "new", FINITE),
    Mutation(
        "a skipped step moves the params",
        "finite.py",
        "tree.where(finite, updates, tree.zeros_like(updates))",
        "updates",
        FINITE,
    ),
    Mutation(
        "skipped steps are counted wrongly", "finite.py", "state.skipped + ~finite", "state.skipped + finite", FINITE
    ),
    Mutation(
        "every average is over all ranks", "distributed/average.py", "group = group.get_group()", "group = None", RANKS
    ),
]


PLANE = ("tests/test_landscape.py",)
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
    Mutation("both directions are one", "landscape.py", "return first, second", "return first, first", PLANE),
    Mutation(
        "directions are drawn in the precision of the params",
        "landscape.py",
        "else torch.float32\n        return",
        "else leaf.dtype\n        return",
        PLANE,
    ),
    Mutation("a grid is transposed", "landscape.py", ".view(len(up), len(across))", ".view(len(across), -1).T", PLANE),
    Mutation(
        "a line is as exact as its difference",
        "landscape.py",
        "tree.add(tree.scale(1 - t, start), tree.scale(t, end))",
        "tree.add(start, tree.scale(t, tree.map(torch.sub, end, start)))",
        PLANE,
    ),
    Mutation("a graph grows with every point", "landscape.py", "with torch.no_grad():", "if True:", PLANE),
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


MEASURES = ("tests/test_measures.py",)

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
    Mutation("measures grow a graph", "measures/support.py", "torch.no_grad() if", "nullcontext() if", MEASURES),
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
    Mutation("variance in the place of deviation", "studies/problem.py", "mean**2).sqrt()", "mean**2)", COMPARE),
    Mutation(
        "training is not smoothed",
        "studies/training.py",
        "kind, smoothing = problem.noisy.device.type, problem.label_smoothing",
        "kind, smoothing = problem.noisy.device.type, 0.0",
        COMPARE,
    ),
    Mutation(
        "weights do not decay",
        "studies/optimizers.py",
        '"weight_decay": weight_decay}',
        '"weight_decay": 0.0}',
        COMPARE,
    ),
    Mutation(
        "every member has the labels of the first",
        "studies/training.py",
        "            problem.noisy[k],",
        "            problem.noisy[0],",
        COMPARE,
    ),
    Mutation(
        "every member is augmented as the first", "studies/training.py", "numbers[:, k] if", "numbers[:, 0] if", COMPARE
    ),
    Mutation(
        "every epoch is the first",
        "studies/training.py",
        "_parts(run, problem, run.epoch,",
        "_parts(run, problem, 0,",
        COMPARE,
    ),
    Mutation(
        "batches do not share the loss fairly", "studies/judging.py", "len(labels) / len(y)", "1 / len(parts)", COMPARE
    ),
    Mutation("dogs stay dogs", "studies/data.py", "3: 5, 5: 3}", "3: 5}", COMPARE),
    Mutation(
        "subsets are not stratified",
        "studies/data.py",
        'mixed[np.argsort(turn, kind="stable")[:size]]',
        "mixed[:size]",
        COMPARE,
    ),
    Mutation(
        "sweeps read the first value",
        "studies/finished.py",
        "if values > 1 else 0",
        "if values > 9 else 0",
        ("tests/test_finished.py",),
    ),
    Mutation(
        "unfinished is finished",
        "studies/finished.py",
        "run.epoch < settings.epochs",
        "run.epoch < 0",
        ("tests/test_finished.py",),
    ),
    Mutation(
        "ranks: members stay in the order of the processes",
        "studies/comparison.py",
        "torch.tensor(members).argsort()",
        "torch.arange(len(members))",
        RANKS,
    ),
    Mutation("ranks: all report", "studies/comparison.py", "if not self.ranks.first:", "if False:", RANKS),
    Mutation("ranks: all show bars", "studies/app.py", "quiet=not team.first", "quiet=False", RANKS),
    Mutation("ranks: all must hear a signal", "studies/ranks.py", "ReduceOp.MAX", "ReduceOp.MIN", RANKS),
    Mutation("ranks: the time of the quickest", "studies/training.py", ".amax(0)", ".amin(0)", RANKS),
    Mutation(
        "ranks: labels of the first seeds", "studies/problem.py", "self.noisy[own]", "self.noisy[: len(own)]", RANKS
    ),
    Mutation(
        "ranks: batches of the first seeds", "studies/problem.py", "self.seeds[k] for k", "self.seeds[0] for k", RANKS
    ),
    Mutation("ranks: first swept values", "studies/problem.py", "values[own] for", "values[: len(own)] for", RANKS),
    Mutation("ranks: more than seeds", "studies/ranks.py", "if seeds < count", "if seeds < 1", RANKS),
    Mutation("ranks: all complain", "cli.py", "time.sleep(TURN)", "time.sleep(0)", RANKS),
]


def survives(mutation: Mutation) -> bool:
    """Tells whether all tests pass on the mutated copy.

    Raises:
        ValueError: If the library no longer has the text, or nothing can be imported without it.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        path = copy / "funcsam" / mutation.file
        text = path.read_text()
        if mutation.old not in text:
            raise ValueError(f"mutations: `old` of {mutation.name!r} must occur in {mutation.file}, got nothing.")
        path.write_text(text.replace(mutation.old, mutation.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-m",
            "not compile and not parity",
            *(mutation.tests or TESTS),
        ]
        environment = {**os.environ, "PYTHONPATH": str(copy), "HYPOTHESIS_PROFILE": "dev"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        by = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
        if done.returncode and not by:
            raise ValueError(
                f"mutations: {mutation.name!r} must leave the library importable, got {done.stdout[-500:]}"
            )
        print(f"{'killed' if by else 'alive '}  {mutation.name}  {' '.join(by)}", flush=True)
        return not by


def main() -> None:
    """Runs the mutations that contain one of the words, or all, and exits with the number of survivors."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    alive = [mutation.name for mutation in chosen if survives(mutation)]
    print(f"{len(alive)} of {len(chosen)} alive: {alive}")
    sys.exit(len(alive))


if __name__ == "__main__":
    main()
