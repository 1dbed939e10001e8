"""Modules of every kind that keeps something in buffers, ties, freezes or is awkward in another way."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import funcsam as fs


class Tied(nn.Module):
    """One tensor under two names, and one submodule under two."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.again = self.last

    def forward(self, x):
        return self.again(torch.tanh(self.last(torch.tanh(self.first(x)))))


class Averages(nn.Module):
    """A custom module that writes to some buffers and rebinds others."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.calls += 1
            self.largest = torch.maximum(self.largest, x.abs().max())
            self.seen = self.seen | (x > 0).any(0)
        return self.linear(x - self.mean) / (1 + self.largest)


class Shadow(nn.Module):
    """Keeps a moving average of its weights in a frozen copy that it writes to."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.shadow = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.shadow.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return self.net(x) + self.shadow(x)


class Recurrent(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind(4, 4, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.layer(x.unflatten(1, (2, 2)).repeat(1, 1, 2))[0][:, -1]


class Words(nn.Module):
    """An embedding, attention and a normalisation."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embed = nn.Embedding(8, 4, sparse=sparse)
        self.block = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        words = self.embed((x.abs() * 4).long().clamp(max=7))
        return self.norm(words + self.block(words, words, words, need_weights=False)[0]).mean(1)


def _frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    return model


def _norms(*layers):
    return lambda: nn.Sequential(nn.Linear(4, 4), *(layer() for layer in layers), nn.Tanh(), nn.Linear(4, 4))


def _images(*layers):
    return lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 1), *(layer() for layer in layers), nn.Flatten(), nn.Linear(16, 4)
    )


def _spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4))


def _hooked():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4))


class Case(NamedTuple):
    """How a module is built, and what torch cannot do with it.

    Attributes:
        build: Builds it from torch's global generator.
        vmap: Whether `vmap` over its tensors takes it.
        compiles: Whether dynamo traces it as one graph.
    """

    build: Callable[[], nn.Module]
    vmap: bool = True
    compiles: bool = True


MODULES = {
    "linear": Case(_norms()),
    "tied and shared": Case(Tied),
    "frozen": Case(_frozen),
    "batch norm": Case(_norms(lambda: nn.BatchNorm1d(4))),
    "batch norm, cumulative": Case(_norms(lambda: nn.BatchNorm1d(4, momentum=None)), vmap=False, compiles=False),
    "batch norm 2d": Case(_images(lambda: nn.BatchNorm2d(4))),
    "instance norm": Case(_images(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True))),
    "group norm": Case(_images(lambda: nn.GroupNorm(2, 4))),
    "averages": Case(Averages),
    "shadow": Case(Shadow),
    "spectral norm": Case(_spectral, vmap=False),
    "spectral norm, hook": Case(_hooked, vmap=False),
    "lstm": Case(lambda: Recurrent(nn.LSTM), compiles=False),
    "gru": Case(lambda: Recurrent(nn.GRU), compiles=False),
    "attention": Case(Words),
    "sparse embedding": Case(lambda: Words(sparse=True), vmap=False, compiles=False),
}


def built(case, seed=0):
    """The module of a seed."""
    torch.manual_seed(seed)
    return case.build().double()


def loss(model, x, y):
    """The loss of all tests here."""
    return F.cross_entropy(model(x), y)


def batches(count=3, size=6):
    """Some batches."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, size, 4, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(4, (count, size), generator=generator), strict=True))


RHO, LR, MOMENTUM = 0.2, 0.1, 0.9


def sam():
    """The chain of all tests here."""
    return fs.chain(fs.sam(RHO), fs.sgd(LR, momentum=MOMENTUM))


def _everything(model):
    return (*model.named_parameters(), *model.named_buffers())


def _put(model, values):
    for name, tensor in _everything(model):
        tensor.copy_(values[name])


def plain_loop(model: nn.Module, data: Any, loss: Any = loss) -> list[float]:
    """SAM as one writes it with backward passes: both from the same buffers, of which those of the first are kept."""
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR, MOMENTUM)
    params, losses = [p for p in model.parameters() if p.requires_grad], []
    for batch in data:
        base.zero_grad()
        state = {name: t.detach().clone() for name, t in _everything(model)}
        first = loss(model, *batch)
        first.backward()
        kept = state | {name: t.detach().clone() for name, t in _everything(model) if not t.requires_grad}
        with torch.no_grad():
            _put(model, state)
            grads = [p.grad.to_dense() for p in params]
            norm = torch.cat([g.flatten() for g in grads]).norm()
            for p, g in zip(params, grads, strict=True):
                p += RHO * g / norm
        base.zero_grad()
        loss(model, *batch).backward()
        with torch.no_grad():
            _put(model, kept)
        for p in params:
            p.grad = p.grad.to_dense()
        base.step()
        losses.append(first.item())
    return losses


def pure_loop(model, data, tx=None, backend="auto", compile=None, trees=None, loss=loss):
    """The same with pure functions: `(params, buffers, losses)`."""
    tx = sam() if tx is None else tx
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True, backend=backend)
    params, buffers = fs.nn.split(model) if trees is None else trees
    state, losses = tx.init(params), []
    step = tx.step if compile is None else torch.compile(tx.step, backend=compile, fullgraph=True)
    for batch in data:
        params, state, (value, buffers) = step(params, grads_fn, state, buffers, *batch)
        losses.append(value)
    return params, buffers, losses


def allocated(run):
    """Bytes that torch allocates while a function runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")
