"""Updates commute with `vmap`, `torch.compile` and differentiation."""

import optree
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import funcsam as fs
from funcsam.core import tree
from tests.asserts import close
from tests.strategies import LOSSES, Problem, ensembles, flat, member, problems, run, stack, structural, trees
from tests.zoo import ZOO, Claim, claiming, each, with_numbers


@each
@structural
@given(ensemble=ensembles())
def test_vmap_is_a_loop(entry, ensemble):
    """Members side by side take the steps that each takes alone."""
    params = stack(ensemble.members)
    state = torch.vmap(entry().init)(params)

    def steps(params, state):
        return run(entry(), Problem(params, ensemble.loss), 2, state)

    alone = [run(entry(), Problem(w, ensemble.loss), 2) for w in ensemble.members]
    assume(all(leaf.abs().max() < 1e6 for leaf in optree.tree_leaves(alone)))
    close(torch.vmap(steps)(params, state), stack(alone), rtol=1e-7)


@with_numbers
@structural
@given(problem=problems(), factors=st.lists(st.floats(0.1, 1), min_size=2, max_size=3))
def test_vmap_over_hyperparameters_is_a_loop(entry, problem, factors):
    """Every hyperparameter may be batched."""
    numbers = {name: torch.tensor(factors, dtype=torch.float64) * value for name, value in entry.numbers.items()}

    def steps(numbers):
        return run(entry(**numbers), problem, 2)

    alone = [steps(member(numbers, i)) for i in range(len(factors))]
    close(torch.vmap(steps)(numbers), stack(alone), rtol=1e-7)


@with_numbers
@structural
@given(problem=problems(), factor=st.floats(0.1, 1))
def test_a_tensor_is_a_number(entry, problem, factor):
    """A hyperparameter may be a tensor of shape (); updates keep the dtype of the params all the same."""
    numbers = {name: factor * value for name, value in entry.numbers.items()}
    single = Problem(optree.tree_map(lambda leaf: leaf.float(), problem.params), problem.loss)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    close(run(entry(**tensors), problem, 1), run(entry(**numbers), problem, 1))
    close(run(entry(**tensors), single, 1), run(entry(**numbers), single, 1), rtol=1e-5)


away = st.integers(512, 2048).map(lambda k: k / 1024) | st.integers(-2048, -512).map(lambda k: k / 1024)
smooth = st.builds(Problem, trees(away), st.sampled_from(LOSSES))


def _quotient(fn, x, step=1e-5):
    return (fn(x + step) - fn(x - step)) / (2 * step)


@with_numbers
@structural
@given(problem=smooth)
def test_differentiable_in_hyperparameters(entry, problem):
    """The derivative of a function of two steps by each number is the limit of its difference quotients."""
    assume(tree.norm(problem.grads) > 1e-2)
    assume(flat(run(entry(), problem, 2)[0]).abs().max() < 30)
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in entry.numbers.items()}

    def outcome(numbers):
        return torch.cos(flat(run(entry(**numbers), problem, 2)[0])).sum()

    wanted = {
        name: _quotient(lambda x, name=name: outcome({**numbers, name: x}), value) for name, value in numbers.items()
    }
    close(torch.func.grad(outcome)(numbers), wanted, rtol=1e-4)


@each
@structural
@given(problem=smooth)
def test_differentiable_in_initial_params(entry, problem):
    """The derivative of two steps along a direction is the same forwards, backwards and by differences."""
    assume(tree.norm(problem.grads) > 1e-2)

    def outcome(t):
        params = optree.tree_map(lambda w: w * (1 + 0.1 * t), problem.params)
        return torch.cos(flat(run(entry(), Problem(params, problem.loss), 2)[0])).sum()

    assume(flat(run(entry(), problem, 2)[0]).abs().max() < 30)
    zero = torch.zeros((), dtype=torch.float64)
    wanted = _quotient(outcome, zero)
    close(torch.func.grad(outcome)(zero), wanted, rtol=1e-4)
    close(torch.func.jvp(outcome, (zero,), (zero + 1,))[1], wanted, rtol=1e-4)


