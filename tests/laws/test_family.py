"""Laws of the sharpness family, by claim."""

import math

import optree
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import funcsam as fs
from funcsam.core import tree
from tests.asserts import close, equal
from tests.strategies import (
    LOSSES,
    Pair,
    Problem,
    ascent,
    call,
    flat,
    like,
    losses,
    positives,
    problems,
    run,
    spied,
    structural,
    trees,
    unflat,
)
from tests.zoo import Claim, claiming, each, with_numbers


def sized(entry, problem):
    """`T` as a vector and the gradient as a vector, where `||T g||` is well away from zero."""
    size, grads = flat(entry.size(problem.params)), flat(problem.grads)
    assume((size * grads).norm() > 1e-6)
    return size, grads


@claiming(Claim.IDENTITY_AT_ZERO_RHO)
@structural
@given(problem=problems())
def test_zero_rho_is_the_base_optimizer(entry, problem):
    """The params after three steps are the same, exactly."""
    equal(run(entry(rho=0.0), problem)[0], run(entry.base(), problem)[0])


@claiming(Claim.SPHERE)
@given(problem=problems(), rho=positives)
def test_on_the_sphere(entry, problem, rho):
    """`||e / T|| = rho`, and `e` is zero where `T` is."""
    size, _ = sized(entry, problem)
    e = flat(ascent(entry(rho=rho), problem))
    close(torch.where(size > 0, e / torch.where(size > 0, size, 1), e).norm(), torch.tensor(rho, dtype=e.dtype), 1e-8)


@claiming(Claim.SPHERE)
@given(problem=problems(), rho=positives)
def test_alignment(entry, problem, rho):
    """`<e, g> = rho ||T g||`: what the loss gains, to first order."""
    size, grads = sized(entry, problem)
    close(flat(ascent(entry(rho=rho), problem)) @ grads, rho * (size * grads).norm())


@claiming(Claim.SPHERE)
@given(data=st.data(), problem=problems(), rho=positives)
def test_maximality(entry, data, problem, rho):
    """No other vector of this length has a larger product with the gradient."""
    size, grads = sized(entry, problem)
    other = flat(data.draw(like(problem.params)))
    assume(other.norm() > 0)
    other = size * other * rho / other.norm()
    assert other @ grads <= flat(ascent(entry(rho=rho), problem)) @ grads + 1e-9 * (1 + grads.norm())


@claiming(Claim.SPHERE)
@given(problem=problems(), factor=positives, sign=st.sampled_from([-1, 1]))
def test_scale_invariance_and_oddness(entry, problem, factor, sign):
    """`e(c g) = e(g)` for positive `c`, and `e(-g) = -e(g)`."""
    sized(entry, problem)
    scaled = ascent(entry(), Problem(problem.params, lambda w: sign * factor * problem.loss(w)))
    close(scaled, tree.scale(sign, ascent(entry(), problem)))


@claiming(Claim.TRANSLATIONS)
@structural
@given(data=st.data(), problem=problems())
def test_translations(entry, data, problem):
    """The origin of the params makes no difference."""
    offset = data.draw(like(problem.params))
    there = Problem(tree.add(problem.params, offset), lambda w: problem.loss(optree.tree_map(torch.sub, w, offset)))
    assume(tree.norm(problem.grads) > 1e-3)
    close(call(entry(), there)[0], call(entry(), problem)[0], rtol=1e-6)


def _turned(problem, matrix):
    return Problem(matrix @ flat(problem.params), lambda w: problem.loss(matrix.T @ w))


@claiming(Claim.ROTATIONS)
@structural
@given(data=st.data(), problem=problems())
def test_rotations(entry, data, problem):
    """Reflecting the params reflects the updates; rotations are made of reflections."""
    assume(tree.norm(problem.grads) > 1e-3)
    normal = flat(data.draw(like(problem.params)))
    assume(normal.norm() > 0)
    normal = normal / normal.norm()
    matrix = torch.eye(len(normal), dtype=torch.float64) - 2 * torch.outer(normal, normal)
    close(call(entry(), _turned(problem, matrix))[0], matrix @ flat(call(entry(), problem)[0]), rtol=1e-6)


