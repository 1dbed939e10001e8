"""The torch.optim front end: the seed's class without its bugs, each test named after the complaint."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcsam as fs
from funcsam.torch_optim import SAM, Optimizer, SharpnessAware
from tests.asserts import close, equal
from tests.modules import MODULES, batches, built, loss, pure_loop

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


def model_and_data(name="linear", steps=4):
    return built(MODULES[name]), batches(steps)


def two_step(optimizer, model, data):
    """The loop of the seed's README."""
    losses = []
    for batch in data:
        first = loss(model, *batch)
        first.backward()
        optimizer.first_step(zero_grad=True)
        loss(model, *batch).backward()
        optimizer.second_step(zero_grad=True)
        losses.append(first.item())
    return losses


def closures(optimizer, model, data):
    """The closure takes both passes."""
    losses = []
    for batch in data:

        def closure(batch=batch):
            value = loss(model, *batch)
            value.backward()
            return value

        losses.append(optimizer.step(closure).item())
    return losses


def backward_first(optimizer, model, data):
    """The seed's way with a closure: the first pass is done before."""
    losses = []
    for batch in data:
        first = loss(model, *batch)
        first.backward()

        def closure(batch=batch):
            value = loss(model, *batch)
            value.backward()
            return value

        optimizer.step(closure)
        losses.append(first.item())
    return losses


class Reference:
    """The published algorithm, transcribed on lists of tensors, with the guard `1e-12` of the well-known class."""

    def __init__(self, groups, base):
        self.groups, self.base = groups, base

    def run(self, model, data):
        for batch in data:
            self.base.zero_grad()
            loss(model, *batch).backward()
            leaves = [(group, p) for group in self.groups for p in group["params"]]
            size = lambda group, p: p.abs() if group["adaptive"] else 1.0  # noqa: E731
            norm = torch.stack([(size(group, p) * p.grad).norm() for group, p in leaves]).norm()
            before = [p.detach().clone() for _, p in leaves]
            with torch.no_grad():
                for group, p in leaves:
                    p += size(group, p) ** 2 * p.grad * group["rho"] / (norm + 1e-12)
            self.base.zero_grad()
            loss(model, *batch).backward()
            with torch.no_grad():
                for (_, p), w in zip(leaves, before, strict=True):
                    p.copy_(w)
            self.base.step()


LOOPS = [two_step, closures, backward_first]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("rho", "adaptive"), [(0.05, False), (0.5, True)])
@pytest.mark.parametrize(
    ("base", "numbers"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}), (torch.optim.AdamW, {"lr": 0.01})],
    ids=["sgd", "adamw"],
)
def test_a_loop_for_the_seeds_class(loop, rho, adaptive, base, numbers):
    """Changing the import changes nothing but the bugs: the same params after forty steps."""
    model, data = model_and_data(steps=40)
    other = copy.deepcopy(model)
    loop(SAM(model.parameters(), base, rho=rho, adaptive=adaptive, **numbers), model, data)
    group = {"params": list(other.parameters()), "rho": rho, "adaptive": adaptive}
    Reference([group], base(other.parameters(), **numbers)).run(other, data)
    close(fs.nn.split(model)[0], fs.nn.split(other)[0], rtol=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_param_groups_under_one_norm(loop):
    """Each with its own rho, adaptivity, learning rate and decay."""
    model, data = model_and_data(steps=10)
    other = copy.deepcopy(model)

    def groups(model):
        weights = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim < 2]
        return [
            {"params": weights, "rho": 0.5, "adaptive": True, "lr": 0.1, "weight_decay": 0.01},
            {"params": others, "lr": 0.05},
        ]

    optimizer = SAM(groups(model), rho=0.1, **SGD)
    loop(optimizer, model, data)
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.1]
    numbers = [{"rho": 0.1, "adaptive": False} | group for group in groups(other)]
    base = torch.optim.SGD(groups(other), lr=0.1, momentum=0.9)
    Reference(numbers, base).run(other, data)
    close(fs.nn.split(model)[0], fs.nn.split(other)[0], rtol=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["batch norm", "tied and shared", "attention", "sparse embedding"])
def test_it_is_the_pure_chain(loop, name):
    """`chain(sam(rho), sgd(lr, momentum))`, params, losses and buffers."""
    model, data = model_and_data(name)
    params, buffers, losses = pure_loop(model, data, tx=fs.chain(fs.sam(0.2), fs.sgd(0.1, momentum=0.9)))
    numbers = SGD | ({"momentum": 0.0} if name == "sparse embedding" else {})
    if name == "sparse embedding":
        params, buffers, losses = pure_loop(model, data, tx=fs.chain(fs.sam(0.2), fs.sgd(0.1)))
    found = loop(SAM(model.parameters(), rho=0.2, model=model, **numbers), model, data)
    close(fs.nn.split(model), (params, buffers))
    close(torch.tensor(found, dtype=torch.float64), torch.stack(losses))