def fixed(loss):
    """A problem for the compiler."""
    params = {"w": torch.tensor([[0.5, -1.0], [2.0, 0.25]]), "b": [torch.tensor(1.5), torch.tensor([-0.5, 1.0])]}
    return Problem(params, loss)


COMPILED = [entry for entry in ZOO if entry.compiles]
ASKING = [entry for entry in COMPILED if entry.evaluations != (1, 1) or Claim.AT_PARAMS not in entry.claims]
PLAIN = fs.chain(*(entry() for entry in COMPILED if entry not in ASKING))
PROBING = {entry.name: entry() for entry in ASKING}


@pytest.mark.compile
@pytest.mark.parametrize("tx", [PLAIN, *PROBING.values()], ids=["all others in a chain", *PROBING])
def test_compile_is_eager(tx):
    """Three compiled steps are three steps: one frame, no graph break."""
    problem, counter = fixed(LOSSES[1]), CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(params, state):
        return tx.step(params, problem.grads_fn, state)

    params, state = problem.params, tx.init(problem.params)
    for _ in range(3):
        params, state, _ = step(params, state)
    close((params, state), run(tx, problem, 3), rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.compile
def test_a_schedule_compiles_once():
    """A schedule that moves at every step is read inside the graph."""
    problem, counter = fixed(LOSSES[2]), CompileCounter()
    tx = fs.chain(fs.sam(fs.cosine(0.5, 10)), fs.sgd(fs.warmup_cosine(0.1, 2, 10), momentum=0.9))
    step = torch.compile(lambda w, s: tx.step(w, problem.grads_fn, s)[:2], backend=counter, fullgraph=True)
    params, state = problem.params, tx.init(problem.params)
    for _ in range(4):
        params, state = step(params, state)
    close((params, state), run(tx, problem, 4), rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.compile
def test_a_tensor_rho_compiles_once():
    """A radius that is a tensor may change without compiling again."""
    problem, counter = fixed(LOSSES[2]), CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def update(params, state, rho):
        return fs.sam(rho).update(params, problem.grads_fn, state)[0]

    state = fs.sam().init(problem.params)
    for k in range(4):
        rho = torch.tensor(0.1 * (k + 1))
        close(update(problem.params, state, rho), fs.sam(rho).update(problem.params, problem.grads_fn, state)[0], 1e-5)
    assert counter.frame_count == 1


@pytest.mark.compile
def test_compile_of_vmap():
    """A compiled ensemble is an ensemble."""
    problem, tx = fixed(LOSSES[2]), fs.chain(fs.asam(0.5, eta=0.1), fs.adamw(0.1))
    params = stack([problem.params, optree.tree_map(lambda w: w + 0.5, problem.params)])
    state = torch.vmap(tx.init)(params)
    step = torch.vmap(lambda w, s: tx.step(w, problem.grads_fn, s))
    close(torch.compile(step, backend="eager", fullgraph=True)(params, state), step(params, state), rtol=1e-5)


@claiming(Claim.SPHERE)
@structural
@given(ensemble=ensembles(size=2), factors=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)))
def test_vmap_over_members_and_rho(entry, ensemble, factors):
    """One radius per member."""
    rhos = torch.tensor(factors, dtype=torch.float64)
    for w in ensemble.members:
        assume(tree.norm(Problem(w, ensemble.loss).grads) > 1e-6)

    def steps(params, rho):
        return run(entry(rho=rho), Problem(params, ensemble.loss), 1)[0]

    alone = [steps(w, rho) for w, rho in zip(ensemble.members, rhos, strict=True)]
    close(torch.vmap(steps)(stack(ensemble.members), rhos), stack(alone), rtol=1e-7)


def test_the_zoo_has_numbers():
    """Whatever takes a number is asked to batch it."""
    assert {name for entry in ZOO for name in entry.numbers} >= {"rho", "lr", "eta", "decay", "eps", "max_norm"}
