"""The table `.ci/docs/limits.md`, row by row: torch still cannot do it, and the way around works and is right.

A test that fails at its first line is good news: torch can do it now, and the row may go.
"""

import re
from pathlib import Path

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import funcsam as fs
from funcsam.core import tree
from tests.asserts import close, equal

TABLE = Path(__file__).parents[2] / ".ci" / "docs" / "limits.md"
W = torch.tensor([1.0, 2.0], dtype=torch.float64)


def compiled(fn):
    return torch.compile(fn, backend="eager", fullgraph=True)


def members(tx, grads_fn, stacked, *batch, dims=(), **options):
    """The params of all members after a step."""
    many = fs.ensemble.vectorize(tx, in_dims=dims, **options)
    return many.step(stacked, grads_fn, many.init(stacked), *batch)[0]


def sam():
    return fs.chain(fs.sam(0.1), fs.sgd(0.1))


def looped(tx, grads_fn, stacked, *batch):
    """The same, member by member, with one batch for all."""
    return fs.ensemble.stack([tx.step(w, grads_fn, tx.init(w), *batch)[0] for w in fs.ensemble.unstack(stacked)])


def test_the_table_has_these_rows():
    """A row for every test, and a test for every row."""
    rows = re.findall(r"^\|.*\| `(test_\w+)` \|$", TABLE.read_text(), re.MULTILINE)
    tests = [name for name in globals() if name.startswith("test_") and name != "test_the_table_has_these_rows"]
    assert rows == list(dict.fromkeys(rows))
    assert sorted(rows) == sorted(tests)


class Old(torch.autograd.Function):
    """The square, as it was written before torch 2.0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class New(torch.autograd.Function):
    """The square, as `torch.func` wants it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_old_functions():
    for transformed in (torch.func.grad(lambda w: Old.apply(w).sum()), torch.vmap(Old.apply)):
        with pytest.raises(RuntimeError, match="it must override the setup_context staticmethod"):
            transformed(W)
    old, new, plain = (fs.grad_and_value(lambda w, f=f: f(w).sum()) for f in (Old.apply, New.apply, torch.square))
    wanted = looped(sam(), plain, W[:, None])
    close(sam().step(W, old, sam().init(W)), sam().step(W, plain, sam().init(W)))
    close(members(sam(), old, W[:, None], chunk_size=1), wanted)
    close(members(sam(), new, W[:, None]), wanted)


def _thrifty(w, reentrant=False):
    return checkpoint(lambda w: (w**3).sin(), w, use_reentrant=reentrant).sum()


def _lavish(w):
    return (w**3).sin().sum()


@pytest.mark.compile
def test_checkpointing():
    refused = "don't yet support saved tensor hooks"
    with pytest.raises(RuntimeError, match=refused):
        torch.func.grad(_thrifty)(W)
    try:
        with pytest.raises(RuntimeError, match=refused):
            compiled(torch.func.grad(_thrifty))(W)
        with pytest.raises(RuntimeError, match=refused):
            _thrifty(W.clone().requires_grad_())
    finally:
        torch._C._autograd._saved_tensors_hooks_enable()
    thrifty, lavish = fs.grad_and_value(_thrifty), fs.grad_and_value(_lavish)
    close(sam().step(W, thrifty, sam().init(W)), sam().step(W, lavish, sam().init(W)))
    close(members(sam(), thrifty, W[:, None], chunk_size=1), looped(sam(), lavish, W[:, None]))


def test_reentrant_checkpointing():
    w = W.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"use_reentrant=True, torch\.utils.checkpoint is incompatible"):
        torch.autograd.grad(_thrifty(w, True), w)
    optimizer = fs.torch_optim.SAM([w], torch.optim.SGD, rho=0.1, lr=0.1)

    def closure():
        loss = _thrifty(w, True)
        loss.backward()
        return loss

    optimizer.step(closure)
    close(w.detach(), sam().step(W, fs.grad_and_value(_lavish), sam().init(W))[0])


def _penalty(grad):
    return lambda w: grad(w).square().sum()


def _autograd(w):
    return torch.autograd.grad((w**3).sum(), w, create_graph=True)[0]


def _func(w):
    return torch.func.grad(lambda w: (w**3).sum())(w)


@pytest.mark.compile
def test_autograd_inside_a_loss():
    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
        torch.vmap(_penalty(_autograd))(W[:, None])
    tracked = W.clone().requires_grad_()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.autograd\.grad"):
        compiled(_penalty(_autograd))(tracked)
    grads_fn, wanted = fs.grad_and_value(_penalty(_func)), 36 * W**3
    close(grads_fn(W)[0], wanted)
    close(torch.vmap(grads_fn)(W[:, None])[0], wanted[:, None])
    close(compiled(lambda w: grads_fn(w)[0])(W), wanted)


def test_foreach_kernels():
    with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::_foreach_add"):
        torch.vmap(lambda w: torch._foreach_add([w], [w])[0])(W)
    equal(torch.vmap(lambda w: tree.add({"w": w}, {"w": w}))(W), {"w": 2 * W})
    equal(torch.vmap(lambda w: tree.norm({"w": w}))(torch.outer(W, W)), W * W.norm())