class Bags(nn.Module):
    """Two embeddings around a linear layer, and in front and behind a param that the loss does not use."""

    def __init__(self, sparse):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))
        self.first = nn.EmbeddingBag(8, 4, mode="sum", sparse=sparse)
        self.layer = nn.Linear(4, 4)
        self.last = nn.EmbeddingBag(8, 4, mode="sum", sparse=sparse)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x):
        words = (x.abs() * 4).long().clamp(max=7)
        return self.last(words.flip(1)) + torch.tanh(self.layer(self.first(words)))


BAGS = {
    "sam": lambda model: SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1),
    "asam": lambda model: SAM(model.parameters(), torch.optim.SGD, rho=0.3, adaptive=True, lr=0.1),
    "mean": lambda model: SharpnessAware(
        model.parameters(), torch.optim.Adam, fs.chain(fs.normalize(), fs.scale(0.3)), mean, lr=0.1
    ),
    "groups": lambda model: SAM(
        [{"params": [p], "rho": 0.1 * k} for k, p in enumerate(model.parameters())], torch.optim.SGD, lr=0.1
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", BAGS)
def test_sparse_and_missing_gradients_among_others(name, loop):
    """Some gradients are sparse, some dense, some are not there: it is the step where all are dense."""
    params = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = Bags(sparse).double()
        optimizer = BAGS[name](model)
        optimizer.first_pass = "gradients" if loop is backward_first else "closure"
        loop(optimizer, model, batches(3))
        params.append(fs.nn.split(model)[0])
    close(*params)
    equal((params[0]["unused"], params[0]["idle"]), (torch.ones(2).double(), torch.ones(3).double()))


def test_sparse_gradients_in_a_whole_chain():
    """The pure parts see dense ones."""
    params = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = Bags(sparse).double()
        closures(Optimizer(model.parameters(), CHAIN), model, batches(3))
        params.append(fs.nn.split(model)[0])
    close(*params)


@pytest.mark.parametrize(("rhos", "adaptive"), [((0.1, 0.1, 0.4), (0, 0, 0)), ((0.2, 0.2, 0.2), (0, 1, 0))])
def test_groups_that_differ_in_one(rhos, adaptive):
    """Neither the first group nor most of them stand for all."""
    model, data = model_and_data()
    other = copy.deepcopy(model)

    def groups(model):
        leaves = list(model.parameters())
        parts = (leaves[:1], leaves[1:3], leaves[3:])
        return [
            {"params": part, "rho": rho, "adaptive": bool(on)}
            for part, rho, on in zip(parts, rhos, adaptive, strict=True)
        ]

    closures(SAM(groups(model), **SGD), model, data[:1])
    plain = [{"params": group["params"]} for group in groups(other)]
    Reference(groups(other), torch.optim.SGD(plain, lr=0.1, momentum=0.9)).run(other, data[:1])
    close(fs.nn.split(model)[0], fs.nn.split(other)[0], rtol=1e-6)


def mean(grads, probe, step):
    """Half of each."""
    return fs.tree.scale(0.5, fs.tree.add(grads, probe))


def fading(grads, probe, step):
    """A weight that moves with the step."""
    return fs.tree.add_scaled(probe, -1 / (1.0 + step), fs.tree.reject(grads, probe))


FADING = fs.sharpness_aware(fs.chain(fs.normalize(), fs.scale(0.5)), fading)


def fading_optimizer(model):
    climb = fs.chain(fs.normalize(), fs.scale(0.5))
    return SharpnessAware(model.parameters(), torch.optim.SGD, climb, fading, model=model, lr=0.1)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_combination_sees_the_step(loop):
    """The number of steps so far, as in a chain."""
    model, data = model_and_data("batch norm")
    wanted = pure_loop(model, data, tx=fs.chain(FADING, fs.sgd(0.1)))
    loop(fading_optimizer(model), model, data)
    close(fs.nn.split(model), wanted[:2], rtol=1e-6)


def saved_and_loaded(model, optimizer):
    """Both, from a file."""
    twin = copy.deepcopy(model)
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    loaded = fading_optimizer(twin)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return twin, loaded


@pytest.mark.parametrize(
    "carry",
    [saved_and_loaded, lambda *pair: copy.deepcopy(pair), lambda *pair: pickle.loads(pickle.dumps(pair))],
    ids=["a file", "a copy", "a pickle"],
)
def test_the_number_of_steps_is_saved(carry):
    model, data = model_and_data()
    optimizer = fading_optimizer(model)
    closures(optimizer, model, data[:2])
    twin, other = carry(model, optimizer)
    closures(optimizer, model, data[2:])
    closures(other, twin, data[2:])
    equal(fs.nn.split(twin)[0], fs.nn.split(model)[0])


def test_a_state_without_the_number_of_steps():
    """As version 0.1.0 saved it: the ascent goes on, the count starts at zero."""
    model, data = model_and_data()
    optimizer = fading_optimizer(model)
    closures(optimizer, model, data[:2])
    saved = optimizer.state_dict()
    step, climb = saved["funcsam"]
    assert (step, climb[1].step) == (2, 2)
    optimizer.load_state_dict({**saved, "funcsam": climb})
    old = copy.deepcopy(optimizer)
    old._state = climb
    assert pickle.loads(pickle.dumps(old)).state_dict()["funcsam"].step == 0
    closures(optimizer, model, data[2:])
    assert (optimizer.state_dict()["funcsam"].step, optimizer.state_dict()["funcsam"].ascent[1].step) == (2, 4)


@pytest.mark.parametrize("tx", [fs.looksam(0.5, k=3), fs.msam(0.5)], ids=["looksam", "msam"])
def test_members_that_are_whole_chains(tx):
    """What does not ask twice at every step, or not at the params, runs as a chain."""
    model, data = model_and_data("batch norm")
    chain = fs.chain(tx, fs.sgd(0.1))
    wanted = pure_loop(model, data, tx=chain)
    losses = closures(Optimizer(model.parameters(), chain, model=model), model, data)
    close(fs.nn.split(model), wanted[:2], rtol=1e-6)
    close(torch.tensor(losses), torch.stack(wanted[2]).float(), rtol=1e-5)


@pytest.mark.parametrize("loop", LOOPS)
def test_any_member_of_the_family(loop):
    """The same pure parts: an ascent and a combination."""
    climb = fs.chain(fs.normalize(), fs.scale(fs.cosine(0.3, 10)))
    model, data = model_and_data("batch norm")
    wanted = pure_loop(model, data, tx=fs.chain(fs.sharpness_aware(climb, combine=mean), fs.sgd(0.1, momentum=0.9)))
    optimizer = SharpnessAware(
        model.parameters(), SGD["base_optimizer"], climb, mean, model=model, lr=0.1, momentum=0.9
    )
    loop(optimizer, model, data)
    close(fs.nn.split(model), wanted[:2])


CHAIN = fs.chain(fs.clip_by_global_norm(1.0), fs.sam(0.2), fs.adamw(0.01))


FAILING = {
    "SAM": lambda model: SAM(model.parameters(), rho=0.5, model=model, **SGD),
    "a moving radius": lambda model: SharpnessAware(
        model.parameters(), torch.optim.AdamW, fs.scale(fs.cosine(0.5, 6)), mean, model=model, lr=0.1
    ),
    "chain": lambda model: Optimizer(model.parameters(), CHAIN, model=model),
}


def test_a_whole_chain():
    """`Optimizer` runs what a pure loop runs."""
    model, data = model_and_data("batch norm")
    params, buffers, losses = pure_loop(model, data, tx=CHAIN)
    found = closures(Optimizer(model.parameters(), CHAIN, model=model), model, data)
    close(fs.nn.split(model), (params, buffers))
    close(torch.tensor(found, dtype=torch.float64), torch.stack(losses))


def test_a_whole_chain_with_numbers_in_its_groups():
    """Where torch's schedulers find them; several groups give a list."""
    model, data = model_and_data()
    other = copy.deepcopy(model)
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim < 2]
    make = lambda lr, rho: fs.chain(fs.sam(rho), fs.sgd(lr, momentum=0.9))  # noqa: E731
    optimizer = Optimizer([{"params": weights}, {"params": biases, "lr": 0.02}], make, lr=0.1, rho=0.2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for batch in data:
        closures(optimizer, model, [batch])
        schedule.step()
    rate = lambda value: lambda step: value * 0.5**step  # noqa: E731
    rates = {name: rate(0.1 if p.ndim > 1 else 0.02) for name, p in other.named_parameters()}
    close(fs.nn.split(model)[0], pure_loop(other, data, tx=make(rates, 0.2))[0])


def test_the_groups_are_shared_with_the_base_optimizer():
    optimizer = SAM([nn.Parameter(torch.ones(2))], **SGD)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    assert isinstance(optimizer.base_optimizer, torch.optim.SGD)


@pytest.mark.parametrize("on", ["the optimizer", "its base"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_scheduler_on_either_object(on, loop):
    """Works, and does not warn that the optimizer never stepped."""
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), rho=0.2, **SGD)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer if on == "the optimizer" else optimizer.base_optimizer, 1, 0.5)
    other = copy.deepcopy(model)
    for batch in data:
        loop(optimizer, model, [batch])
        schedule.step()
    tx = fs.chain(fs.sam(0.2), fs.sgd(lambda step: 0.1 * 0.5**step, momentum=0.9))
    close(fs.nn.split(model)[0], pure_loop(other, data, tx=tx)[0])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 2),
    ],
    ids=["one cycle", "restarts", "cyclic"],
)
def test_other_schedulers(schedule):
    """Also those that move the momentum: the base optimizer sees what it would see alone."""
    numbers = []
    for make in (lambda params: SAM(params, **SGD), lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)):
        w = nn.Parameter(torch.ones(2))
        optimizer = make([w])
        moves, seen = schedule(optimizer), []
        for _ in range(3):

            def closure(w=w):
                value = (w**2).sum()
                value.backward()
                return value

            optimizer.step(closure)
            moves.step()
            group = getattr(optimizer, "base_optimizer", optimizer).param_groups[0]
            seen.append((group["lr"], group["momentum"]))
        numbers.append(seen)
    assert numbers[0] == numbers[1]