@claiming(Claim.PERMUTATIONS)
@structural
@given(data=st.data(), problem=problems())
def test_signed_permutations(entry, data, problem):
    """Exchanging entries and flipping their signs does the same to the updates."""
    assume(tree.norm(problem.grads) > 1e-3)
    count = flat(problem.params).numel()
    order = data.draw(st.permutations(range(count)))
    signs = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=count, max_size=count)))
    matrix = torch.eye(count, dtype=torch.float64)[list(order)] * signs
    close(call(entry(), _turned(problem, matrix))[0], matrix @ flat(call(entry(), problem)[0]), rtol=1e-6)


@claiming(Claim.SCALES)
@given(data=st.data(), problem=problems())
def test_elementwise_scale_invariance(entry, data, problem):
    """`w -> A w`, `g -> g / A` with a positive diagonal `A` gives `e -> A e`."""
    sized(entry, problem)
    by = data.draw(like(problem.params, st.floats(0.25, 4)))
    there = Problem(tree.multiply(problem.params, by), lambda w: problem.loss(tree.divide(w, by)))
    close(ascent(entry(), there), tree.multiply(ascent(entry(), problem), by), rtol=1e-7)


@given(problem=problems(), size=positives, rho=positives)
def test_asam_is_sam_where_all_params_are_alike(problem, size, rho):
    """If every `|w|` is `c`, then ASAM is SAM with radius `rho c`, and with `rho (c + eta)` for positive `eta`."""
    params = optree.tree_map(lambda w: size * torch.where(w < 0, -1.0, torch.ones_like(w)), problem.params)
    there = Problem(params, problem.loss)
    assume(tree.norm(there.grads) > 1e-6)
    close(call(fs.asam(rho), there)[0], call(fs.sam(rho * size), there)[0])
    close(call(fs.asam(rho, eta=0.5), there)[0], call(fs.sam(rho * (size + 0.5)), there)[0])


@given(data=st.data(), problem=problems(), rho=positives)
def test_asam_with_an_empty_mask_is_sam(data, problem, rho):
    """`T = 1` where the mask is false."""
    close(call(fs.asam(rho, eta=0.3, mask=False), problem)[0], call(fs.sam(rho), problem)[0])


@given(params=trees(), rho=positives)
def test_bowl(params, rho):
    """On `||w||^2 / 2` the SAM gradient is `(1 + rho / ||w||) w`."""
    norm = flat(params).norm()
    assume(norm > 0)
    updates, _ = call(fs.sam(rho), Problem(params, LOSSES[0]))
    close(updates, optree.tree_map(lambda w: (1 + rho / norm) * w, params))


@given(problem=problems(), rho=st.floats(2**-10, 2**-7))
def test_taylor(problem, rho):
    """`u = g + rho H g / ||g|| + O(rho^2)`: half the radius has a quarter of the remainder."""
    grads, vector = flat(problem.grads), flat(problem.params)
    assume(grads.norm() > 0.5)
    hessian = torch.func.jacrev(torch.func.grad(lambda w: problem.loss(unflat(w, problem.params))))(vector)

    def remainder(rho):
        first = grads + rho * hessian @ grads / grads.norm()
        return (flat(call(fs.sam(rho), problem)[0]) - first).norm()

    assert remainder(rho / 2) <= 0.3 * remainder(rho) + 1e-10 * (1 + grads.norm())


