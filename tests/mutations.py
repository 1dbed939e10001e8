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
    """One replacement of a text that occurs in a file."""

    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "ascent goes down",
        "family/sam.py",
        "chain(normalize(), scale(rho))",
        "chain(normalize(), scale(rho), scale(-1))",
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
    Mutation("masks are inverted", "tree.py", "chosen = [mask(path, leaf)", "chosen = [not mask(path, leaf)"),
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
        "lambda x: x.detach() if isinstance(x, Tensor) else x, aux",
        "lambda x: x, aux",
    ),
    Mutation("unused leaves have no gradient", "gradients.py", ", materialize_grads=True", ", allow_unused=True"),
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
            *TESTS,
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