def test_a_radius_may_move():
    """`rho` in a group is read at every step, as a learning rate is."""
    model, data = model_and_data()
    other = copy.deepcopy(model)
    optimizer = SAM(model.parameters(), rho=0.2, **SGD)
    for k, batch in enumerate(data):
        optimizer.param_groups[0]["rho"] = 0.2 / (k + 1)
        closures(optimizer, model, [batch])
    tx = fs.chain(fs.sam(lambda step: 0.2 / (step + 1)), fs.sgd(0.1, momentum=0.9))
    close(fs.nn.split(model)[0], pure_loop(other, data, tx=tx)[0], rtol=1e-6)


# What users complain about


@pytest.mark.parametrize("make", ["SAM, sgd", "SAM, adamw", "a moving radius", "chain"])
def test_a_resumed_run_loses_its_momentum(make):
    """It does not: from a file, with a model of its own, the run goes on bit for bit."""
    made = {
        "SAM, sgd": lambda model: SAM(model.parameters(), rho=0.2, model=model, **SGD),
        "SAM, adamw": lambda model: SAM(model.parameters(), torch.optim.AdamW, adaptive=True, model=model, lr=0.01),
        "a moving radius": lambda model: SharpnessAware(
            model.parameters(), torch.optim.SGD, fs.chain(fs.normalize(), fs.scale(fs.cosine(0.5, 6))), lr=0.1
        ),
        "chain": lambda model: Optimizer(model.parameters(), CHAIN, model=model),
    }[make]
    model, data = model_and_data("batch norm", steps=6)
    whole = copy.deepcopy(model)
    closures(made(whole), whole, data)
    first = made(model)
    closures(first, model, data[:3])
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, file := io.BytesIO())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    later = built(MODULES["batch norm"], seed=5)
    second = made(later)
    later.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    closures(second, later, data[3:])
    equal(fs.nn.split(later)[0], fs.nn.split(whole)[0])


