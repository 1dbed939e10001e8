"""Hyper-gradients: the derivative of a validation loss by rho, lr and eta, through unrolled steps."""

import pytest
import torch

import funcsam as fs
from tests.asserts import close
from tests.modules import MODULES, batches, built, loss

CHAINS = {
    "sam, sgd": (lambda rho, lr: fs.chain(fs.sam(rho), fs.sgd(lr, momentum=0.9)), {"rho": 0.1, "lr": 0.2}),
    "asam, adamw": (
        lambda rho, lr, eta: fs.chain(fs.asam(rho, eta), fs.adamw(lr)),
        {"rho": 0.3, "lr": 0.05, "eta": 0.1},
    ),
    "m-sharpness, groups": (
        lambda rho, lr: fs.chain(
            fs.microbatch(fs.sam(rho), 2, (None, 0, 0), chunk_size=1),
            fs.partition(lambda path, leaf: leaf.ndim > 1, {True: fs.sgd(lr, 0.9), False: fs.sgd(0.1)}),
        ),
        {"rho": 0.1, "lr": 0.2},
    ),
}
chains = pytest.mark.parametrize("chain", CHAINS)
models = pytest.mark.parametrize("name", ["linear", "batch norm", "batch norm 2d"])


def validation(name, make, trees):
    """The loss on held-out data after three steps, as a function of the hyperparameters.

    In training mode: for torch's autograd running statistics are constants, so the way through them would be missing.
    """
    model, (*training, held_out) = built(MODULES[name]), batches(4)
    loss_fn = fs.nn.loss_fn(model, loss)
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True)

    def outcome(numbers, trees=trees):
        tx, (params, buffers) = make(**numbers), trees
        state = tx.init(params)
        for batch in training:
            params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, *batch)
        return loss_fn(params, buffers, *held_out)[0]

    return outcome


def quotient(fn, numbers, name, step=1e-5):
    """A central difference."""
    return (fn({**numbers, name: numbers[name] + step}) - fn({**numbers, name: numbers[name] - step})) / (2 * step)


@models
@chains
def test_hyper_gradients_are_central_differences(name, chain):
    """In float64, through batch normalisation too."""
    make, numbers = CHAINS[chain]
    numbers = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    outcome = validation(name, make, fs.nn.split(built(MODULES[name])))
    found = torch.func.grad(outcome)(numbers)
    for key, derivative in found.items():
        assert derivative.abs() > 1e-6
        close(derivative / derivative.abs(), quotient(outcome, numbers, key) / derivative.abs(), rtol=1e-5)


@chains
def test_hyper_gradients_of_many_starts_at_once(chain):
    """`vmap` of `grad`, over hyperparameters and over models with batch normalisation."""
    make, numbers = CHAINS[chain]
    factors = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    many = {key: value * factors for key, value in numbers.items()}
    trees = [fs.nn.split(built(MODULES["batch norm"], seed)) for seed in range(3)]

    derivative = torch.func.grad(validation("batch norm", make, None))

    shared = torch.vmap(derivative, in_dims=(0, None))(many, trees[0])
    own = torch.vmap(derivative)(many, fs.ensemble.stack(trees))
    for k in range(3):
        single = fs.ensemble.member(many, k)
        close(fs.ensemble.member(shared, k), derivative(single, trees[0]), rtol=1e-7)
        close(fs.ensemble.member(own, k), derivative(single, trees[k]), rtol=1e-7)


def member_loss(name, chunk_size):
    """The mean loss of two members after two steps, as a function of the radius that they share."""
    model, (*training, held_out) = built(MODULES[name]), batches(3)
    loss_fn = fs.nn.loss_fn(model, loss)
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True)
    trees = fs.ensemble.stack([fs.nn.split(built(MODULES[name], seed)) for seed in range(2)])

    def outcome(rho):
        chain = fs.chain(fs.sam(rho), fs.sgd(0.2))
        tx = fs.ensemble.vectorize(chain, in_dims=(0, None, None), chunk_size=chunk_size)
        (params, buffers), state = trees, tx.init(trees[0])
        for batch in training:
            params, state, (_, buffers) = tx.step(params, grads_fn, state, buffers, *batch)
        members = fs.ensemble.unstack((params, buffers))
        return sum(loss_fn(*member, *held_out)[0] for member in members) / 2

    return outcome


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [("linear", None), ("group norm", None), ("averages", None), ("batch norm", 1), ("instance norm", 1)],
)
def test_a_radius_that_members_share(name, chunk_size):
    """The derivative of something that an ensemble computes."""
    rho, outcome = torch.tensor(0.1, dtype=torch.float64), member_loss(name, chunk_size)
    wanted = (outcome(rho + 1e-5) - outcome(rho - 1e-5)) / 2e-5
    for differentiate in (torch.func.grad(outcome), lambda rho: fs.grad_and_value(outcome)(rho)[0]):
        close(differentiate(rho) / wanted.abs(), wanted.sign(), rtol=1e-5)


@pytest.mark.parametrize("name", ["batch norm", "batch norm 2d", "instance norm"])
def test_what_torch_gets_wrong_is_refused(name):
    """Its batching rule of batch normalisation loses a term of the second derivative; without one it is allowed."""
    outcome = member_loss(name, None)
    outcome(torch.tensor(0.1))
    with pytest.raises(
        RuntimeError, match="batch normalisation must not be differentiated through `vmap`, got a hyper"
    ):
        torch.func.grad(outcome)(torch.tensor(0.1, dtype=torch.float64))
    for differentiate in (lambda rho: outcome(rho.requires_grad_()).backward(), fs.grad_and_value(outcome)):
        with pytest.raises(
            RuntimeError, match="batch normalisation must not be differentiated through `vmap`, got a hyper"
        ):
            differentiate(torch.tensor(0.1, dtype=torch.float64))


def test_forward_and_backward_agree():
    """`jacfwd` of the params after three steps is `jacrev`."""
    make, numbers = CHAINS["sam, sgd"]
    numbers = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
    outcome = validation("linear", make, fs.nn.split(built(MODULES["linear"])))
    close(torch.func.jacfwd(outcome)(numbers), torch.func.jacrev(outcome)(numbers), rtol=1e-9)
