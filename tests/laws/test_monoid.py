"""`chain` is associative and `identity()` is its unit."""

import optree
from hypothesis import given
from hypothesis import strategies as st

import funcsam as fs
from tests.asserts import equal
from tests.strategies import call, problems, structural
from tests.zoo import ZOO, each

entries = st.sampled_from(ZOO)


@each
@structural
@given(second=entries, third=entries, problem=problems())
def test_associativity(entry, second, third, problem):
    """However a chain is bracketed, updates and state are the same."""
    a, b, c = entry(), second(), third()
    together = call(fs.chain(a, b, c), problem)
    equal(call(fs.chain(fs.chain(a, b), c), problem), together)
    equal(call(fs.chain(a, fs.chain(b, c)), problem), together)


@each
@structural
@given(problem=problems())
def test_unit(entry, problem):
    """`identity()` on either side changes nothing, and `chain(t)` is `t`."""
    alone = call(entry(), problem)
    for tx in (fs.chain(fs.identity(), entry()), fs.chain(entry(), fs.identity()), fs.chain(entry())):
        equal(call(tx, problem), alone)


@each
@structural
@given(second=entries, problem=problems())
def test_composition(entry, second, problem):
    """What the second transform sees as its `grads_fn` is what the first makes of the gradients."""
    first, state = entry(), entry().init(problem.params)
    behind = lambda params: first.update(params, problem.grads_fn, state)[0]  # noqa: E731
    wanted, _, _ = second().update(problem.params, behind, second().init(problem.params))
    equal(call(fs.chain(entry(), second()), problem)[0], wanted)


@each
@structural
@given(problem=problems())
def test_step_applies_updates(entry, problem):
    """`step` is `update`, then `params + updates`."""
    updates, state = call(entry(), problem)
    params = optree.tree_map(lambda w, u: w + u, problem.params, updates)
    stepped = entry().step(problem.params, problem.grads_fn, entry().init(problem.params))
    equal(stepped, (params, state, problem.loss(problem.params)))
