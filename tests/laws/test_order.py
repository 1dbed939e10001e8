"""The place of a transform in a chain is its meaning: each order, written out."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import funcsam as fs
from tests.asserts import close
from tests.strategies import Problem, call, flat, positives, problems, unflat


class Formula:
    """A problem on a flat vector: the gradient, the direction of the ascent, and clipping, as one would write them."""

    def __init__(self, problem):
        self.w = flat(problem.params)
        self.problem = problem

    def g(self, w):
        """The gradient."""
        return flat(Problem(unflat(w, self.problem.params), self.problem.loss).grads)


def unit(g):
    """`g / ||g||`, where the norm is well away from zero."""
    assume(g.norm() > 1e-3)
    return g / g.norm()


def clip(g, bound):
    """`g min(1, bound / ||g||)`."""
    assume(g.norm() > 1e-3)
    return g * min(1.0, (bound / g.norm()).item())


def updates(tx, problem):
    """One update, as a vector."""
    return flat(call(tx, problem)[0])


@given(problem=problems(), rho=positives, decay=positives, lr=positives)
def test_decay_after_sam(problem, rho, decay, lr):
    """Decay outside the ascent: `-lr (g(w + rho g/||g||) + decay w)`."""
    f = Formula(problem)
    wanted = -lr * (f.g(f.w + rho * unit(f.g(f.w))) + decay * f.w)
    close(updates(fs.chain(fs.sam(rho), fs.add_decayed_weights(decay), fs.sgd(lr)), problem), wanted)
    close(updates(fs.chain(fs.sam(rho), fs.sgd(lr, weight_decay=decay)), problem), wanted)


@given(problem=problems(), rho=positives, decay=positives, lr=positives)
def test_decay_before_sam(problem, rho, decay, lr):
    """L2 inside the loss, at `w` and at `w + e`."""
    f = Formula(problem)
    h = lambda w: f.g(w) + decay * w  # noqa: E731
    wanted = -lr * h(f.w + rho * unit(h(f.w)))
    close(updates(fs.chain(fs.add_decayed_weights(decay), fs.sam(rho), fs.sgd(lr)), problem), wanted)


@given(problem=problems(), rho=positives, ratio=st.floats(0.1, 2))
def test_clip_before_sam(problem, rho, ratio):
    """Every evaluation is clipped; the ascent, whose length is fixed, is as without."""
    f = Formula(problem)
    bound = ratio * f.g(f.w).norm().item()
    wanted = clip(f.g(f.w + rho * unit(f.g(f.w))), bound)
    close(updates(fs.chain(fs.clip_by_global_norm(bound), fs.sam(rho)), problem), wanted)


@given(problem=problems(), rho=positives, ratio=st.floats(0.1, 2))
def test_clip_after_sam(problem, rho, ratio):
    """The SAM gradient is clipped; momentum behind it sees the clipped one."""
    f = Formula(problem)
    probe = f.g(f.w + rho * unit(f.g(f.w)))
    bound = ratio * probe.norm().item()
    assume(bound > 1e-3)
    close(updates(fs.chain(fs.sam(rho), fs.clip_by_global_norm(bound)), problem), clip(probe, bound))


@given(problem=problems(), rho=positives, decay=st.floats(0.1, 0.9))
def test_momentum_before_sam(problem, rho, decay):
    """On the second step the ascent, and the probe, have momentum in them."""
    f = Formula(problem)
    tx = fs.chain(fs.trace(decay), fs.sam(rho))
    _, state = call(tx, problem)
    m = decay * f.g(f.w)
    wanted = m + f.g(f.w + rho * unit(m + f.g(f.w)))
    close(flat(call(tx, problem, state)[0]), wanted)


@given(problem=problems(), rho=positives, decay=st.floats(0.1, 0.9))
def test_momentum_after_sam(problem, rho, decay):
    """On the second step there are two SAM gradients in the sum."""
    f = Formula(problem)
    tx = fs.chain(fs.sam(rho), fs.trace(decay))
    _, state = call(tx, problem)
    probe = f.g(f.w + rho * unit(f.g(f.w)))
    close(flat(call(tx, problem, state)[0]), probe + decay * probe)


@given(problem=problems(), rhos=st.tuples(positives, positives))
def test_sam_of_sam(problem, rhos):
    """The second ascends on the gradient field that the first makes: four evaluations."""
    f = Formula(problem)
    h = lambda w: f.g(w + rhos[0] * unit(f.g(w)))  # noqa: E731
    close(updates(fs.chain(fs.sam(rhos[0]), fs.sam(rhos[1])), problem), h(f.w + rhos[1] * unit(h(f.w))), rtol=1e-6)


@given(problem=problems(), rho=positives, factor=st.floats(0.1, 4))
def test_scale_commutes_with_sam(problem, rho, factor):
    """A factor in front of SAM changes the length of its gradient, not its ascent."""
    before = updates(fs.chain(fs.scale(factor), fs.sam(rho)), problem)
    assume(torch.linalg.vector_norm(flat(problem.grads)) > 1e-3)
    close(before, updates(fs.chain(fs.sam(rho), fs.scale(factor)), problem))
