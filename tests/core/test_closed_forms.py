"""The primary references: quadratics, and the papers' algorithms on a flat vector in the papers' notation."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import funcsam as fs
from tests.asserts import close, equal
from tests.strategies import Problem, flat, positives, problems, reals, run, tensors, unflat


def symmetric(size):
    """Matrices `A = B + B'`."""
    return arrays(np.float64, (size, size), elements=reals).map(lambda b: torch.tensor(b + b.T))


@given(A=symmetric(3), w=tensors((3,)), rho=positives)
def test_quadratic(A, w, rho):
    """On `w'Aw / 2` the SAM gradient is `Aw + rho A^2 w / ||Aw||`."""
    g = A @ w
    assume(g.norm() > 1e-3)
    tx = fs.sam(rho)
    updates, _, _ = tx.update(w, fs.grad_and_value(lambda w: 0.5 * w @ A @ w), tx.init(w))
    close(updates, g + rho * A @ g / g.norm())


@given(A=symmetric(3), w=tensors((3,)), rho=positives, eta=positives)
def test_quadratic_asam(A, w, rho, eta):
    """With `T = |w| + eta`: `Aw + rho A T^2 A w / ||T A w||`."""
    g, T = A @ w, w.abs() + eta
    assume((T * g).norm() > 1e-3)
    tx = fs.asam(rho, eta=eta)
    updates, _, _ = tx.update(w, fs.grad_and_value(lambda w: 0.5 * w @ A @ w), tx.init(w))
    close(updates, g + rho * A @ (T**2 * g) / (T * g).norm())


@given(w0=st.floats(0.5, 4), rho=st.floats(0.01, 0.25), lr=st.floats(0.01, 0.1))
def test_a_run_on_a_parabola(w0, rho, lr):
    """On `w^2 / 2` from a positive `w`: `w <- w - lr (w + rho)` as long as `w` is positive."""
    problem = Problem(torch.tensor(w0, dtype=torch.float64), lambda w: 0.5 * w**2)
    wanted = w0
    for _ in range(3):
        wanted -= lr * (wanted + rho)
    close(run(fs.chain(fs.sam(rho), fs.sgd(lr)), problem, 3)[0], torch.tensor(wanted, dtype=torch.float64))


def foret(L, w, rho, eta, mu, weight_decay, steps):
    """Foret et al., 2021, algorithm 1, with SGD of learning rate `eta`, momentum `mu` and weight decay."""
    v = torch.zeros_like(w)
    for _ in range(steps):
        g = torch.func.grad(L)(w)
        eps = rho * g / g.norm()  # equation 2 with p = 2
        g = torch.func.grad(L)(w + eps) + weight_decay * w
        v = mu * v + g
        w = w - eta * v
    return w


def kwon(L, w, rho, eta, alpha, mu, steps):
    """Kwon et al., 2021, algorithm 1: `T_w = diag(|w| + eta)`, learning rate `alpha`, momentum `mu`."""
    v = torch.zeros_like(w)
    for _ in range(steps):
        T, g = w.abs() + eta, torch.func.grad(L)(w)
        eps = rho * T**2 * g / (T * g).norm()
        v = mu * v + torch.func.grad(L)(w + eps)
        w = w - alpha * v
    return w


def vector(problem):
    """The loss of a flat vector."""
    return lambda w: problem.loss(unflat(w, problem.params))


@given(problem=problems(), rho=positives, mu=st.floats(0.1, 0.9), decay=st.floats(0.01, 0.1))
def test_foret(problem, rho, mu, decay):
    """Three steps of SAM with momentum and weight decay."""
    w = flat(problem.params)
    wanted = foret(vector(problem), w, rho, 0.01, mu, decay, 3)
    assume(wanted.isfinite().all() and flat(problem.grads).norm() > 1e-2)
    tx = fs.chain(fs.sam(rho), fs.sgd(0.01, momentum=mu, weight_decay=decay))
    close(flat(run(tx, problem, 3)[0]), wanted, rtol=1e-6)


@given(problem=problems(), rho=positives, eta=positives, mu=st.floats(0.1, 0.9))
def test_kwon(problem, rho, eta, mu):
    """Three steps of ASAM with momentum."""
    w = flat(problem.params)
    wanted = kwon(vector(problem), w, rho, eta, 0.01, mu, 3)
    assume(wanted.isfinite().all() and flat(problem.grads).norm() > 1e-2)
    tx = fs.chain(fs.asam(rho, eta=eta), fs.sgd(0.01, momentum=mu))
    close(flat(run(tx, problem, 3)[0]), wanted, rtol=1e-6)


def test_the_authors_asam():
    """`eta = 0.01` for weights, `T = 1` elsewhere, by hand: `w = 2, b = 3`, `L = w + 2 b^2 / 2`."""
    params = {"weight": torch.tensor(2.0, dtype=torch.float64), "bias": torch.tensor(3.0, dtype=torch.float64)}
    tx = fs.asam(0.5, eta=0.01, mask=lambda path, leaf: "weight" in path[-1])
    grads_fn = fs.grad_and_value(lambda p: p["weight"] ** 2 + p["bias"] ** 2)
    updates, _, _ = tx.update(params, grads_fn, tx.init(params))
    norm = ((2.01 * 4) ** 2 + 6**2) ** 0.5
    wanted = {"weight": 2 * (2 + 0.5 * 2.01**2 * 4 / norm), "bias": 2 * (3 + 0.5 * 6 / norm)}
    close(updates, {name: torch.tensor(value, dtype=torch.float64) for name, value in wanted.items()})


def test_norms_are_global():
    """Gradients 3 and 4 in two leaves have norm 5."""
    params = {"a": torch.tensor(0.0), "b": torch.tensor(0.0)}
    grads = {"a": torch.tensor(3.0), "b": torch.tensor(4.0)}
    updates, _, _ = fs.normalize().update(params, lambda params: grads, ())
    close(updates, {"a": torch.tensor(0.6), "b": torch.tensor(0.8)}, rtol=1e-6)


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda path, leaf: path == ("w",)], ids=["tree", "function"])
@pytest.mark.parametrize("decay", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_weights_decay_where_the_mask_says(mask, decay):
    """`g + decay w` there and `g` elsewhere; of AdamW the updates there are longer by `lr decay w`."""
    params = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([3.0, 4.0])}
    grads = {"w": torch.tensor([10.0, 20.0]), "b": torch.tensor([30.0, 40.0])}

    def update(tx):
        return tx.update(params, lambda params: grads, tx.init(params))[0]

    equal(update(fs.add_decayed_weights(decay, mask)), {"w": torch.tensor([10.5, 19.0]), "b": grads["b"]})
    plain, decayed = update(fs.adamw(0.25, weight_decay=0.0)), update(fs.adamw(0.25, weight_decay=decay, mask=mask))
    close(decayed, {"w": plain["w"] - 0.125 * params["w"], "b": plain["b"]}, rtol=1e-6)


@pytest.mark.parametrize(
    ("tx", "wanted"),
    [
        (fs.sam(), 1 + 0.05),  # on a parabola at w > 0 the ascent is rho, and rho w for asam
        (fs.asam(), 1 + 2.0),
        (fs.trace(), 1 + 0.9),  # the second step
        (fs.sharpness_aware(fs.scale(0.25)), 1 + 0.25),
    ],
    ids=["sam", "asam", "trace", "sharpness_aware"],
)
def test_numbers_that_are_not_given(tx, wanted):
    """They are those of the papers and of the docstrings."""
    w, gradient = torch.tensor(1.0, dtype=torch.float64), lambda w: w
    updates, state, _ = tx.update(w, gradient, tx.init(w))
    updates = tx.update(w, gradient, state)[0]
    close(updates, torch.tensor(wanted, dtype=torch.float64))
    for adaptive, rho in ((False, 0.05), (True, 0.05)):
        made = fs.asam(rho) if adaptive else fs.sam(rho)
        found = fs.sam_update(2 * w, gradient, made.init(w), adaptive=adaptive)[0]
        close(found, 2 * w + rho * (2 if adaptive else 1))
