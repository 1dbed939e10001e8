"""Every error message, matched by its text: where, what, the condition, what came instead, at which path."""

import math
import re

import pytest
import torch

import funcsam as fs
from funcsam.core import checks

W = torch.tensor([1.0, 2.0])
PARAMS = {"w": W, "b": torch.tensor(0.5)}
GRADS_FN = fs.grad_and_value(lambda params: sum((leaf**2).sum() for leaf in params.values()))

NONNEGATIVE = {
    "sam: `rho`": lambda x: fs.sam(x),
    "asam: `rho`": lambda x: fs.asam(x),
    "asam: `eta`": lambda x: fs.asam(eta=x),
    "gsam: `rho`": lambda x: fs.gsam(x),
    "gsam: `alpha`": lambda x: fs.gsam(alpha=x),
    "looksam: `rho`": lambda x: fs.looksam(x),
    "looksam: `alpha`": lambda x: fs.looksam(alpha=x),
    "msam: `rho`": lambda x: fs.msam(x),
    "scale_by_magnitude: `eta`": lambda x: fs.scale_by_magnitude(x),
    "scale_by_learning_rate: `lr`": lambda x: fs.scale_by_learning_rate(x),
    "add_decayed_weights: `weight_decay`": lambda x: fs.add_decayed_weights(x),
    "scale_by_adam: `eps`": lambda x: fs.scale_by_adam(eps=x),
    "sgd: `lr`": lambda x: fs.sgd(x),
    "sgd: `weight_decay`": lambda x: fs.sgd(weight_decay=x),
    "adam: `lr`": lambda x: fs.adam(x),
    "adam: `eps`": lambda x: fs.adam(eps=x),
    "adam: `weight_decay`": lambda x: fs.adam(weight_decay=x),
    "adamw: `lr`": lambda x: fs.adamw(x),
    "adamw: `eps`": lambda x: fs.adamw(eps=x),
    "adamw: `weight_decay`": lambda x: fs.adamw(weight_decay=x),
    "step_decay: `value`": lambda x: fs.step_decay(x, 10),
    "step_decay: `factor`": lambda x: fs.step_decay(1.0, 10, x),
    "cosine: `value`": lambda x: fs.cosine(x, 10),
    "cosine: `end`": lambda x: fs.cosine(1.0, 10, x),
    "warmup_cosine: `value`": lambda x: fs.warmup_cosine(x, 1, 10),
    "warmup_cosine: `end`": lambda x: fs.warmup_cosine(1.0, 1, 10, x),
}
FRACTION = {
    "scale_by_adam: `b1`": lambda x: fs.scale_by_adam(x),
    "scale_by_adam: `b2`": lambda x: fs.scale_by_adam(b2=x),
}
SHARE = {
    "trace: `decay`": lambda x: fs.trace(x),
    "trace: `dampening`": lambda x: fs.trace(dampening=x),
    "sgd: `momentum`": lambda x: fs.sgd(momentum=x),
    "msam: `momentum`": lambda x: fs.msam(momentum=x),
    "sgd: `dampening`": lambda x: fs.sgd(dampening=x),
}
BETAS = {
    "adam: `betas`": lambda x: fs.adam(betas=x),
    "adamw: `betas`": lambda x: fs.adamw(betas=x),
}
POSITIVE = {"clip_by_global_norm: `max_norm`": lambda x: fs.clip_by_global_norm(x)}
FINITE = {"scale: `factor`": lambda x: fs.scale(x), "constant: `value`": lambda x: fs.constant(x)}
COUNT = {
    "step_decay: `total_steps`": lambda x: fs.step_decay(1.0, x),
    "cosine: `total_steps`": lambda x: fs.cosine(1.0, x),
    "warmup_cosine: `total_steps`": lambda x: fs.warmup_cosine(1.0, 1, x),
    "warmup_cosine: `warmup_steps`": lambda x: fs.warmup_cosine(1.0, x, 10),
    "sharpness_aware: `steps`": lambda x: fs.sharpness_aware(fs.identity(), steps=x),
    "looksam: `k`": lambda x: fs.looksam(k=x),
}


