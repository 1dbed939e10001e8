"""The members of the family against their papers: the algorithms on a flat vector in the papers' notation."""

import optree
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import funcsam as fs
from tests.asserts import close, equal
from tests.strategies import LOSSES, Problem, flat, positives, problems, run, spied, structural, unflat

alphas = st.floats(0.1, 1)


def vector(problem):
    """The loss of a flat vector."""
    return lambda w: problem.loss(unflat(w, problem.params))


def alike(problem, tx, paper, rho, *numbers):
    """Asserts that steps of SGD are those of the paper, where no gradient that is divided by is near zero."""
    w, points = flat(problem.params), []

    def grad(w):
        points.append(torch.func.grad(vector(problem))(w))
        return points[-1]

    wanted = paper(grad, w, rho, 0.01, *numbers)
    assume(all(g.norm() > 1e-2 for g in points))
    close(flat(run(tx, problem, 5)[0]), wanted, rtol=1e-6)


def zhuang(grad, w, rho, eta, alpha):
    """Zhuang et al., 2022, algorithm 1, with a constant learning rate `eta`, so that `rho_t = rho`."""
    for _ in range(5):
        f = grad(w)
        delta = rho * f / f.norm()
        f_p = grad(w + delta)
        f_par = (f @ f_p) / (f_p @ f_p) * f_p
        f_perp = f - f_par
        w = w - eta * (f_p - alpha * f_perp)
    return w


@given(problem=problems(), rho=positives, alpha=alphas)
def test_gsam_is_that_of_the_paper(problem, rho, alpha):
    alike(problem, fs.chain(fs.gsam(rho, alpha), fs.sgd(0.01)), zhuang, rho, alpha)


def liu(grad, w, rho, eta, alpha, k):
    """Liu et al., 2022, algorithm 1. In one dimension, or along an eigenvector, `g_v` is zero."""
    for t in range(5):
        g = grad(w)
        if t % k == 0:
            g_s = grad(w + rho * g / g.norm())
            cos = (g @ g_s) / (g.norm() * g_s.norm())
            g_h = g_s.norm() * cos * g / g.norm()
            g_v = g_s - g_h
            if g_v.norm() < 1e-12 * g_s.norm():
                g_v = torch.zeros_like(g)
            assume(g_v.norm() == 0 or g_v.norm() > 1e-4 * g_s.norm())
        else:
            g_s = g + alpha * g.norm() / g_v.norm() * g_v if g_v.norm() > 0 else g
        w = w - eta * g_s
    return w


@given(problem=problems(), rho=positives, alpha=alphas, k=st.integers(1, 5))
def test_looksam_is_that_of_the_paper(problem, rho, alpha, k):
    alike(problem, fs.chain(fs.looksam(rho, alpha, k), fs.sgd(0.01)), liu, rho, alpha, k)


def becker(grad, w, rho, eta, mu):
    """Becker et al., 2024, algorithm 1."""
    v = torch.zeros_like(w)
    for _ in range(5):
        w_tilde = w - rho * v / v.norm() if v.norm() > 0 else w
        g = grad(w_tilde)
        v = mu * v + g
        assume(v.norm() > 1e-2)
        w = w - eta * v
    return w


@given(problem=problems(), rho=positives, mu=st.floats(0, 0.95))
def test_msam_is_that_of_the_paper(problem, rho, mu):
    alike(problem, fs.chain(fs.msam(rho, mu), fs.sgd(0.01)), becker, rho, mu)


@structural
@given(problem=problems(), rho=positives)
def test_members_that_are_sam(problem, rho):
    """GSAM whose alpha is zero, and LookSAM that looks at every step, bit for bit."""
    sgd = fs.sgd(0.01, momentum=0.5)
    wanted, _ = run(fs.chain(fs.sam(rho), sgd), problem)
    for tx in (fs.gsam(rho, 0.0), fs.gsam(rho, torch.zeros(())), fs.looksam(rho, 0.7, k=1)):
        equal(run(fs.chain(tx, sgd), problem)[0], wanted)


