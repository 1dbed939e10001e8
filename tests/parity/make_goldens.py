"""Writes goldens.json: what optax says, with its version and the date. `python -m tests.parity.make_goldens`.

The problem is `L = sum_i c_i (w_i - t_i)^2 / 2 + (sum_i w_i)^3 / 30` on two leaves, `a` of shape (3,) and `b` of
shape (), from a fixed start, in float64. Conventions: optax's SAM is `contrib.sam` in opaque mode with an adversarial
optimizer `chain(normalize(), sgd(rho))` and `sync_period=2`; its norm has no guard at zero.
"""

import datetime
import json
import pathlib

GOLDENS = pathlib.Path(__file__).with_name("goldens.json")
STEPS = 4
START = {"a": [1.0, -2.0, 0.5], "b": 1.5}
CURVATURES, TARGETS = {"a": [1.0, 0.5, 2.0], "b": 3.0}, {"a": [0.0, 1.0, -1.0], "b": 0.25}


def trajectories():
    """Params after each step, by name of the optimizer."""
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)
    start, curvatures, targets = (
        {name: jnp.asarray(x, jnp.float64) for name, x in tree.items()} for tree in (START, CURVATURES, TARGETS)
    )

    def loss(params, step=None):
        bowls = jax.tree.map(lambda w, c, t: (c * (w - t) ** 2).sum() / 2, params, curvatures, targets)
        return bowls["a"] + bowls["b"] + (params["a"].sum() + params["b"]) ** 3 / 30

    def sam(rho, base):
        adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
        return optax.contrib.sam(base, adversary, sync_period=2, opaque_mode=True)

    optimizers = {
        "sgd": optax.sgd(0.1),
        "sgd_momentum": optax.sgd(0.1, momentum=0.9),
        "sgd_nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
        "adam": optax.adam(0.1),
        "adamw": optax.adamw(0.1, weight_decay=0.1),
        "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        "sam": sam(0.3, optax.sgd(0.1)),
        "sam_momentum": sam(0.3, optax.sgd(0.1, momentum=0.9)),
        "sam_adamw": sam(0.3, optax.adamw(0.1, weight_decay=0.1)),
    }
    answers = {}
    for name, optimizer in optimizers.items():
        params, state, answers[name] = start, optimizer.init(start), []
        more = {"grad_fn": jax.grad(loss)} if name.startswith("sam") else {}
        for _ in range(STEPS):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params, **more)
            params = optax.apply_updates(params, updates)
            answers[name].append(jax.tree.map(lambda w: w.tolist(), params))
    return answers


def main():
    """Writes the file."""
    import jax
    import optax

    versions = {"optax": optax.__version__, "jax": jax.__version__, "date": datetime.date.today().isoformat()}
    GOLDENS.write_text(json.dumps({"made_with": versions, "trajectories": trajectories()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