def test_the_base_optimizer_keeps_an_old_learning_rate_after_loading():
    """Groups are shared after `load_state_dict` as well, so a scheduler still reaches both."""
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), **SGD)
    closures(optimizer, model, data)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    optimizer.param_groups[0]["lr"] = 0.0
    before = fs.nn.split(model)
    closures(optimizer, model, data)
    equal(fs.nn.split(model), before)


def test_the_state_of_a_half_step_is_not_saved():
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), **SGD)
    loss(model, *data[0]).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="state_dict: must be called between steps, got an ascent without"):
        optimizer.state_dict()


def conditional(model, x, y, branch):
    """A loss of which one param is a part only on one branch."""
    extra = model["extra"].sum() * 0.1 if branch else 0.0
    return F.cross_entropy(model["layer"](x), y) + extra


@pytest.mark.parametrize("only", ["first", "second"])
@pytest.mark.parametrize("combine", [None, mean], ids=["sam", "mean"])
def test_a_gradient_in_only_one_of_the_passes(only, combine):
    """The param is not left at `w + e`, nothing is missing, and a gradient that is not there counts as zero."""
    model = nn.ModuleDict({"layer": nn.Linear(4, 4)}).double()
    model["extra"] = nn.Linear(2, 1, bias=False).double()
    model = nn.ModuleDict({"layer": model["layer"], "extra": nn.ParameterList([torch.ones(2, dtype=torch.float64)])})
    x, y = batches()[0]
    extra = model["extra"][0]
    climb = fs.chain(fs.normalize(), fs.scale(0.2))
    optimizer = SharpnessAware(model.parameters(), torch.optim.AdamW, climb, combine, lr=0.1, weight_decay=0.0)
    for branch, finish in ((only == "first", optimizer.first_step), (only == "second", optimizer.second_step)):
        value = F.cross_entropy(model["layer"](x), y) + (extra.sum() if branch else 0.0)
        value.backward()
        finish(zero_grad=True)
    moved = only == "second" or combine is not None
    assert torch.equal(extra.detach(), torch.ones(2, dtype=torch.float64)) != moved
    if moved:
        close(extra.detach(), torch.full((2,), 0.9, dtype=torch.float64), rtol=1e-6)


