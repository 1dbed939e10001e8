"""What holds for every transform."""

import io
import typing
from collections import OrderedDict

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcsam as fs
from funcsam.core import tree
from tests.asserts import close, defaults, equal
from tests.strategies import Pair, Problem, call, problems, run, spied, structural
from tests.zoo import ZOO, Claim, claiming, each


def test_every_exported_factory_is_in_the_zoo():
    """A factory is an exported function that returns a Transform."""
    functions = [getattr(fs, name) for name in fs.__all__ if not isinstance(getattr(fs, name), type)]
    factories = {f for f in functions if typing.get_type_hints(f).get("return") is fs.Transform}
    assert factories == {export for entry in ZOO for export in entry.exports}


@each
@structural
@given(problem=problems())
def test_purity(entry, problem):
    """Params, grads and state are as they were, and nobody wrote to them."""
    tx, grads = entry(), problem.grads
    inputs = (problem.params, grads, call(tx, problem)[1])
    before, versions = optree.tree_map(torch.clone, inputs), [x._version for x in optree.tree_leaves(inputs)]
    tx.update(problem.params, lambda params: grads, inputs[2])
    equal(inputs, before)
    assert versions == [x._version for x in optree.tree_leaves(inputs)]


@each
@structural
@given(problem=problems())
def test_no_memory_but_the_state(entry, problem):
    """The same state gives the same answer: again, and from a second transform with the same numbers."""
    tx = entry()
    _, state = call(tx, problem)
    first = call(tx, problem, state)
    equal(call(tx, problem, state), first)
    equal(call(entry(), problem, state), first)


@each
@structural
@given(problem=problems(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_structure(entry, problem, dtype):
    """Updates look like the params, new state like the old, in every floating-point type."""
    params = optree.tree_map(lambda leaf: leaf.to(dtype), problem.params)
    state = entry().init(params)
    new = call(entry(), Problem(params, problem.loss), state)
    equal(optree.tree_map(torch.zeros_like, new), optree.tree_map(torch.zeros_like, (params, state)))


@each
@structural
@given(problem=problems())
def test_device(entry, problem):
    """From params on `meta` everything is on `meta`."""
    params = optree.tree_map(lambda leaf: leaf.to("meta"), problem.params)
    answer = entry().update(params, problem.grads_fn, entry().init(params))
    assert all(leaf.is_meta for leaf in optree.tree_leaves(answer))


@each
@structural
@given(problem=problems())
def test_defaults(entry, problem):
    """Neither the default dtype nor the default device of torch changes a step."""
    tx = entry()
    wanted = run(tx, problem)
    with defaults():
        found = run(tx, problem)
    equal(found, wanted)


@each
@structural
@given(problem=problems())
def test_state_is_tensors(entry, problem):
    """For optree and for torch's own pytree alike, every leaf of a state is a tensor."""
    for state in (entry().init(problem.params), call(entry(), problem)[1]):
        leaves = optree.tree_leaves(state, none_is_leaf=True) + torch.utils._pytree.tree_leaves(state)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)


@each
@structural
@given(problem=problems())
def test_state_depends_on_shapes_only(entry, problem):
    """The first state of NaN params is the first state of the params."""
    nans = optree.tree_map(lambda leaf: torch.full_like(leaf, torch.nan), problem.params)
    equal(entry().init(nans), entry().init(problem.params))


@claiming(Claim.AT_PARAMS)
@structural
@given(problem=problems())
def test_probes_leave_no_trace(entry, problem):
    """Aux and the states upstream are those of one evaluation at the params."""
    upstream = fs.trace(0.5)
    tx = fs.chain(upstream, fs.clip_by_global_norm(1.0), entry())
    state = tx.init(problem.params)
    for _ in range(2):
        _, alone, loss = upstream.update(problem.params, problem.grads_fn, state[0])
        _, state, aux = tx.update(problem.params, problem.grads_fn, state)
        equal((state[0], aux), (alone, loss))


@each
@structural
@given(problem=problems())
def test_evaluations(entry, problem):
    """As many gradients are asked for as the entry says, step by step."""
    tx, state = entry(), entry().init(problem.params)
    for wanted in entry.evaluations:
        spy, points = spied(problem.grads_fn)
        _, state, _ = tx.update(problem.params, spy, state)
        assert len(points) == wanted


@claiming(Claim.AT_PARAMS)
@structural
@given(problem=problems())
def test_the_first_gradient_is_asked_for_at_the_params(entry, problem):
    """At every step, whatever the state; `aux` and the states upstream are those of this evaluation."""
    tx, params, state = entry(), problem.params, entry().init(problem.params)
    for _ in range(3):
        spy, points = spied(problem.grads_fn)
        updates, state, _ = tx.update(params, spy, state)
        equal(points[0], params)
        params = tree.add(params, updates)


@each
@structural
@given(problem=problems())
def test_no_graph_from_nothing(entry, problem):
    """Outputs need no grad, whether or not the params do."""
    for wanted in (False, True):
        params = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(wanted), problem.params)  # noqa: B023
        for take in (entry().step, entry().update):
            answer = take(params, problem.grads_fn, entry().init(params))
            assert not any(leaf.requires_grad for leaf in optree.tree_leaves(answer))


