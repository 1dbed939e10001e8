"""`apply_if_finite`: a step that is not finite leaves nothing behind."""

import pytest
import torch

import funcsam as fs
from tests.asserts import equal

PARAMS = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor(0.5)}
TX = fs.chain(fs.sam(0.1), fs.sgd(0.1, momentum=0.9))


def loss(params, factor):
    return factor * (params["w"].square().sum() + params["b"] ** 2)


GRADS = fs.grad_and_value(loss)


def run(tx, factors):
    params, state = PARAMS, tx.init(PARAMS)
    for factor in factors:
        params, state, _ = tx.step(params, GRADS, state, torch.tensor(factor))
    return params, state


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_step_that_is_not_finite_leaves_nothing_behind(bad):
    """Params and state are those of the run without it, bit for bit; the counter says how many there were."""
    params, state = run(fs.apply_if_finite(TX), [1.0, bad, 2.0, bad])
    wanted, inner = run(TX, [1.0, 2.0])
    equal(params, wanted)
    equal(state.inner, inner)
    assert state.skipped == 2


def test_one_bad_entry_of_the_second_evaluation_is_enough():
    """The first may be finite: only the probe overflows."""

    def spike(params):
        return torch.where(params["w"][0] > 1.05, torch.inf, 1.0) * params["w"].square().sum() + params["b"] ** 2

    tx = fs.apply_if_finite(fs.chain(fs.sam(0.5), fs.sgd(0.1)))
    params, state, aux = tx.step(PARAMS, fs.grad_and_value(spike), tx.init(PARAMS))
    equal(params, PARAMS)
    assert state.skipped == 1
    assert aux == 5.25


def test_members_skip_on_their_own():
    """Under `vmap` one member's NaN is its own."""
    tx = fs.ensemble.vectorize(fs.apply_if_finite(TX))
    params = fs.ensemble.stack([PARAMS, PARAMS])
    moved, state, _ = tx.step(params, GRADS, tx.init(params), torch.tensor([torch.nan, 1.0]))
    equal(fs.ensemble.member(moved, 0), PARAMS)
    torch.testing.assert_close(fs.ensemble.member(moved, 1), run(TX, [1.0])[0])
    assert state.skipped.tolist() == [1, 0]


def test_messages():
    with pytest.raises(TypeError, match="apply_if_finite: `inner` must be a Transform, got float"):
        fs.apply_if_finite(1.0)
    with pytest.raises(ValueError, match="apply_if_finite: `state` must be an ApplyIfFiniteState, got tuple"):
        fs.apply_if_finite(TX).update(PARAMS, GRADS, (), torch.tensor(1.0))