@structural
@given(problem=problems(), mu=st.floats(0, 1))
def test_msam_at_rho_zero_is_momentum_sgd(problem, mu):
    """That of torch.optim, to rounding; that of `sgd`, bit for bit."""
    found, _ = run(fs.chain(fs.msam(0.0, mu), fs.sgd(0.01)), problem)
    equal(found, run(fs.sgd(0.01, momentum=mu), problem)[0])
    w = flat(problem.params).requires_grad_()
    optimizer = torch.optim.SGD([w], 0.01, momentum=mu)
    for _ in range(3):
        w.grad = torch.func.grad(vector(problem))(w.detach())
        optimizer.step()
    close(flat(found), w.detach())


@structural
@given(problem=problems(), rho=positives)
def test_the_first_step_of_msam_is_plain(problem, rho):
    """There is no momentum yet; the second gradient is `rho` back along the first."""
    assume(flat(problem.grads).norm() > 1e-2)
    tx, (spy, points) = fs.msam(rho), spied(problem.grads_fn)
    updates, state, _ = tx.update(problem.params, spy, tx.init(problem.params))
    equal(updates, problem.grads)
    tx.update(problem.params, spy, state)
    grads = flat(problem.grads)
    close([flat(point) for point in points], [flat(problem.params), flat(problem.params) - rho * grads / grads.norm()])


def test_looksam_reuses_nothing_where_nothing_was_found():
    """Along an eigenvector of the Hessian the SAM gradient has no part across: the steps between are plain."""
    scales, w = torch.tensor([3.0, 0.5]), torch.tensor([2.0, 0.0])
    tx = fs.looksam(0.1, k=3)
    state = tx.init(w)
    for step in range(3):
        updates, state, _ = tx.update(w, lambda w: scales * w, state)
        equal(state.across, torch.zeros(2))
        if step:
            equal(updates, scales * w)


@structural
@given(problem=problems(), rho=positives)
def test_what_looksam_keeps_is_across(problem, rho):
    """`<v, g> = 0`, and it stays until the next look."""
    tx = fs.looksam(rho, k=3)
    params, state, kept = problem.params, tx.init(problem.params), []
    for _ in range(3):
        updates, state, _ = tx.update(params, problem.grads_fn, state)
        params = optree.tree_map(lambda w, u: w - 0.01 * u, params, updates)
        kept.append(state.across)
    v, g = flat(kept[0]), flat(problem.grads)
    assert abs(v @ g) <= 1e-12 * (1 + v.norm() * g.norm())
    equal(kept[1:], [kept[0]] * 2)


def test_one_radius_per_leaf():
    """A prefix of radii scales the perturbation leaf by leaf; the norm is global."""
    params = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    for tx, sign in ((fs.looksam({"a": 0.5, "b": 0.0}), 1), (fs.msam({"a": 0.5, "b": 0.0}), -1)):
        spy, points = spied(lambda params: params)
        _, state, _ = tx.update(params, spy, tx.init(params))
        tx.update(params, spy, state)
        close(points[1], {"a": torch.tensor([3 + sign * 0.3]), "b": torch.tensor([4.0])}, rtol=1e-6)


@pytest.mark.parametrize(
    ("default", "tx"),
    [
        (fs.gsam(), fs.gsam(rho=0.05, alpha=0.4)),
        (fs.looksam(), fs.looksam(rho=0.1, alpha=0.7, k=5)),
        (fs.msam(), fs.msam(rho=0.3, momentum=0.9)),
    ],
    ids=["gsam", "looksam", "msam"],
)
def test_numbers_that_are_not_given(default, tx):
    """They are those of the docstrings."""
    problem = Problem(torch.tensor([1.0, 2.0], dtype=torch.float64), LOSSES[2])
    sgd = fs.sgd(0.01)
    equal(run(fs.chain(default, sgd), problem, 7)[0], run(fs.chain(tx, sgd), problem, 7)[0])


def test_looksam_saves_gradients_in_plain_code_only():
    """Under `vmap` both branches are computed; in a loop over the members one is."""
    for chunk_size, wanted in ((None, [2, 2, 2]), (1, [2, 1, 1])):
        tx = fs.ensemble.vectorize(fs.looksam(0.1, k=3), chunk_size=chunk_size)
        w, counts = torch.ones(1, 2), []
        state = tx.init(w)
        for _ in range(3):
            spy, points = spied(lambda w: w**3)
            _, state, _ = tx.update(w, spy, state)
            counts.append(len(points))
        assert counts == wanted
