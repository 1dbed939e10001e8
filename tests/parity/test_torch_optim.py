"""The base optimizers are those of torch.optim: every option, four steps in float64, rtol 1e-9.

Conventions that differ: `maximize=True` is `scale(-1)` in front (weight decay behind it, as in torch), and
`clip_grad_norm_` divides by `norm + 1e-6`.
"""

import itertools

import optree
import pytest
import torch
from hypothesis import assume, given

import funcsam as fs
from funcsam.core import tree
from tests.asserts import close, equal
from tests.strategies import call, flat, problems, run, structural


def theirs(make, problem, steps=4):
    """The params after some steps of a torch optimizer."""
    params = optree.tree_map(lambda w: w.clone().requires_grad_(), problem.params)
    optimizer = make(optree.tree_leaves(params))
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(params).backward()
        optimizer.step()
    return optree.tree_map(lambda w: w.detach(), params)


def agree(tx, make, problem):
    """Asserts that four steps are the same, unless they run away."""
    wanted = theirs(make, problem)
    assume(flat(wanted).abs().max() < 1e3)
    close(run(tx, problem, 4)[0], wanted, rtol=1e-9)


def options(**values):
    """All combinations."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


SGD = [
    o
    for o in options(momentum=[0.0, 0.8], dampening=[0.0, 0.3], weight_decay=[0.0, 0.1], nesterov=[False, True])
    if not o["nesterov"] or (o["momentum"] and not o["dampening"])
]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("option", SGD, ids=str)
@structural
@given(problem=problems())
def test_sgd(option, maximize, problem):
    """Momentum, dampening, weight decay, Nesterov, maximize."""
    tx = fs.chain(fs.scale(-1), fs.sgd(0.01, **option)) if maximize else fs.sgd(0.01, **option)
    agree(tx, lambda params: torch.optim.SGD(params, 0.01, maximize=maximize, **option), problem)


@pytest.mark.parametrize("option", options(momentum=[0.5, 1.0], dampening=[0.0, 1.0]), ids=str)
@structural
@given(problem=problems())
def test_sgd_at_the_ends(option, problem):
    """Momentum 1 adds all gradients up, and dampening 1 keeps the first alone."""
    agree(fs.sgd(0.01, **option), lambda params: torch.optim.SGD(params, 0.01, **option), problem)


ADAM = options(betas=[(0.9, 0.999), (0.5, 0.7)], eps=[1e-8, 1e-2], weight_decay=[0.0, 0.1], amsgrad=[False, True])


@pytest.mark.parametrize("option", ADAM, ids=str)
@pytest.mark.parametrize("name", ["adam", "adamw"])
@structural
@given(problem=problems())
def test_adam(name, option, problem):
    """Betas, eps, weight decay (L2 and decoupled), AMSGrad."""
    mine, torchs = (fs.adam, torch.optim.Adam) if name == "adam" else (fs.adamw, torch.optim.AdamW)
    agree(mine(0.01, **option), lambda params: torchs(params, 0.01, **option), problem)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@given(problem=problems())
def test_adam_maximize(name, problem):
    """A sign in front."""
    mine, torchs = (fs.adam, torch.optim.Adam) if name == "adam" else (fs.adamw, torch.optim.AdamW)
    tx = fs.chain(fs.scale(-1), mine(0.01, weight_decay=0.1))
    agree(tx, lambda params: torchs(params, 0.01, weight_decay=0.1, maximize=True), problem)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@given(problem=problems())
def test_defaults(name, problem):
    """Defaults are torch's too."""
    torchs = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    agree(getattr(fs, name)(), torchs, problem)


@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.1, 2.0])
@given(problem=problems())
def test_clip(ratio, problem):
    """`clip_grad_norm_` up to its 1e-6; within the bound it scales by at most one as well."""
    grads, norm = problem.grads, tree.norm(problem.grads).item()
    assume(norm > 1e-3)
    params = optree.tree_map(lambda w: w.clone().requires_grad_(), problem.params)
    for w, g in zip(optree.tree_leaves(params), optree.tree_leaves(grads), strict=True):
        w.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(optree.tree_leaves(params), ratio * norm)
    clipped, _ = call(fs.clip_by_global_norm(ratio * norm), problem)
    close(clipped, optree.tree_map(lambda w: w.grad, params), rtol=2e-6 / norm + 1e-9)


UNUSED = {
    "sgd": (lambda: fs.sgd(0.1, 0.9, weight_decay=0.5), lambda ps: torch.optim.SGD(ps, 0.1, 0.9, weight_decay=0.5)),
    "adam": (lambda: fs.adam(0.1, weight_decay=0.5), lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.5)),
    "adamw": (lambda: fs.adamw(0.1, weight_decay=0.5), lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.5)),
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_param_that_the_loss_does_not_use(name):
    """Here it decays, as torch's does where its gradient is zero; torch skips it where its `grad` is None."""
    make, torchs = UNUSED[name]
    start = {"used": torch.tensor([3.0, -1.0]), "unused": torch.tensor([2.0, 4.0])}
    grads_fn = fs.grad_and_value(lambda w: w["used"].square().sum())

    def mine(tx):
        params, state = start, tx.init(start)
        for _ in range(3):
            params, state, _ = tx.step(params, grads_fn, state)
        return params

    def torch_alone(zeros):
        params = {key: w.clone().requires_grad_() for key, w in start.items()}
        optimizer = torchs(list(params.values()))
        for _ in range(3):
            optimizer.zero_grad()
            params["used"].square().sum().backward()
            if zeros:
                params["unused"].grad = torch.zeros(2)
            optimizer.step()
        return {key: w.detach() for key, w in params.items()}

    assert (mine(make())["unused"].abs() < start["unused"].abs()).all()
    close(mine(make()), torch_alone(zeros=True), rtol=1e-6)
    equal(torch_alone(zeros=False)["unused"], start["unused"])
    close(mine(fs.chain(make(), fs.freeze({"used": False, "unused": True}))), torch_alone(zeros=False), rtol=1e-6)