def test_a_param_that_is_frozen_or_unfrozen_midway():
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), rho=0.2, **SGD)
    model[0].requires_grad_(False)
    before = fs.nn.split(model)[1]
    closures(optimizer, model, data)
    equal(fs.nn.split(model)[1], before)
    model[0].requires_grad_(True)
    closures(optimizer, model, data)
    assert (model[0].weight.detach() != before["0.weight"]).any()


@pytest.mark.parametrize("loop", LOOPS)
def test_storage_is_rebound(loop):
    """It is not: addresses stay, so that views of the params see every step."""
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), rho=0.2, **SGD)
    views = [(p.data_ptr(), p.detach().view(-1), p) for p in model.parameters()]
    loop(optimizer, model, data)
    for pointer, view, p in views:
        assert p.data_ptr() == pointer
        equal(view, p.detach().view(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_drift_by_adding_and_subtracting(dtype):
    """They do not: with a learning rate of zero they are the same bits after many steps."""
    model, data = model_and_data(steps=20)
    model.to(dtype)
    before = fs.nn.split(model)
    two_step(SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0), model, [(x.to(dtype), y) for x, y in data])
    equal(fs.nn.split(model), before)


def test_a_zero_gradient_gives_nan():
    """It gives no step, in half precision too."""
    for dtype in (torch.float32, torch.float16):
        w = nn.Parameter(torch.ones(2, dtype=dtype))
        optimizer = SAM([w], torch.optim.SGD, lr=0.1)
        for _ in range(2):
            (0.0 * w).sum().backward()
            (optimizer.first_step if optimizer._saved_step is None else optimizer.second_step)(zero_grad=True)
        equal(w.detach(), torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_infinite_gradient_is_taken_for_a_small_one(bad):
    """It is not: the perturbation is NaN everywhere; the weights come back all the same."""
    w = nn.Parameter(torch.ones(3))
    optimizer = SAM([w], torch.optim.SGD, lr=0.1)
    (w * torch.tensor([bad, 1.0, 1.0])).sum().backward()
    optimizer.first_step(zero_grad=True)
    assert w.isnan().all()
    optimizer.restore()
    equal(w.detach(), torch.ones(3))


def test_a_huge_half_gradient_has_no_ascent():
    """Its norm is taken in float32: the perturbation has the length rho."""
    w = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = SAM([w], torch.optim.SGD, rho=1.0, lr=0.1)
    (w * 6e4).sum().backward()
    optimizer.first_step(zero_grad=True)
    equal(w.detach(), torch.full((4,), 0.5, dtype=torch.float16))


def test_a_deepcopy_and_a_pickle():
    """Go on as the original does, on params of their own."""
    model, data = model_and_data("batch norm")
    optimizer = SAM(model.parameters(), rho=0.2, model=model, **SGD)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    closures(optimizer, model, data[:2])
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    closures(optimizer, model, data[2:])
    for twin, copied in pairs:
        assert copied.param_groups is copied.base_optimizer.param_groups
        closures(copied, twin, data[2:])
        equal(fs.nn.split(twin), fs.nn.split(model))


def test_add_param_group():
    """It takes rho and the base optimizer's numbers from the defaults."""
    model, data = model_and_data()
    other = copy.deepcopy(model)
    optimizer = SAM(model[0].parameters(), rho=0.2, **SGD)
    optimizer.add_param_group({"params": list(model[2].parameters()), "rho": 0.4})
    assert [group["rho"] for group in optimizer.base_optimizer.param_groups] == [0.2, 0.4]
    closures(optimizer, model, data)
    rho = {name: 0.2 if name.startswith("0") else 0.4 for name, _ in other.named_parameters()}
    close(fs.nn.split(model)[0], pure_loop(other, data, tx=fs.chain(fs.sam(rho), fs.sgd(0.1, momentum=0.9)))[0])


def test_named_parameters():
    model, data = model_and_data()
    optimizer = SAM(
        [{"params": list(model[0].named_parameters())}, {"params": list(model[2].named_parameters())}], **SGD
    )
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    closures(optimizer, model, data)


@pytest.mark.parametrize("name", ["batch norm", "averages", "instance norm"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("given", [lambda model: model, lambda model: model.buffers()], ids=["model", "buffers"])
def test_running_statistics_are_updated_twice(loop, name, given):
    """They are not, whatever the type of the module; without the model they would be."""
    (model, data), (single, _) = model_and_data(name), model_and_data(name)
    known = model if name == "averages" else given(model)  # it rebinds its buffers: only the module knows them
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.0, model=known)
    loop(optimizer, model, data)
    for batch in data:
        loss(single, *batch)
    equal(fs.nn.split(model)[1], fs.nn.split(single)[1])
    twice = built(MODULES[name])
    loop(SAM(twice.parameters(), torch.optim.SGD, rho=0.2, lr=0.0), twice, data)
    assert any((a != b).any() for a, b in zip(twice.buffers(), model.buffers(), strict=True))


# Where the first pass comes from


def test_the_closure_returns_the_first_loss():
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), rho=0.5, **SGD)
    with torch.no_grad():
        wanted = loss(model, *data[0]).item()
    assert closures(optimizer, model, data[:1]) == [wanted]


def test_gradients_are_clear_after_a_step():
    """So that the next closure is not mistaken for a second pass."""
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), **SGD)
    for loop in (closures, backward_first, two_step):
        loop(optimizer, model, data[:1])
        assert all(p.grad is None for p in model.parameters())