def refuses(error, text):
    """Expects this error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


CASES = [
    *(
        (name, make, bad, "finite and non-negative")
        for name, make in NONNEGATIVE.items()
        for bad in (-1, math.nan, math.inf)
    ),
    *(
        (name, make, bad, "finite and positive")
        for name, make in POSITIVE.items()
        for bad in (-1, 0, math.nan, math.inf)
    ),
    *((name, make, bad, "in [0, 1)") for name, make in FRACTION.items() for bad in (-0.1, 1, 1.5, math.nan, math.inf)),
    *((name, make, bad, "in [0, 1]") for name, make in SHARE.items() for bad in (-0.1, 1.01, math.nan, math.inf)),
    *((name, make, bad, "finite") for name, make in FINITE.items() for bad in (math.nan, math.inf, -math.inf)),
]


@pytest.mark.parametrize(("name", "make", "bad", "condition"), CASES, ids=[f"{c[0]} {c[2]}" for c in CASES])
def test_bad_numbers_are_refused(name, make, bad, condition):
    """With their name, their range and their value."""
    with refuses(ValueError, f"{name} must be {condition}, got {bad}."):
        make(bad)


@pytest.mark.parametrize("bad", [-0.1, 1, math.nan])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("name", BETAS)
def test_bad_betas_are_refused(name, position, bad):
    """With their position."""
    betas = [0.9, 0.9]
    betas[position] = bad
    with refuses(ValueError, f"{name} must be in [0, 1), got {bad} at [{position}]."):
        BETAS[name](tuple(betas))


@pytest.mark.parametrize("name", COUNT)
def test_bad_counts_are_refused(name):
    """Counts are whole numbers from 1."""
    with refuses(ValueError, f"{name} must be at least 1, got 0."):
        COUNT[name](0)
    for bad, kind in ((1.5, "float"), (True, "bool"), ("2", "str")):
        with refuses(TypeError, f"{name} must be a whole number, got {kind}."):
            COUNT[name](bad)


ALL = {**NONNEGATIVE, **FRACTION, **SHARE, **POSITIVE, **FINITE}


@pytest.mark.parametrize("name", ALL)
def test_hyperparameters_are_numbers(name):
    """Neither text nor truth nor None nor a vector, nor a complex number."""
    must = f"{name} must be a number, a tensor of shape () or a schedule, got"
    for bad, kind in (("0.1", "str"), (True, "bool"), (None, "NoneType"), (1j, "complex")):
        with pytest.raises(TypeError, match=f"^{re.escape(must)} ({kind}|None)\\.$"):
            ALL[name](bad)
    with refuses(ValueError, f"{name} must be a real tensor of shape (), got torch.float32 of shape (2,)."):
        ALL[name](W)
    with refuses(ValueError, f"{name} must be a real tensor of shape (), got torch.complex64 of shape ()."):
        ALL[name](torch.tensor(1j))


def test_a_prefix_is_checked_leaf_by_leaf():
    """The path of the leaf is in the text."""
    with refuses(ValueError, "sam: `rho` must be finite and non-negative, got -1 at ['b']."):
        fs.sam({"w": 0.1, "b": -1})
    with refuses(TypeError, "sam: `rho` must be a number, a tensor of shape () or a schedule, got str at ['b'][1]."):
        fs.sam({"w": 0.1, "b": [0.1, "x"]})
    must = "sam: `rho` must be a real tensor of shape (), got torch.float32 of shape (2,) at ['w']."
    with refuses(ValueError, must):
        fs.sam({"w": W})


def test_a_prefix_must_fit():
    """A prefix for other params is refused, with its text."""
    tx = fs.scale({"w": 1.0, "c": 2.0})
    with pytest.raises(ValueError, match=r"^tree: a prefix tree must match the structure of `params`, got "):
        tx.update(PARAMS, GRADS_FN, tx.init(PARAMS))


def test_a_mask_holds_booleans():
    """A number is not a yes."""
    tx = fs.add_decayed_weights(0.1, mask={"w": True, "b": 1})
    with refuses(TypeError, "tree: a `mask` must hold booleans, got int at ['b']."):
        tx.update(PARAMS, GRADS_FN, tx.init(PARAMS))


def test_nesterov():
    """Nesterov goes without dampening, and with momentum."""
    with refuses(ValueError, "trace: `dampening` must be 0 with `nesterov`, got 0.1."):
        fs.trace(dampening=0.1, nesterov=True)
    must = "sgd: `nesterov` must come with momentum and without dampening, got momentum"
    with refuses(ValueError, f"{must} 0.0 and dampening 0.0."):
        fs.sgd(nesterov=True)
    with refuses(ValueError, f"{must} 0.9 and dampening 0.1."):
        fs.sgd(momentum=0.9, dampening=0.1, nesterov=True)


def test_step_decay_milestones():
    """Milestones are fractions of the run."""
    for bad in (-0.1, 1.5):
        with refuses(ValueError, f"step_decay: `milestones` must be in [0, 1], got {bad}."):
            fs.step_decay(1.0, 10, milestones=[0.5, bad])


def test_warmup_is_part_of_the_run():
    """And shorter than it."""
    must = "warmup_cosine: `warmup_steps` must be less than `total_steps` (10), got 10."
    with refuses(ValueError, must):
        fs.warmup_cosine(1.0, 10, 10)


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: fs.Transform(1, lambda: 0), "Transform: `init`"),
        (lambda: fs.Transform(lambda: 0, 1), "Transform: `update`"),
        (lambda: fs.lift(1, lambda: 0), "lift: `init`"),
        (lambda: fs.lift(lambda: 0, 1), "lift: `update`"),
        (lambda: fs.grad_and_value(1), "grad_and_value: `loss_fn`"),
        (lambda: fs.sharpness_aware(fs.identity(), combine=1), "sharpness_aware: `combine`"),
        (lambda: fs.sharpness_aware(fs.identity(), when=1), "sharpness_aware: `when`"),
        (lambda: fs.sam().update(W, 1, fs.sam().init(W)), "update: `grads_fn`"),
    ],
)
def test_functions_are_functions(make, where):
    """What is called can be called."""
    with refuses(TypeError, f"{where} must be a function, got int."):
        make()


def test_transforms_are_transforms():
    """In a chain, with the position, and as the ascent."""
    with refuses(TypeError, "chain: `transforms` must be Transforms, got float at position 1."):
        fs.chain(fs.sam(), 0.1)
    with refuses(TypeError, "sharpness_aware: `ascent` must be a Transform, got float."):
        fs.sharpness_aware(0.1)


def test_params_are_tensors():
    """Floating-point or complex ones."""
    for bad, kind in ((1.0, "float"), (None, "NoneType")):
        with refuses(TypeError, f"init: `params` must hold tensors only, got {kind} at ['b'][0]."):
            fs.sam().init({"w": W, "b": [bad]})
    must = "init: `params` must hold floating-point or complex tensors, got torch.int64 at ['b']."
    with refuses(TypeError, f"{must} Pass what is not trained through the batch."):
        fs.sam().init({"w": W, "b": torch.tensor(1)})
    with refuses(TypeError, "init: `params` must hold tensors only, got float."):
        fs.sam().init(1.0)


def grads(answer):
    """One update with this answer of `grads_fn`."""
    tx = fs.sam()
    return tx.update(PARAMS, lambda params: (answer, ()), tx.init(PARAMS))


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        ({"w": W}, ValueError, "the structure of `params`, got no leaf at ['b']."),
        ({"w": [W], "b": W}, ValueError, "the structure of `params`, got no leaf at ['w']."),
        ({**PARAMS, "c": W}, ValueError, "the structure of `params`, got a leaf too many at ['c']."),
        ({**PARAMS, "w": W[:1]}, ValueError, "the shapes of `params`, got (1,) for (2,) at ['w']."),
    ],
)
def test_gradients_fit_the_params(answer, error, text):
    """The path of the first leaf that differs is in the text."""
    with refuses(error, f"update: `grads` must have {text}"):
        grads(answer)


def test_gradients_are_tensors():
    """Neither numbers nor something else."""
    with refuses(TypeError, "update: `grads` must hold tensors only, got float at ['w']."):
        grads({**PARAMS, "w": 1.0})


def test_structures_that_differ_in_their_nodes_only():
    """A list is not a tuple; the paths are the same, so the structures are in the text."""
    tx = fs.identity()
    with pytest.raises(
        ValueError, match=r"must have the structure of `params`, got PyTreeSpec\(\(.* for PyTreeSpec\(\["
    ):
        tx.update([W, W], lambda params: ((W, W), ()), ())


@pytest.mark.parametrize(
    ("answer", "kind"), [(None, "NoneType"), ({"w": W, "b": W, "c": W}, "dict"), ((W, W, W), "tuple")]
)
def test_what_a_grads_fn_returns(answer, kind):
    """Neither a pair nor gradients."""
    must = "update: `grads_fn` must return `(grads, aux)`, or `grads` with the structure of `params`, got "
    tx = fs.sgd()
    with pytest.raises(TypeError, match=f"^{re.escape(must)}{kind} PyTreeSpec"):
        tx.update(PARAMS, lambda params: answer, tx.init(PARAMS))


def test_updates_fit_the_params():
    """At `apply_updates` too."""
    with refuses(ValueError, "apply_updates: `updates` must have the structure of `params`, got no leaf at ['b']."):
        fs.apply_updates(PARAMS, {"w": W})
    with refuses(ValueError, "apply_updates: `updates` must have the shapes of `params`, got () for (2,) at ['w']."):
        fs.apply_updates(PARAMS, {"w": torch.tensor(1.0), "b": torch.tensor(1.0)})


def test_the_state_of_a_chain():
    """One state per transform."""
    tx = fs.chain(fs.sam(), fs.sgd())
    must = "chain: `state` must be a tuple of 2 states, one per transform, got"
    for bad, got in (((), "0 states"), (None, "NoneType")):
        with refuses(ValueError, f"{must} {got}. Make it with `init`."):
            tx.update(PARAMS, GRADS_FN, bad)


@pytest.mark.parametrize("tx", [fs.trace(), fs.scale_by_adam()])
def test_the_state_of_other_params(tx):
    """A state from other params is refused."""
    with refuses(ValueError, "step: `state` must have the structure of `params`, got no leaf at ['b']."):
        tx.update(PARAMS, GRADS_FN, tx.init({"w": W}))
    with refuses(ValueError, "step: `state` must have the shapes of `params`, got (1,) for (2,) at ['w']."):
        tx.update(PARAMS, GRADS_FN, tx.init({"w": W[:1], "b": PARAMS["b"]}))


def test_backends():
    """There are three."""
    with refuses(ValueError, 'grad_and_value: `backend` must be "auto", "func" or "autograd", got \'jax\'.'):
        fs.grad_and_value(lambda w: w, backend="jax")
    with refuses(ValueError, 'grad_and_value: `backend` must be "auto", "func" or "autograd", got [\'func\'].'):
        fs.grad_and_value(lambda w: w, backend=["func"])


def test_the_autograd_backend_under_func():
    """It would differentiate the wrong thing."""
    grads_fn = fs.grad_and_value(lambda w: w.sum(), backend="autograd")
    must = 'grad_and_value: the "autograd" backend does not work under `torch.func` transforms.'
    with refuses(RuntimeError, f'{must} Set `backend` to "auto" or "func".'):
        torch.vmap(grads_fn)(W)


@pytest.mark.parametrize("backend", ["func", "autograd"])
@pytest.mark.parametrize(
    ("answer", "has_aux", "got"),
    [
        (lambda w: w * 2, False, "the loss must be a real tensor of shape (), got torch.float32 of shape (2,)."),
        (lambda w: 1.0, False, "the loss must be a real tensor of shape (), got float."),
        (
            lambda w: (w.sum(), w),
            False,
            "the loss must be a real tensor of shape (), got tuple. If it returns `(loss, aux)`, set `has_aux`.",
        ),
        (
            lambda w: (1j * w).sum(),
            False,
            "the loss must be a real tensor of shape (), got torch.complex64 of shape ().",
        ),
        (lambda w: w.sum(), True, "with `has_aux` `loss_fn` must return `(loss, aux)`, got Tensor."),
        (lambda w: (w, w), True, "the loss must be a real tensor of shape (), got torch.float32 of shape (2,)."),
    ],
)
def test_what_a_loss_returns(answer, has_aux, got, backend):
    """A real tensor of shape (), or a pair."""
    with refuses(TypeError, f"grad_and_value: {got}"):
        fs.grad_and_value(answer, has_aux=has_aux, backend=backend)(W)


def test_sam_update_with_the_other_state():
    """The state of `sam` is not that of `asam`."""
    with pytest.raises(ValueError, match=r"^chain: `state` must be a tuple of 4 states"):
        fs.sam_update(PARAMS, GRADS_FN, fs.sam().init(PARAMS), adaptive=True)


ARITHMETIC = {
    "add": fs.tree.add,
    "add_scaled": lambda x, y: fs.tree.add_scaled(x, 2.0, y),
    "divide": fs.tree.divide,
    "dot": fs.tree.dot,
    "lerp": lambda x, y: fs.tree.lerp(x, y, 0.5),
    "map": lambda x, y: fs.tree.map(torch.add, x, y),
    "maximum": fs.tree.maximum,
    "multiply": fs.tree.multiply,
    "reject": fs.tree.reject,
    "where": lambda x, y: fs.tree.where(torch.tensor(True), x, y),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_trees_of_other_structure(name):
    """Arithmetic on two trees does not broadcast one over the other."""
    with refuses(ValueError, f"{name}: `y` must have the structure of `x`, got no leaf at ['b']."):
        ARITHMETIC[name](PARAMS, {"w": W})
    with refuses(ValueError, f"{name}: `y` must have the shapes of `x`, got (1,) for (2,) at ['w']."):
        ARITHMETIC[name](PARAMS, {"w": W[:1], "b": W[0]})


def test_paths():
    """Paths are Python code."""
    assert checks.paths({"w": [W, (W,)]}) == ["['w'][0]", "['w'][1][0]"]


@pytest.mark.parametrize("backend", ["func", "autograd"])
@pytest.mark.parametrize(("aux", "got"), [("x", "str"), (None, "NoneType"), (0.5, "float")])
def test_aux_holds_tensors(backend, aux, got):
    """Whatever the backend, so that what runs in eager code runs under `vmap` too."""
    grads_fn = fs.grad_and_value(lambda w: (w**2, {"name": aux}), has_aux=True, backend=backend)
    with refuses(TypeError, f"grad_and_value: `aux` must hold tensors only, got {got} at ['name']."):
        grads_fn(torch.tensor(2.0))