@claiming(Claim.SPHERE)
@structural
@given(problem=problems())
def test_second_evaluation_is_at_the_ascent(entry, problem):
    """SAM's gradient is the gradient at `w + e`; what follows in the chain sees that one."""
    spy, points = spied(problem.grads_fn)
    fs.chain(fs.sam(0.25), entry.base()).update(
        problem.params, spy, fs.chain(fs.sam(0.25), entry.base()).init(problem.params)
    )
    norm = flat(problem.grads).norm()
    away = optree.tree_map(lambda w, g: w + 0.25 * g / norm if norm > 0 else w, problem.params, problem.grads)
    close(points, [problem.params, away])


@claiming(Claim.SPHERE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@structural
@given(data=st.data(), problem=problems())
def test_bad_gradients_reach_the_ascent(entry, bad, data, problem):
    """One entry that is NaN or infinite, and no perturbed param stays finite."""
    grads = flat(problem.grads)
    grads[data.draw(st.integers(0, len(grads) - 1))] = bad
    spy, points = spied(lambda params: unflat(grads, params))
    params = optree.tree_map(torch.ones_like, problem.params)
    entry().update(params, spy, entry().init(params))
    assert not flat(points[1]).isfinite().any()


@with_numbers
@structural
@given(problem=problems())
def test_a_constant_schedule_is_its_constant(entry, problem):
    """For every hyperparameter."""
    schedules = {name: lambda step, value=value: value for name, value in entry.numbers.items()}
    tensors = {name: fs.constant(value) for name, value in entry.numbers.items()}
    close(run(entry(**schedules), problem, 2), run(entry(), problem, 2))
    close(run(entry(**tensors), problem, 2), run(entry(), problem, 2), rtol=1e-6)


@with_numbers
@structural
@given(problem=problems(), factors=st.lists(positives, min_size=3, max_size=3, unique=True))
def test_a_schedule_is_read_at_0_1_2(entry, problem, factors):
    """A run with a schedule is a run whose k-th update has the k-th value."""
    table = torch.tensor(factors, dtype=torch.float64)
    moving = {name: lambda step, value=value: table[step] * value for name, value in entry.numbers.items()}
    params, state = problem.params, entry().init(problem.params)
    for factor in factors:
        now = entry(**{name: factor * value for name, value in entry.numbers.items()})
        params, state, _ = now.step(params, problem.grads_fn, state)
    assume(flat(params).abs().max() < 1e6)
    close(run(entry(**moving), problem, 3), (params, state), rtol=1e-6)


@claiming(Claim.SPHERE)
@structural
@given(params=trees(), rho=st.floats(0, 2**-10), lr=st.floats(2**-6, 0.5))
def test_descent(entry, params, rho, lr):
    """On a bowl a small step against the sharpness-aware gradient goes down."""
    loss = LOSSES[0]
    assume(loss(params) > 0.1)
    gradient, _ = call(fs.sharpness_aware(fs.chain(fs.normalize(), fs.scale(rho))), Problem(params, loss))
    assert loss(tree.add_scaled(params, -lr, gradient)) < loss(params)


@claiming(Claim.FIXED_POINT)
@structural
@given(params=trees(), loss=losses)
@example(params={"w": torch.zeros(2, dtype=torch.float64)}, loss=LOSSES[0])
def test_derivative_at_a_zero_gradient_is_finite(entry, params, loss):
    """Differentiating through a step from a critical point, by params and hyperparameters, gives no NaN."""
    origin = optree.tree_map(torch.zeros_like, params)
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in entry.numbers.items()}

    def outcome(params, numbers):
        return loss(call(entry(**numbers), Problem(params, LOSSES[0]))[0])

    assert flat((torch.zeros(1), torch.func.grad(outcome, (0, 1))(origin, numbers))).isfinite().all()


@given(problem=problems(), rhos=st.tuples(positives, positives))
def test_one_radius_per_leaf(problem, rhos):
    """A prefix of radii scales the ascent leaf by leaf; the norm stays global, and zero leaves a leaf in place."""
    pair = Problem(Pair(problem.params, problem.params), problem.loss)
    assume(tree.norm(pair.grads) > 1e-6)
    left, right = (ascent(fs.sam(rho), pair) for rho in rhos)
    close(ascent(fs.sam(Pair(*rhos)), pair), Pair(left.left, right.right))
    equal(ascent(fs.sam(Pair(rhos[0], 0)), pair).right, optree.tree_map(torch.zeros_like, problem.params))