def test_gradients_stay_where_nothing_is_said():
    """`first_step()` and `second_step()` leave them; `zero_grad=True` clears them."""
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), **SGD)
    for zero_grad in (False, True):
        for half in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            loss(model, *data[0]).backward()
            before = [p.grad.clone() for p in model.parameters()]
            half(zero_grad=zero_grad) if zero_grad else half()
            after = [p.grad for p in model.parameters()]
            assert all(g is None for g in after) if zero_grad else all(map(torch.equal, after, before))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_combination_gets_the_gradients_in_this_order(loop):
    """That of the params first, also where the caller zeroes gradients in place between the passes."""
    combine = lambda grads, probe, step: fs.tree.add_scaled(probe, -0.25, grads)  # noqa: E731
    climb = fs.chain(fs.normalize(), fs.scale(0.3))
    model, data = model_and_data()
    wanted = pure_loop(model, data, tx=fs.chain(fs.sharpness_aware(climb, combine=combine), fs.sgd(0.1)))
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, climb, combine, lr=0.1)
    zero_grad = optimizer.zero_grad
    optimizer.zero_grad = lambda: zero_grad(set_to_none=loop is not two_step)
    loop(optimizer, model, data)
    close(fs.nn.split(model)[0], wanted[0])


def test_the_radius_of_any_group_may_move():
    """Not of the first alone."""
    model, data = model_and_data()
    other = copy.deepcopy(model)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    optimizer = SAM(groups, rho=0.2, **SGD)
    for k, batch in enumerate(data):
        optimizer.param_groups[1]["rho"] = 0.2 / (k + 1)
        closures(optimizer, model, [batch])
    moving = lambda step: 0.2 / (step + 1)  # noqa: E731
    rho = {name: 0.2 if name.startswith("0") else moving for name, _ in other.named_parameters()}
    close(fs.nn.split(model)[0], pure_loop(other, data, tx=fs.chain(fs.sam(rho), fs.sgd(0.1, momentum=0.9)))[0])


@pytest.mark.parametrize("name", FAILING)
def test_a_step_where_no_gradients_are_taken(name):
    """The closure computes them under `torch.no_grad()` as well."""
    model, data = model_and_data("batch norm")
    other = copy.deepcopy(model)
    closures(FAILING[name](other), other, data)
    optimizer = FAILING[name](model)
    with torch.no_grad():
        closures(optimizer, model, data)
    equal(fs.nn.split(model), fs.nn.split(other))


def test_a_half_accumulated_gradient_is_taken_for_a_first_pass():
    """Not with `first_pass="closure"`, which says what to do."""
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), first_pass="closure", **SGD)
    loss(model, *data[0]).backward()
    with pytest.raises(RuntimeError, match="gradients must be clear where the closure takes both passes, got some"):
        closures(optimizer, model, data[:1])
    optimizer.zero_grad()
    closures(optimizer, model, data[:1])
    strict = SAM(model.parameters(), first_pass="gradients", **SGD)
    with pytest.raises(RuntimeError, match="the first backward pass must be done before, got no gradients"):
        closures(strict, model, data[:1])


