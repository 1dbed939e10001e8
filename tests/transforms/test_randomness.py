"""Random numbers of a step: independent by default, common on demand, alone and in ensembles."""

import io

import pytest
import torch
import torch.nn.functional as F

import funcsam as fs
from tests.asserts import equal

W = torch.ones(64)


def masks(tx, steps=2, state=None, w=W):
    """The dropout masks that each evaluation of each step drew: `(masks, state)`."""
    drawn, state = [], tx.init(w) if state is None else state

    def grads_fn(w):
        drawn[-1].append(F.dropout(torch.ones(64), 0.5))
        return w, ()

    for _ in range(steps):
        drawn.append([])
        _, state, _ = tx.update(w, grads_fn, state)
    return [torch.stack(step) for step in drawn], state


def test_without_it_evaluations_are_independent():
    (first, _), _ = masks(fs.sam())
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize("steps", [1, 3])
def test_every_probe_of_a_step_sees_the_masks_of_the_params(steps):
    climb = fs.chain(fs.normalize(), fs.scale(0.1))
    (first, second), _ = masks(fs.chain(fs.common_randomness(), fs.sharpness_aware(climb, steps=steps)))
    for step in (first, second):
        assert len(step) == steps + 1
        equal(step, step[:1].expand_as(step))
    assert (first[0] != second[0]).any()


def test_several_draws_in_one_evaluation_differ():
    def grads_fn(w):
        return torch.stack([torch.rand(()), torch.rand(())]), ()

    w = torch.zeros(2)
    tx = fs.common_randomness()
    drawn, _, _ = tx.update(w, grads_fn, tx.init(w))
    assert drawn[0] != drawn[1]


def test_the_seed_says_what_is_drawn_and_nothing_else_does():
    torch.manual_seed(5)
    one, _ = masks(fs.chain(fs.common_randomness(3), fs.sam()))
    torch.manual_seed(6)
    equal(masks(fs.chain(fs.common_randomness(3), fs.sam()))[0], one)
    assert (masks(fs.chain(fs.common_randomness(4), fs.sam()))[0][0] != one[0]).any()
    torch.manual_seed(3)
    equal(F.dropout(torch.ones(64), 0.5), one[0][0])


def test_the_generators_of_the_caller_are_left_alone():
    """Also where the loss fails."""
    before = torch.get_rng_state()
    tx = fs.chain(fs.common_randomness(), fs.sam())
    masks(tx)
    equal(torch.get_rng_state(), before)

    def broken(w):
        torch.rand(3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tx.update(W, broken, tx.init(W))
    equal(torch.get_rng_state(), before)


def test_a_resumed_run_draws_what_it_would_have_drawn():
    tx = fs.chain(fs.common_randomness(), fs.sam())
    whole, _ = masks(tx, 4)
    first, state = masks(tx, 2)
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    torch.rand(5)
    rest, _ = masks(tx, 2, torch.load(file, weights_only=True))
    equal(first + rest, whole)


def members(randomness, tx, steps=1):
    """The masks of three members: shape `(steps, evaluations, members, 64)`, and the last state."""
    w = torch.ones(3, 64)
    many = fs.ensemble.vectorize(tx, randomness=randomness)
    drawn, state = [], many.init(w)

    def grads_fn(w):
        mask = F.dropout(torch.ones_like(w), 0.5)
        drawn[-1].append(mask)
        return w, mask

    kept = []
    for _ in range(steps):
        drawn.append([])
        _, state, mask = many.update(w, grads_fn, state)
        kept.append(mask)
    return kept, state


def probes(randomness, tx):
    """The masks at the params and at the probe, of three members: shape `(members, 2, 64)`."""
    w = torch.ones(3, 64)
    climb = fs.chain(fs.normalize(), fs.scale(0.1))
    half = fs.sharpness_aware(climb, combine=lambda g, probe, step: torch.stack([g, probe]))
    many = fs.ensemble.vectorize(fs.chain(tx, half), randomness=randomness)
    return many.update(w, lambda w: F.dropout(torch.ones_like(w), 0.5), many.init(w))[0]


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_members_share_or_differ_as_vmap_says(randomness):
    """And each member sees one set of masks in both evaluations, if they are common."""
    common = probes(randomness, fs.common_randomness())
    equal(common[:, 0], common[:, 1])
    independent = probes(randomness, fs.identity())
    assert (independent[:, 0] != independent[:, 1]).any()
    for drawn in (common, independent):
        assert (drawn[0] == drawn[1]).all() == (randomness == "same")


def test_members_draw_anew_at_every_step():
    kept, state = members("different", fs.chain(fs.common_randomness(), fs.sam()), steps=2)
    assert (kept[0] != kept[1]).any()
    assert state[0].step.tolist() == [2, 2, 2]


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_by_hand(randomness):
    """The same under `torch.vmap` of a step, without the helper."""
    tx = fs.chain(fs.common_randomness(), fs.sam())

    def one(w, state):
        return tx.update(w, lambda w: (w, F.dropout(torch.ones_like(w), 0.5)), state)[2]

    w = torch.ones(3, 64)
    drawn = torch.vmap(one, randomness=randomness)(w, torch.vmap(tx.init)(w))
    assert (drawn[0] == drawn[1]).all() == (randomness == "same")


@pytest.mark.parametrize(
    "ascent",
    [fs.sam(0.0), fs.asam(0.0), fs.sharpness_aware(fs.chain(fs.normalize(), fs.scale(0.0)))],
    ids=["sam", "asam", "sharpness_aware"],
)
def test_radius_zero_with_dropout(ascent):
    """It is the base optimizer if the masks are common; otherwise it is another step, from the same random numbers."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, lambda model, x: model(x).square().sum()), has_aux=True)

    def trained(*parts):
        tx, (params, buffers) = fs.chain(*parts, fs.sgd(0.01, momentum=0.9)), fs.nn.split(model)
        state = tx.init(params)
        torch.manual_seed(0)
        for _ in range(3):
            params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, torch.ones(4, 8))
        return params

    equal(trained(fs.common_randomness(), ascent), trained(fs.common_randomness()))
    assert (trained(ascent)["0.weight"] != trained()["0.weight"]).any()
    equal(trained(), trained())


@pytest.mark.compile
def test_compiling_it_is_refused():
    tx = fs.chain(fs.common_randomness(), fs.sam())
    step = torch.compile(lambda w, s: tx.step(w, lambda w: w, s), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="common_randomness: must run eagerly, got a call that is being compiled"):
        step(W, tx.init(W))


def test_a_seed_is_a_whole_number():
    with pytest.raises(TypeError, match="common_randomness: `seed` must be a whole number, got float"):
        fs.common_randomness(0.5)
