"""Slices of a batch: accumulation, m-sharpness, and an ascent on part of the batch, against written-out loops."""

import optree
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import funcsam as fs
from tests.asserts import close, equal
from tests.modules import MODULES, batches, built, loss, pure_loop
from tests.strategies import positives, tensors

SIZE = 3
chunk_sizes = st.sampled_from([None, 1, 2, 3])
data = st.integers(1, 9).flatmap(lambda n: st.tuples(tensors((n, SIZE)), tensors((n,))))
points = tensors((SIZE,))


def mean_loss(w, x, y):
    """The mean over examples of a loss that is neither linear nor quadratic."""
    return torch.cos(x @ w - y).mean()


GRADS_FN = fs.grad_and_value(mean_loss)


def updates(tx, w, x, y):
    """One update and the aux."""
    return optree.tree_map(torch.Tensor.clone, tx.update(w, GRADS_FN, tx.init(w), x, y)[::2])


def slices(m, n):
    """Consecutive slices that differ by one in size, the longer first."""
    sizes = [n // m + (k < n % m) for k in range(m)]
    return [torch.arange(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(m)]


@given(w=points, batch=data, m=st.integers(1, 9), chunk_size=chunk_sizes)
def test_accumulation_is_the_gradient_of_the_whole_batch(w, batch, m, chunk_size):
    """Gradient and loss, also where `m` does not divide the batch."""
    assume(m <= len(batch[0]))
    whole = updates(fs.identity(), w, *batch)
    close(updates(fs.microbatch(fs.identity(), m, chunk_size=chunk_size), w, *batch), whole)


@given(w=points, batch=data, m=st.integers(1, 9), rho=positives, chunk_size=chunk_sizes)
def test_accumulation_before_sam(w, batch, m, rho, chunk_size):
    """`chain(microbatch(identity(), m), sam(rho))` is SAM on the whole batch."""
    assume(m <= len(batch[0]))
    assume(updates(fs.identity(), w, *batch)[0].norm() > 1e-3)
    tx = fs.chain(fs.microbatch(fs.identity(), m, chunk_size=chunk_size), fs.sam(rho))
    close(updates(tx, w, *batch), updates(fs.sam(rho), w, *batch), rtol=1e-7)


@given(w=points, batch=data, m=st.integers(1, 9), rho=positives, chunk_size=chunk_sizes)
def test_m_sharpness(w, batch, m, rho, chunk_size):
    """`microbatch(sam(rho), m)` climbs once per slice: the mean over examples of `g_k(w + rho g_k / ||g_k||)`."""
    x, y = batch
    assume(m <= len(x))
    wanted = torch.zeros_like(w)
    for k in slices(m, len(x)):
        g = torch.func.grad(mean_loss)(w, x[k], y[k])
        assume(g.norm() > 1e-3)
        wanted += len(k) / len(x) * torch.func.grad(mean_loss)(w + rho * g / g.norm(), x[k], y[k])
    close(updates(fs.microbatch(fs.sam(rho), m, chunk_size=chunk_size), w, x, y), (wanted, mean_loss(w, x, y)), 1e-7)


@given(w=points, batch=data, rho=positives)
def test_one_slice_is_the_transform_itself(w, batch, rho):
    equal(updates(fs.microbatch(fs.sam(rho), 1), w, *batch), updates(fs.sam(rho), w, *batch))


@given(w=points, batch=data, m=st.integers(2, 9), chunk_sizes=st.tuples(chunk_sizes, chunk_sizes))
def test_chunk_size_changes_nothing(w, batch, m, chunk_sizes):
    """Neither the updates nor what is remembered."""
    assume(m <= len(batch[0]))
    tx = [fs.microbatch(fs.chain(fs.trace(0.5), fs.sam(0.1)), m, chunk_size=size) for size in chunk_sizes]
    close(*(each.update(w, GRADS_FN, each.init(w), *batch) for each in tx), rtol=1e-7)


@given(w=points, batch=data, fraction=positives, rho=positives)
def test_ascent_on_part_of_the_batch(w, batch, fraction, rho):
    """The ascent is that of the first part, the descent that of the whole."""
    x, y = batch
    part = -int(-fraction * len(x) // 1)
    g = torch.func.grad(mean_loss)(w, x[:part], y[:part])
    assume(g.norm() > 1e-3)
    wanted = torch.func.grad(mean_loss)(w + rho * g / g.norm(), x, y)
    tx = fs.sharpness_aware(fs.chain(fs.ascent_batch(fraction), fs.normalize(), fs.scale(rho)))
    close(updates(tx, w, x, y), (wanted, mean_loss(w, x[:part], y[:part])), rtol=1e-7)


def test_ascent_batch_costs_what_it_says():
    """A quarter of the examples for the ascent, all of them for the descent."""
    seen = []

    def grads_fn(w, x):
        seen.append(len(x))
        return w * x.mean()

    tx = fs.sharpness_aware(fs.chain(fs.ascent_batch(0.25), fs.normalize(), fs.scale(0.1)))
    tx.update(torch.ones(2), grads_fn, tx.init(torch.ones(2)), torch.ones(8))
    assert seen == [2, 8]


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_other_axes_trees_and_arguments(chunk_size):
    """Examples along any axis of any leaf, beside arguments that are not sliced and are not tensors."""
    x = torch.arange(24.0).reshape(2, 6, 2)
    batch = ({"x": x, "y": [torch.arange(6.0)]}, None, 3, torch.tensor(2.0))
    dims = ({"x": -2, "y": 0}, None, None, None)

    def grads_fn(w, examples, nothing, number, factor):
        return w * (examples["x"].mean((0, 2)) * examples["y"][0]).mean() * number * factor, ()

    w = torch.tensor(1.0)
    for m in (2, 3, 4):
        tx = fs.microbatch(fs.identity(), m, dims, chunk_size)
        close(tx.update(w, grads_fn, (), *batch)[0], grads_fn(w, *batch)[0], rtol=1e-6)


def test_a_loop_takes_one_slice_at_a_time():
    """With `chunk_size=1` no `vmap` is involved: the loss may do what it cannot batch."""
    seen = []

    def grads_fn(w, x):
        seen.append([round(v) for v in x.tolist()])
        return w * x.mean()

    fs.microbatch(fs.identity(), 3, chunk_size=1).update(torch.ones(()), grads_fn, (), torch.arange(7.0))
    assert seen == [[0, 1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("name", ["batch norm", "averages", "spectral norm"])
def test_m_sharpness_of_a_module(name):
    """Each slice normalises by its own statistics; running statistics move by their mean."""
    tx = fs.microbatch(fs.sam(0.2), 3, (None, 0, 0), chunk_size=1)
    model = built(MODULES[name])
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True)
    params, buffers = fs.nn.split(model)
    x, y = batches()[0]
    found, _, (value, new) = tx.update(params, grads_fn, tx.init(params), buffers, x, y)
    parts = [
        fs.sam(0.2).update(params, grads_fn, fs.sam(0.2).init(params), buffers, x[k], y[k]) for k in slices(3, len(x))
    ]
    close(found, optree.tree_map(lambda *u: sum(u) / 3, *(part[0] for part in parts)))
    close(value, sum(part[2][0] for part in parts) / 3)
    for key, leaf in new.items():
        each = [part[2][1][key] for part in parts]
        close(leaf, sum(each) / 3 if leaf.is_floating_point() else each[0])


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("m", [3, 4])
def test_of_whole_numbers_the_first_slice_counts(m, chunk_size):
    """Of `aux` and of states, under `vmap` and in a loop; numbers with a point are averaged by size, in their type."""
    x = torch.tensor([2, 7, 1, 8, 9, 5, 3])

    def update(params, grads_fn, state, x):
        first = x.gather(0, torch.zeros_like(x))[0]
        return params, {"n": first, "mean": x.double().mean()}, {"n": first, "on": first < 3, "half": x.half().mean()}

    tx = fs.microbatch(fs.Transform(lambda params: (), update), m, chunk_size=chunk_size)
    _, state, aux = tx.update(torch.ones(()), lambda w, x: w, (), x)
    close(state, {"n": torch.tensor(2), "mean": x.double().mean()})
    equal((aux["n"], aux["on"]), (torch.tensor(2), torch.tensor(True)))
    close(aux["half"], x.half().mean(), rtol=1e-3)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_means_of_half_precision_are_taken_in_float32(chunk_size):
    """Many small slices do not vanish beside their sum."""
    x = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    tx = fs.microbatch(fs.identity(), 512, chunk_size=chunk_size)
    equal(tx.update(torch.ones((), dtype=torch.bfloat16), lambda w, x: x.mean(), (), x)[0], x[0])


@pytest.mark.parametrize("name", ["batch norm", "batch norm 2d", "averages", "tied and shared", "group norm"])
def test_vmap_over_slices_of_a_module_is_a_loop(name):
    """Buffers are shared by the slices, and each writes to a copy of its own."""
    model = built(MODULES[name])
    tx = [fs.chain(fs.microbatch(fs.sam(0.2), 3, (None, 0, 0), size), fs.sgd(0.1)) for size in (None, 1)]
    close(*(pure_loop(model, batches(), tx=each) for each in tx), rtol=1e-7)


def test_slices_draw_random_numbers_of_their_own():
    """Under `vmap` too."""
    tx = fs.microbatch(fs.identity(), 4)
    w = torch.zeros(())
    masks = tx.update(w, lambda w, x: (w, torch.rand(8)), (), torch.ones(4))[2]
    assert ((masks > 0.1) & (masks < 0.9)).float().mean() > 0.8  # a mean of four draws, not one


BAD = [
    (lambda: fs.microbatch(0.1, 2), TypeError, "microbatch: `inner` must be a Transform, got float."),
    (lambda: fs.microbatch(fs.sam(), 0), ValueError, "microbatch: `m` must be at least 1, got 0."),
    (lambda: fs.microbatch(fs.sam(), 2.0), TypeError, "microbatch: `m` must be a whole number, got float."),
    (lambda: fs.microbatch(fs.sam(), 2, chunk_size=0), ValueError, "`chunk_size` must be at least 1, got 0."),
    (lambda: fs.ascent_batch(0.0), ValueError, "ascent_batch: `fraction` must be in (0, 1], got 0.0."),
    (lambda: fs.ascent_batch("half"), TypeError, "ascent_batch: `fraction` must be a number, got str."),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_arguments(make, error, text):
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


X = torch.ones(4, 2)
WRONG = [
    ((), 0, ValueError, "microbatch: the batch must have something to slice, got in_dims 0 for 0 arguments."),
    ((X,), None, ValueError, "the batch must have something to slice"),
    ((X, X), (0,), ValueError, "`in_dims` must have one entry per argument of the batch, got 1 for 2."),
    ((X, X.T), 0, ValueError, "the batch must have one size along `in_dims`, got 4 at argument 0 and 2 at argument 1."),
    ((X, 3), 0, TypeError, "the batch must hold tensors, got int at argument 1. Give it None in `in_dims`."),
    (({"x": X},), 2, ValueError, "`in_dims` must be axes of the batch, got 2 for shape (4, 2) at argument 0['x']."),
    ((X,), "0", TypeError, "`in_dims` must hold whole numbers or None, got str."),
    ((X,), ({"x": 0},), ValueError, "microbatch: `in_dims` must fit the batch, got ({'x': 0},)"),
    ((X[:2],), 0, ValueError, "the batch must have at least 3 examples, one per slice, got 2."),
]


@pytest.mark.parametrize(("batch", "in_dims", "error", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_batches_are_refused(batch, in_dims, error, text):
    with pytest.raises(error) as caught:
        fs.microbatch(fs.identity(), 3, in_dims).update(torch.ones(()), lambda w, *batch: w, (), *batch)
    assert text in str(caught.value)
