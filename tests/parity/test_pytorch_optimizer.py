"""SAM and ASAM as in pytorch_optimizer.

Conventions: `+ 1e-12` in the denominator, so up to 1e-12 / ||g|| (1e-6 with their norm in float32); ASAM
(`adaptive=True`) scales the gradient by `w^2` and its norm by `|w|`, without `eta`, on every leaf; the base optimizer
runs after the params are restored from a copy.
"""

import optree
import pytest
import torch
from hypothesis import assume, given

import funcsam as fs
from funcsam.core import tree
from tests.asserts import close
from tests.strategies import LOSSES, Problem, flat, positives, problems, run, trees

SAM = pytest.importorskip("pytorch_optimizer").SAM


def theirs(problem, rho, adaptive, steps):
    """The params after some steps of SAM with momentum SGD."""
    params = optree.tree_map(lambda w: w.clone().requires_grad_(), problem.params)
    optimizer = SAM(optree.tree_leaves(params), torch.optim.SGD, rho=rho, adaptive=adaptive, lr=0.1, momentum=0.9)
    for _ in range(steps):
        problem.loss(params).backward()
        optimizer.first_step(zero_grad=True)
        problem.loss(params).backward()
        optimizer.second_step(zero_grad=True)
    return optree.tree_map(lambda w: w.detach(), params)


def ours(problem, rho, adaptive, steps):
    """The same with a chain."""
    tx = fs.chain((fs.asam if adaptive else fs.sam)(rho), fs.sgd(0.1, momentum=0.9))
    return run(tx, problem, steps)[0]


adaptive_or_not = pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])


@adaptive_or_not
@given(problem=problems(), rho=positives)
def test_one_step(adaptive, problem, rho):
    """On every loss."""
    size = flat(problem.params).abs() if adaptive else 1.0
    assume((size * flat(problem.grads)).norm() > 1e-2)
    close(ours(problem, rho, adaptive, 1), theirs(problem, rho, adaptive, 1), rtol=1e-5)


@adaptive_or_not
@given(params=trees(), rho=positives)
def test_three_steps_on_a_bowl(adaptive, params, rho):
    """Momentum included."""
    assume(tree.norm(params) > 1)
    problem = Problem(params, LOSSES[0])
    close(ours(problem, rho, adaptive, 3), theirs(problem, rho, adaptive, 3), rtol=1e-5)