@given(problem=problems(), rho=positives)
def test_combine(problem, rho):
    """`combine` gets the gradient at the params and the one at the ascent, in this order."""
    climb = fs.chain(fs.normalize(), fs.scale(rho))
    first = fs.sharpness_aware(climb, combine=lambda grads, probe, step: grads)
    second = fs.sharpness_aware(climb, combine=lambda grads, probe, step: probe)
    equal(call(first, problem)[0], problem.grads)
    equal(call(second, problem)[0], call(fs.sam(rho), problem)[0])


@given(problem=problems(), rho=positives)
def test_when(problem, rho):
    """On the steps that probe it is SAM, on the others the plain gradient; a bool and a tensor say the same."""
    climb = fs.chain(fs.normalize(), fs.scale(rho))
    for answer in (lambda step: step == 0, lambda step: bool(step == 0)):
        tx = fs.sharpness_aware(climb, when=answer)
        updates, state = call(tx, problem)
        equal(updates, call(fs.sam(rho), problem)[0])
        equal(call(tx, problem, state)[0], problem.grads)


@given(problem=problems(), rho=positives)
def test_several_ascents(problem, rho):
    """Two ascents of half the length, each along the gradient where it starts."""
    assume(tree.norm(problem.grads) > 1e-3)
    climb = fs.chain(fs.normalize(), fs.scale(rho))
    spy, points = spied(problem.grads_fn)
    tx = fs.sharpness_aware(climb, steps=2)
    tx.update(problem.params, spy, tx.init(problem.params))
    half = optree.tree_map(lambda w, e: w + e, problem.params, ascent(fs.sam(rho / 2), problem))
    there = Problem(half, problem.loss)
    assume(tree.norm(there.grads) > 1e-3)
    end = optree.tree_map(lambda w, e: w + e, half, ascent(fs.sam(rho / 2), there))
    close(points, [problem.params, half, end], rtol=1e-8)


@given(problem=problems(), rho=positives)
def test_sam_update_is_sam(problem, rho):
    """The plain function and the transform agree, adaptive or not."""
    for adaptive, tx in ((False, fs.sam(rho)), (True, fs.asam(rho))):
        state = tx.init(problem.params)
        plain = fs.sam_update(problem.params, problem.grads_fn, state, rho=rho, adaptive=adaptive)
        equal(plain, tx.update(problem.params, problem.grads_fn, state))


@given(problem=problems(), ratio=st.floats(0.1, 2))
def test_clipping(problem, ratio):
    """The norm is at most the bound, directions stay, and what is within the bound passes bit for bit."""
    grads, norm = problem.grads, tree.norm(problem.grads)
    assume(norm > 1e-6 and abs(ratio - 1) > 1e-6)
    clipped, _ = call(fs.clip_by_global_norm(ratio * norm.item()), problem)
    close(clipped, tree.scale(min(1.0, ratio), grads))
    if ratio > 1:
        equal(clipped, grads)


@given(problem=problems())
def test_normalize(problem):
    """The global norm becomes one."""
    assume(tree.norm(problem.grads) > 1e-6)
    close(tree.norm(call(fs.normalize(), problem)[0]), torch.tensor(1.0, dtype=torch.float64))


@each
@structural
@given(problem=problems())
def test_bare_gradients(entry, problem):
    """A bare `torch.func.grad` is a `grads_fn`; aux is then `()`."""
    state = entry().init(problem.params)
    updates, _, aux = entry().update(problem.params, torch.func.grad(problem.loss), state)
    close(updates, call(entry(), problem)[0])
    assert aux == ()