@pytest.fixture
def sharded():
    """A DTensor over one process."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield fs.distributed.shard(W, init_device_mesh("cpu", (1,)))
    finally:
        distributed.destroy_process_group()


def test_methods_of_sharded_tensors(sharded):
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'full_tensor'"):
        torch.func.grad(lambda w: w.full_tensor().square().sum())(sharded)
    found = torch.func.grad(lambda w: fs.distributed.gather(w).square().sum())(sharded)
    close(found.full_tensor(), 2 * W)


def test_batch_norm_inside_of_a_derivative():
    """Where the scale is a param, the derivative of a batched gradient is off by far."""
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(4, n, 2, generator=draw, dtype=torch.float64) for n in (3, 1))
    w = w[:, 0] + 2

    def loss(w, x):
        return (F.batch_norm(torch.tanh(x * w), None, None, weight=w, training=True) ** 3).sum()

    gradient = torch.func.grad(loss)
    one = torch.func.grad(lambda w, x: gradient(w, x).square().sum())
    wanted = torch.stack([one(*each) for each in zip(w, x, strict=True)])
    through = torch.func.grad(lambda w: torch.vmap(gradient)(w, x).square().sum())(w)
    assert (through - wanted).abs().max() > 0.01 * wanted.abs().max()
    close(torch.vmap(one)(w, x), wanted)

    module = nn.BatchNorm1d(2).double()
    params, buffers = fs.ensemble.stack([fs.nn.split(module)] * 4)
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(module, lambda module, x: (module(x) ** 3).sum()), has_aux=True)

    def after(lr, chunk_size):
        return members(fs.sgd(lr), grads_fn, params, buffers, x, dims=0, chunk_size=chunk_size)["weight"].sum()

    lr = torch.tensor(0.1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="batch normalisation must not be differentiated through `vmap`"):
        torch.func.grad(after)(lr, None)
    close(torch.func.grad(after)(lr, 1), (after(lr + 1, None) - after(lr, None)))  # a step is linear in lr


def test_derivatives_of_running_statistics():
    module = nn.BatchNorm1d(2).double()
    loss_fn = fs.nn.loss_fn(module, lambda module, x: (module(x) ** 3).sum())
    params, buffers = fs.nn.split(module)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def statistics(scale):
        return loss_fn(params, buffers, scale * x)[1]["running_mean"]

    assert (statistics(torch.tensor(2.0)) != statistics(torch.tensor(1.0))).all()
    equal(torch.func.jacrev(statistics)(torch.tensor(1.0, dtype=torch.float64)), torch.zeros(2, dtype=torch.float64))

    def trained(lr):
        w, _, (_, after) = fs.sgd(lr).step(
            params, fs.grad_and_value(loss_fn, has_aux=True), fs.sgd(lr).init(params), buffers, x
        )
        return loss_fn(w, after, 2 * x + 1)[0]

    lr = torch.tensor(0.1, dtype=torch.float64)
    close(torch.func.grad(trained)(lr), (trained(lr + 1e-6) - trained(lr - 1e-6)) / 2e-6, rtol=1e-6)


class Cells(nn.Module):
    """What `nn.GRU` computes, as a loop over its cell."""

    def __init__(self, layer):
        super().__init__()
        self.cell = nn.GRUCell(layer.input_size, layer.hidden_size)
        for ours, theirs in zip(self.cell.parameters(), layer.parameters(), strict=True):
            ours.data = theirs.data

    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return h


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.layer = kind(2, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0][:, -1]


def recurrent():
    """A layer, the same as a loop over cells, and three batches of two sequences."""
    torch.manual_seed(0)
    model = Last().double()
    return model, Cells(model.layer), torch.randn(3, 2, 4, 2, dtype=torch.float64)


def bare(model):
    """The gradient of a module's loss as torch alone gives it: `(params, buffers, x) -> grads`."""

    def gradient(params, buffers, x):
        def loss(params):
            copies = {name: buffer.clone() for name, buffer in buffers.items()}
            return functional_call(model, (params, copies), (x,)).square().sum()

        return torch.func.grad(loss)(params)

    return gradient


def _loss(model):
    return fs.grad_and_value(fs.nn.loss_fn(model, lambda model, x: model(x).square().sum()), has_aux=True)


def _gradient(model):
    grads_fn, (params, buffers) = _loss(model), fs.nn.split(model)
    return lambda x: list(grads_fn(params, buffers, x)[0].values())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:RNN module weights:UserWarning")
def test_recurrent_layers_in_vmap():
    model, cells, x = recurrent()
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        layer = Last(kind).double()
        with pytest.raises(RuntimeError, match=r"Batching rule not implemented for aten::(lstm|gru|rnn_tanh)"):
            torch.vmap(layer)(x)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        torch.vmap(bare(model), in_dims=(None, None, 0))(*fs.nn.split(model), x)
    wanted = [torch.stack(each) for each in zip(*map(_gradient(model), x), strict=True)]
    close(torch.vmap(_gradient(cells))(x), wanted)
    params, buffers = fs.ensemble.stack([fs.nn.split(model)] * 3)
    close(fs.ensemble.predict(model, params, buffers, x, in_dims=0, chunk_size=1), torch.stack(list(map(model, x))))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:RNN module weights:UserWarning")