@pytest.mark.parametrize("when", ["before the loss", "before backward", "after backward"])
@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("name", FAILING)
def test_a_failing_closure_leaves_everything(name, bad, when):
    """Params, buffers and states are as they were, bit for bit, whichever pass raises; the next step goes on."""
    model, data = model_and_data("batch norm")
    optimizer, other = FAILING[name](model), copy.deepcopy(model)
    twin = FAILING[name](other)
    closures(optimizer, model, data[:1])
    closures(twin, other, data[:1])
    before, calls = copy.deepcopy((model.state_dict(), optimizer.state_dict())), []

    def closure():
        calls.append(0)
        if len(calls) == bad and when == "before the loss":
            raise ZeroDivisionError
        value = loss(model, *data[1])
        if len(calls) == bad and when == "before backward":
            raise ZeroDivisionError
        value.backward()
        if len(calls) == bad:
            raise ZeroDivisionError
        return value

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    after = model.state_dict(), optimizer.state_dict()
    equal(after[0], before[0])
    for key in ("state", "funcsam"):
        equal(after[1][key], before[1][key])
    assert all(p.grad is None for p in model.parameters())
    closures(optimizer, model, data[1:])
    closures(twin, other, data[1:])
    equal(model.state_dict(), other.state_dict())


def test_a_failing_second_pass_leaves_what_the_first_pass_wrote():
    """Where the first pass was done before `step`, its buffers are those that the call found."""
    model, data = model_and_data("batch norm")
    optimizer = SAM(model.parameters(), rho=0.5, model=model, **SGD)
    loss(model, *data[0]).backward()
    before = copy.deepcopy(model.state_dict())

    def closure():
        loss(model, *data[1])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    equal(model.state_dict(), before)


# Precision, accumulation, clipping


def scaled(scaler, model, batch, factor=1.0):
    """A closure in float16 autocast that scales its loss."""

    def closure():
        with torch.autocast("cpu", dtype=torch.float16):
            value = loss(model, *batch) * factor
        scaler.scale(value).backward()
        return value

    return closure


def single_precision(steps=4):
    model, data = model_and_data(steps=steps)
    return model.float(), [(x.float(), y) for x, y in data]