@claiming(Claim.RELABELLING)
@given(problem=problems())
def test_structure_equivariance(entry, problem):
    """Relabelling the params as a flat tuple commutes with two steps."""
    flat = Problem(tuple(optree.tree_leaves(problem.params)), problem.loss)
    params, _ = run(entry(), flat, 2)
    close(params, tuple(optree.tree_leaves(run(entry(), problem, 2)[0])))


def _backwards(tree):
    if isinstance(tree, dict) and not isinstance(tree, OrderedDict):
        return {key: _backwards(tree[key]) for key in reversed(tree)}
    if isinstance(tree, list | tuple):
        parts = [_backwards(part) for part in tree]
        return Pair(*parts) if isinstance(tree, Pair) else type(tree)(parts)
    return tree


@each
@structural
@given(problem=problems())
def test_key_order(entry, problem):
    """In which order the keys of a dict were inserted makes no difference."""
    other = Problem(_backwards(problem.params), problem.loss)
    equal(run(entry(), other, 2), run(entry(), problem, 2))


@each
@structural
@given(problem=problems())
def test_round_trip(entry, problem):
    """A state comes back from a file, and the next step is the same."""
    params, state = run(entry(), problem, 1)
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    later = Problem(params, problem.loss)
    equal(call(entry(), later, loaded), call(entry(), later, state))


@each
@structural
@given(problem=problems(), split=st.integers(0, 3))
def test_checkpoint_split(entry, problem, split):
    """Some steps, then the rest, are all of them."""
    params, state = run(entry(), problem, split)
    equal(run(entry(), Problem(params, problem.loss), 3 - split, state), run(entry(), problem, 3))


def _counters(state):
    if isinstance(state, tuple) and hasattr(state, "step"):
        yield state.step
    if isinstance(state, tuple):
        for part in state:
            yield from _counters(part)


@each
@structural
@given(problem=problems(), steps=st.integers(0, 3))
def test_counters_count(entry, problem, steps):
    """After k steps every counter is k, int64 of shape ()."""
    _, state = run(entry(), problem, steps)
    equal(list(_counters(state)), [torch.tensor(steps)] * len(list(_counters(state))))


@each
@pytest.mark.parametrize("params", [{}, (), [], {"w": torch.zeros(0)}, [torch.zeros(2, 0), torch.zeros(0, 3)]], ids=str)
def test_empty_trees(entry, params):
    """Trees without entries pass through."""
    grads_fn = fs.grad_and_value(lambda params: torch.zeros(()) + sum(x.sum() for x in optree.tree_leaves(params)))
    state = entry().init(params)
    new, new_state, _ = entry().step(params, grads_fn, state)
    equal(new, params)
    assert optree.tree_structure(new_state) == optree.tree_structure(state)


@claiming(Claim.FIXED_POINT)
@structural
@given(problem=problems())
def test_zero_gradient_is_a_fixed_point(entry, problem):
    """The update is zero, not NaN."""
    zeros = optree.tree_map(torch.zeros_like, problem.params)
    equal(entry().update(problem.params, lambda params: zeros, entry().init(problem.params))[0], zeros)


@claiming(Claim.LINEAR)
@given(problem=problems(), other=problems(), a=st.floats(-2, 2), b=st.floats(-2, 2))
def test_linearity(entry, problem, other, a, b):
    """Two updates of `a g + b h` are `a` times those of `g` plus `b` times those of `h`."""
    tx, params = entry(), problem.params

    def updates(loss):
        grads_fn, state = fs.grad_and_value(loss), tx.init(params)
        state = tx.update(params, grads_fn, state)[1]
        return tx.update(params, grads_fn, state)[0]

    mixed = optree.tree_map(lambda x, y: a * x + b * y, updates(problem.loss), updates(other.loss))
    close(updates(lambda w: a * problem.loss(w) + b * other.loss(w)), mixed)