def test_recurrent_layers_compiled():
    model, cells, x = recurrent()
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Attempted to wrap RNN, GRU, or LSTM"):
            compiled(Last(kind))(x[0].float())
    wanted = _gradient(model)(x[0])
    close(compiled(_gradient(cells))(x[0]), wanted)


def one_member_at_a_time(build, x, refused):
    """A step of two members that torch cannot batch, and can one after the other."""
    model = build().double()
    params, buffers = fs.ensemble.init(lambda: build().double(), seeds=[0, 1])
    with refused:
        torch.vmap(bare(model), in_dims=(0, 0, None))(params, buffers, x)
    grads_fn, pairs = _loss(model), fs.ensemble.unstack((params, buffers))
    wanted = fs.ensemble.stack([sam().step(p, grads_fn, sam().init(p), b, x)[0] for p, b in pairs])
    close(members(sam(), grads_fn, params, buffers, x, dims=(0, None), chunk_size=1), wanted)


def test_spectral_norm_in_vmap():
    refused = pytest.raises(RuntimeError, match=r"Batching rule not implemented for aten::div\.out")
    one_member_at_a_time(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)), W[None], refused)


@pytest.mark.compile
def test_cumulative_batch_norm():
    def build(momentum=None):
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=momentum))

    x = torch.outer(W, W + 1)
    cumulative = build().double()
    one_member_at_a_time(build, x, pytest.raises(RuntimeError, match=r"\.item\(\)"))
    with pytest.raises(torch._dynamo.exc.UserError, match="Could not guard on data-dependent expression"):
        compiled(bare(cumulative))(*fs.nn.split(cumulative), x)
    model = build(0.1).double()
    close(compiled(_gradient(model))(x), _gradient(model)(x))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_sparse_embeddings():
    words = torch.tensor([0, 2, 2])
    refused = pytest.raises(NotImplementedError, match="SparseCPU")
    one_member_at_a_time(lambda: nn.Embedding(3, 2, sparse=True), words, refused)
    model, dense = nn.Embedding(3, 2, sparse=True), nn.Embedding(3, 2)
    dense.load_state_dict(model.state_dict())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sparse Tensor"):
        compiled(bare(model))(*fs.nn.split(model), words)
    close(compiled(_gradient(dense))(words), _gradient(model)(words))


def test_fused_attention():
    """With one key the weights are 1, so the loss is `sum q^2` and its Hessian twice the unit matrix."""

    def loss(q):
        return F.scaled_dot_product_attention(q, q, q).square().sum()

    q = torch.ones(1, 1, 1, 2)
    with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product_.* is not implemented"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        close(fs.measures.hessian_trace(loss, q).mean, torch.tensor(4.0), rtol=1e-6)


@pytest.mark.compile
def test_generators_compiled():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="get_rng_state"):
        compiled(lambda w: (torch.get_rng_state(), w))(W)
    together = fs.chain(fs.common_randomness(), sam())
    noisy = fs.grad_and_value(lambda w: F.dropout(w**3).sum())
    with pytest.raises(Exception, match="common_randomness: must run eagerly, got a call that is being compiled"):
        compiled(lambda w, state: together.step(w, noisy, state))(W, together.init(W))
    masked = fs.grad_and_value(lambda w, mask: (mask * w**3).sum())
    mask = torch.tensor([2.0, 0.0], dtype=torch.float64)
    found = compiled(lambda w, state, mask: sam().step(w, masked, state, mask)[0])(W, sam().init(W), mask)
    close(found, torch.tensor([1 - 0.1 * 6 * 1.1**2, 2.0], dtype=torch.float64))


@pytest.mark.compile
def test_empty_dicts_compiled():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="DictMetaData"):
        compiled(lambda w, buffers: (w + 1, optree.tree_flatten(buffers)[0]))(W, {})
    grads_fn = fs.grad_and_value(lambda w, buffers, x: ((w * x).square().mean(), buffers), has_aux=True)
    tx = fs.chain(fs.microbatch(fs.identity(), 2, (None, 0), chunk_size=1), sam())
    given = (W, tx.init(W), {}, torch.stack([W, W + 1]))
    close(
        compiled(lambda w, state, buffers, x: tx.step(w, grads_fn, state, buffers, x))(*given),
        tx.step(W, grads_fn, *given[1:]),
    )


@pytest.mark.compile
def test_alpha_compiled():
    """`test_built_code_keeps_every_factor` in `test_compile.py` holds that funcsam's own code keeps its factors."""
    x, y = torch.eye(2), torch.ones(2, 2)
    lost = torch.compile(lambda x, y: torch.add(x @ y, y, alpha=3.0))(x, y)
    equal(lost, 2 * y)
    equal(x @ y + 3.0 * y, 4 * y)
