"""Members of an ensemble under `vmap` know nothing of each other."""

import math

import optree
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.asserts import close
from tests.strategies import Problem, ensembles, member, run, stack, structural
from tests.zoo import each


def steps(entry, ensemble):
    """Two steps of all members side by side."""
    params = stack(ensemble.members)
    state = torch.vmap(entry().init)(params)
    return torch.vmap(lambda w, s: run(entry(), Problem(w, ensemble.loss), 2, s))(params, state)


@each
@structural
@given(ensemble=ensembles(), victim=st.integers(0, 2), poison=st.sampled_from([math.nan, math.inf, 0.0]))
def test_independence(entry, ensemble, victim, poison):
    """NaN, inf or zero in one member leaves the others as they were."""
    members = list(ensemble.members)
    members[victim] = optree.tree_map(lambda w: torch.full_like(w, poison), members[victim])
    after, before = steps(entry, ensemble._replace(members=members)), steps(entry, ensemble)
    for other in {0, 1, 2} - {victim}:
        close(member(after, other), member(before, other), rtol=1e-12)


@each
@structural
@given(ensemble=ensembles(), order=st.permutations(range(3)))
def test_permutation(entry, ensemble, order):
    """Permuting members permutes results."""
    permuted = steps(entry, ensemble._replace(members=[ensemble.members[i] for i in order]))
    close(permuted, member(steps(entry, ensemble), list(order)), rtol=1e-12)