@pytest.mark.parametrize("climb", [fs.chain(fs.normalize(), fs.scale(0.2)), fs.scale(0.5)], ids=["sam", "no norm"])
def test_grad_scaler(climb):
    """Gradients are unscaled before the ascent: it is the pure chain with a loss scale of its own."""
    model, data = single_precision()
    pure = copy.deepcopy(model)

    def half(model, x, y):
        with torch.autocast("cpu", dtype=torch.float16):
            return loss(model, x, y)

    inner = fs.chain(fs.sharpness_aware(climb), fs.sgd(0.1, momentum=0.9))
    wanted, _, _ = pure_loop(pure, data, tx=fs.dynamic_loss_scale(inner, init_scale=256.0), loss=half)
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, climb, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for batch in data:
        optimizer.step(scaled(scaler, model, batch), scaler=scaler)
        scaler.update()
    close(fs.nn.split(model)[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("climb", [fs.chain(fs.normalize(), fs.scale(0.2)), fs.chain(fs.freeze(), fs.scale(0.2))])
@pytest.mark.parametrize("overflow", ["first", "second"])
def test_a_step_with_an_overflow_is_skipped_as_a_whole(overflow, climb):
    """Whichever pass overflows, seen by the other or not: params, momentum and ascent stay, the scale backs off."""
    model, data = single_precision()
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, climb, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer.step(scaled(scaler, model, data[0]), scaler=scaler)
    scaler.update()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    calls = []

    def closure():
        calls.append(0)
        bad = len(calls) == (1 if overflow == "first" else 2)
        return scaled(scaler, model, data[1], math.inf if bad else 1.0)()

    optimizer.step(closure, scaler=scaler)
    scaler.update()
    after = (model.state_dict(), optimizer.state_dict())
    equal(after[0], before[0])
    equal(after[1]["state"], before[1]["state"])
    equal(after[1]["funcsam"], before[1]["funcsam"])
    assert scaler.get_scale() == 128.0
    optimizer.step(scaled(scaler, model, data[2]), scaler=scaler)


def test_gradient_accumulation():
    """Both passes run over the micro-batches: SAM on the gradient of the whole batch."""
    model, data = model_and_data()
    other = copy.deepcopy(model)
    optimizer = SAM(model.parameters(), rho=0.2, **SGD)
    for x, y in data:

        def closure(x=x, y=y):
            total = 0.0
            for k in range(0, 6, 2):
                value = loss(model, x[k : k + 2], y[k : k + 2]) / 3
                value.backward()
                total += value.item()
            return total

        optimizer.step(closure)
    close(fs.nn.split(model)[0], pure_loop(other, data, tx=fs.chain(fs.sam(0.2), fs.sgd(0.1, momentum=0.9)))[0])


def test_clipping_in_the_closure_and_between_the_passes():
    """In the closure every evaluation is clipped; between the passes the SAM gradient is."""
    model, data = model_and_data()
    other = copy.deepcopy(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
    for batch in data:
        loss(model, *batch).backward()
        optimizer.first_step(zero_grad=True)
        loss(model, *batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.second_step(zero_grad=True)
    after = fs.chain(fs.sam(0.2), fs.clip_by_global_norm(0.3), fs.sgd(0.1))
    close(fs.nn.split(model)[0], pure_loop(other, data, tx=after)[0], rtol=1e-5)

    every = copy.deepcopy(other)
    optimizer = SAM(every.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
    for batch in data:

        def closure(batch=batch):
            value = loss(every, *batch)
            value.backward()
            nn.utils.clip_grad_norm_(every.parameters(), 0.3)
            return value

        optimizer.step(closure)
    before = fs.chain(fs.clip_by_global_norm(0.3), fs.sam(0.2), fs.sgd(0.1))
    close(fs.nn.split(every)[0], pure_loop(other, data, tx=before)[0], rtol=1e-5)


W = [nn.Parameter(torch.ones(2))]
BAD = [
    (lambda: SAM(W, torch.optim.SGD, rho=-1, lr=0.1), ValueError, "SAM: `rho` must be finite and non-negative, got -1"),
    (
        lambda: SAM(W, nn.Linear),
        TypeError,
        "SAM: `base_optimizer` must be a class of torch.optim, such as SGD, got Linear.",
    ),
    (lambda: SAM(W, torch.optim.SGD(W)), TypeError, "must be a class of torch.optim, such as SGD, got SGD."),
    (
        lambda: SAM(W, torch.optim.SGD, first_pass="both"),
        ValueError,
        'SAM: `first_pass` must be "auto", "closure" or "gradients", got \'both\'.',
    ),
    (
        lambda: SharpnessAware(W, torch.optim.SGD, 0.1),
        TypeError,
        "SharpnessAware: `ascent` must be a Transform, got float.",
    ),
    (lambda: SAM(W, **SGD).step(), TypeError, "step: `closure` must be a function that computes the loss and calls"),
    (lambda: SAM(W, **SGD).second_step(), RuntimeError, "second_step: must come after `first_step`, got no ascent"),
    (lambda: Optimizer(W, 0.1), TypeError, "Optimizer: `transform` must be a Transform, got float."),
    (
        lambda: Optimizer(W, fs.sgd(), lr=0.1),
        TypeError,
        "Optimizer: `transform` must be a function of the numbers that are given, got Transform.",
    ),
    (lambda: Optimizer(W, fs.sgd()).step(), TypeError, "step: `closure` must be a function that computes the loss"),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD, ids=[text for *_, text in BAD])
def test_bad_arguments_are_refused(make, error, text):
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


def test_a_step_without_a_closure_finishes_what_has_begun():
    """For trainers that call `step()` themselves."""
    model, data = model_and_data()
    other = copy.deepcopy(model)
    two_step(SAM(other.parameters(), rho=0.2, **SGD), other, data)
    optimizer = SAM(model.parameters(), rho=0.2, **SGD)
    for batch in data:
        loss(model, *batch).backward()
        optimizer.first_step(zero_grad=True)
        loss(model, *batch).backward()
        optimizer.step()
    equal(fs.nn.split(model), fs.nn.split(other))


def test_two_first_steps_in_a_row_are_refused():
    model, data = model_and_data()
    optimizer = SAM(model.parameters(), **SGD)
    loss(model, *data[0]).backward()
    optimizer.first_step()
    before = copy.deepcopy(model.state_dict())
    for again in (optimizer.first_step, lambda: optimizer.step(lambda: loss(model, *data[0]))):
        with pytest.raises(RuntimeError, match="first_step: must be followed by `second_step`, got another"):
            again()
    equal(model.state_dict(), before)


@pytest.mark.parametrize("copied", [False, True])
def test_a_base_optimizer_that_is_loaded_by_itself_stays_the_same_one(copied):
    """As `torch.distributed.checkpoint` does it: learning rates that are set afterwards still reach the descent."""
    w = nn.Parameter(torch.tensor(1.0))
    optimizer = SAM([w], torch.optim.SGD, rho=0.0, lr=0.1, momentum=0.9)
    if copied:
        optimizer = pickle.loads(pickle.dumps(optimizer))
    (w,) = optimizer.param_groups[0]["params"]
    optimizer.base_optimizer.load_state_dict(optimizer.base_optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.25

    def closure():
        value = w**2
        value.backward()
        return value

    optimizer.step(closure)
    assert w.item() == 0.5
    assert optimizer.state is optimizer.base_optimizer.state
