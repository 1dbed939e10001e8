"""What laws quantify over: trees of small float64 tensors, five losses, and problems made of one of each.

Values are drawn, not seeds, so that a failure shrinks to readable numbers.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import funcsam as fs
from funcsam.core.states import saveable

structural = settings(max_examples=settings().max_examples // 4)
"""A quarter of the examples: for laws about shapes, types and counts, and for laws that every entry must pass."""

reals = st.integers(-4096, 4096).map(lambda k: k / 1024)  # 0, or from 2**-10 to 4 in size; float32 holds them
positives = st.floats(2**-6, 1)


@saveable
class Pair(NamedTuple):
    """A node that is neither a tuple nor a dict."""

    left: Any
    right: Any


def tensors(shape=None, elements=reals):
    """Float64 tensors of 0 to 2 axes of size 1 to 3."""
    shape = array_shapes(min_dims=0, max_dims=2, max_side=3) if shape is None else tuple(shape)
    return arrays(np.float64, shape, elements=elements).map(torch.tensor)


def trees(elements=reals):
    """Trees of 1 to 6 such tensors: what optree and torch's own pytree share."""
    names = st.sampled_from(["w", "b", "scale", "z"])

    def grow(children):
        several = st.lists(children, min_size=1, max_size=3)
        named = st.dictionaries(names, children, min_size=1, max_size=3)
        return several | several.map(tuple) | named | named.map(OrderedDict) | st.builds(Pair, children, children)

    return st.recursive(tensors(elements=elements), grow, max_leaves=6)


def like(tree, elements=reals):
    """Trees with the structure and the shapes of another."""
    leaves, spec = optree.tree_flatten(tree)
    drawn = st.tuples(*(tensors(leaf.shape, elements) for leaf in leaves))
    return drawn.map(lambda new: optree.tree_unflatten(spec, new))


def flat(tree):
    """One vector of all entries, in the order of the leaves."""
    return torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(tree)])


def unflat(vector, tree):
    """Undoes `flat`, given a tree of the shapes."""
    leaves, spec = optree.tree_flatten(tree)
    pieces = vector.split([leaf.numel() for leaf in leaves])
    return optree.tree_unflatten(spec, [p.reshape(leaf.shape) for p, leaf in zip(pieces, leaves, strict=True)])


class Loss(NamedTuple):
    """A function of all entries, with a name."""

    name: str
    of: Any

    def __call__(self, params):
        return self.of(flat(params))

    def __repr__(self):
        return f"<{self.name}>"


LOSSES = (
    Loss("bowl", lambda w: 0.5 * (w * w).sum()),
    Loss("coupled", lambda w: 0.5 * ((w - w.roll(1)) ** 2).sum() + 0.5 * (w.sum() - 1) ** 2),
    Loss("quartic", lambda w: 0.25 * ((w * w - 1) ** 2).sum()),
    Loss("wavy", lambda w: (torch.sin(2 * w) + 0.1 * w * w).sum()),
    Loss("saddle", lambda w: w.sum() + (w[:-1] * w[1:]).sum()),  # linear, if there is one entry
)
losses = st.sampled_from(LOSSES)


class Problem(NamedTuple):
    """Params and a loss."""

    params: Any
    loss: Loss

    @property
    def grads_fn(self):
        """Gradients and loss; the loss is aux."""
        return fs.grad_and_value(self.loss)

    @property
    def grads(self):
        """Gradients at the params."""
        return self.grads_fn(self.params)[0]


def problems(elements=reals):
    """Pairs of a tree and a loss."""
    return st.builds(Problem, trees(elements), losses)


class Ensemble(NamedTuple):
    """Members of one structure, and a loss."""

    members: list
    loss: Loss


@st.composite
def ensembles(draw, size=3):
    """Several trees of one structure, and a loss."""
    first = draw(trees())
    return Ensemble([first, *(draw(like(first)) for _ in range(size - 1))], draw(losses))


def stack(members):
    """Puts members side by side along a new first axis."""
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *members)


def member(ensemble, i):
    """Takes one of them."""
    return optree.tree_map(lambda leaf: leaf[i], ensemble)


def call(tx, problem, state=None):
    """One update: `(updates, state)`."""
    state = tx.init(problem.params) if state is None else state
    return tx.update(problem.params, problem.grads_fn, state)[:2]


def run(tx, problem, steps=3, state=None):
    """Several steps: `(params, state)`."""
    params, state = problem.params, tx.init(problem.params) if state is None else state
    for _ in range(steps):
        params, state, _ = tx.step(params, problem.grads_fn, state)
    return params, state


def spied(grads_fn):
    """The function, and the list of points where it has been evaluated."""
    points = []

    def spy(params, *batch):
        points.append(params)
        return grads_fn(params, *batch)

    return spy, points


def ascent(tx, problem, state=None):
    """How far the second evaluation is from the first."""
    spy, points = spied(problem.grads_fn)
    tx.update(problem.params, spy, tx.init(problem.params) if state is None else state)
    return optree.tree_map(torch.sub, points[1], points[0])
