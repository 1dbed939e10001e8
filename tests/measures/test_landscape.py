"""`fs.landscape`: filter-normalised directions, grids and lines, in closed form."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcsam as fs
from funcsam import landscape
from tests.asserts import close, defaults, equal

XS, YS = [-1.0, 0.0, 0.5], [0.0, 2.0]
CHUNKS = (1, 2, 4, 100)


def network():
    """A convolution, batch normalisation and a linear layer, in float64."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
    return nn.Sequential(*layers).double()


def problem(model):
    """The loss of a module in its mode, and what it is called with."""
    torch.manual_seed(1)
    x, y = torch.randn(16, 1, 3, 3, dtype=torch.float64), torch.arange(16) % 4
    return fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y)), x, y


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 3, generator=generator, dtype=torch.float64) for name in "ab"}


def quadratic(params, curvature):
    """`sum h w^2 / 2`."""
    return sum((curvature[name] * w**2).sum() / 2 for name, w in params.items())


def product(first, second, curvature):
    return sum((curvature[name] * first[name] * second[name]).sum() for name in first)


# Directions


def oracle(weight, draw):
    """Li et al., section 4, filter by filter."""
    out = torch.zeros_like(weight)
    if weight.ndim > 1:
        for k in range(len(weight)):
            out[k] = draw[k] / draw[k].norm() * weight[k].norm()
    return out


def test_directions_are_those_of_the_paper():
    """Every filter of the draw over its norm, times the norm of the weights' filter; biases and batch-norm zero."""
    params, _ = fs.nn.split(network())
    generator = torch.Generator().manual_seed(3)
    for direction in landscape.directions(params, seed=3):
        wanted = {}
        for name in sorted(params):
            draw = torch.randn(params[name].shape, generator=generator)
            wanted[name] = oracle(params[name], draw.double())
        close(dict(sorted(direction.items())), wanted, rtol=1e-14)


def test_filters_have_the_norms_of_the_weights():
    params, _ = fs.nn.split(network())
    for direction in landscape.directions(params):
        for name in ("0.weight", "4.weight"):
            close(direction[name].flatten(1).norm(dim=1), params[name].flatten(1).norm(dim=1), rtol=1e-14)
        for name in ("0.bias", "1.weight", "1.bias", "4.bias"):
            equal(direction[name], torch.zeros_like(params[name]))


def test_two_solutions_share_the_draw():
    """Larger filters get a larger direction, and nothing else changes; neither does it with the precision."""
    weight = matrices(0)["a"]
    sizes = torch.tensor([[2.0], [0.25]], dtype=torch.float64)
    for one, other in zip(landscape.directions(weight), landscape.directions(sizes * weight), strict=True):
        close(other, sizes * one, rtol=1e-14)
    narrow = landscape.directions(weight.float())[1]
    close(narrow, landscape.directions(weight)[1].float(), rtol=1e-6)


def test_seeds_and_the_two_directions_differ():
    weight = torch.ones(50, 50)
    first, second = landscape.directions(weight, seed=0)
    draws = [first, second, *landscape.directions(weight, seed=1)]
    cosines = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0).abs() for a in draws for b in draws if a is not b]
    assert 0 < max(cosines) < 0.1
    equal(landscape.directions(weight, seed=0), (first, second))


def test_directions_leave_the_generator_alone():
    before = torch.get_rng_state()
    landscape.directions(torch.ones(2, 2))
    equal(torch.get_rng_state(), before)


def test_a_filter_of_zeros_stays():
    """A pruned filter does not move, and a filter that was not drawn is not NaN."""
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    direction = landscape.directions(weight)[0]
    equal(direction[0], torch.zeros(2))
    close(direction[1].norm(), torch.tensor(5.0), rtol=1e-6)
    equal(landscape.filter_normalize(torch.zeros(2, 2), weight), torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_directions_keep_the_dtype(dtype):
    weight = torch.full((3, 1000), 100.0).to(dtype)
    first, _ = landscape.directions(weight)
    assert first.dtype is dtype
    norms = [torch.linalg.vector_norm(x.to(torch.complex128), dim=1) for x in (first, weight)]
    close(*norms, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_filters_are_exact(dtype):
    """They are taken in float32: no square vanishes, no norm overflows, and the result is rounded once."""
    weight = torch.tensor([[2.0**-14], [2.0**12]]).expand(2, 4096).to(dtype)
    equal(landscape.filter_normalize(torch.ones_like(weight), weight), weight)
    weight, draw = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = oracle(weight.double(), draw.double())
    error = (landscape.filter_normalize(draw, weight).double() - wanted).abs() / wanted.abs()
    assert error.max() <= 0.51 * torch.finfo(dtype).eps


def test_directions_of_complex_weights_are_complex():
    """Real and imaginary parts are drawn alike."""
    first, second = landscape.directions(torch.full((50, 50), 1 + 0j))
    for direction in (first, second):
        close(direction.real.std(), direction.imag.std(), rtol=0.05)
    assert (first != second).all()


def test_members_have_directions_of_their_own():
    """`filter_normalize` goes under `vmap`."""
    weights, draws = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    looped = torch.stack([landscape.filter_normalize(d, w) for d, w in zip(draws, weights, strict=True)])
    close(torch.vmap(landscape.filter_normalize)(draws, weights), looped, rtol=1e-6)


# Grids


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_the_grid_of_a_quadratic(chunk_size):
    """`L(w + x d + y e) = L(w) + x w'Hd + y w'He + x^2 d'Hd / 2 + xy d'He + y^2 e'He / 2`; rows belong to `ys`."""
    w, d, e, h = (matrices(k) for k in range(4))
    got = landscape.grid(quadratic, w, (d, e), XS, YS, h, chunk_size=chunk_size)
    x, y = torch.tensor(XS, dtype=torch.float64), torch.tensor(YS, dtype=torch.float64)[:, None]
    wanted = quadratic(w, h) + x * product(w, d, h) + y * product(w, e, h)
    wanted = wanted + x**2 * quadratic(d, h) + x * y * product(d, e, h) + y**2 * quadratic(e, h)
    close(got, wanted, rtol=1e-13)


@pytest.mark.parametrize("train", [True, False])
def test_batches_of_points_are_the_loop(train):
    """Also with batch normalisation, whose statistics are those of each point or of the solution."""
    model = network().train(train)
    params, buffers = fs.nn.split(model)
    loss_fn, x, y = problem(model)
    pair = landscape.directions(params)
    want = torch.empty(len(YS), len(XS), dtype=torch.float64)
    for i, up in enumerate(YS):
        for j, across in enumerate(XS):
            moved = {name: w + across * pair[0][name] + up * pair[1][name] for name, w in params.items()}
            want[i, j] = loss_fn(moved, buffers, x, y)[0]
    for chunk_size in CHUNKS:
        close(landscape.grid(loss_fn, params, pair, XS, YS, buffers, x, y, chunk_size=chunk_size), want, rtol=1e-12)


def test_the_centre_is_the_solution():
    """Bit for bit."""
    model = network()
    params, buffers = fs.nn.split(model)
    loss_fn, x, y = problem(model)
    centre = landscape.grid(loss_fn, params, landscape.directions(params), [0.0], [0.0], buffers, x, y)
    equal(centre[0, 0], loss_fn(params, buffers, x, y)[0])


def test_the_statistics_are_a_matter_of_the_loss():
    """In training mode running statistics do not matter, in evaluation mode they do."""
    model = network()
    params, buffers = fs.nn.split(model)
    others = {**buffers, "1.running_var": 9 * buffers["1.running_var"]}
    pair = landscape.directions(params)
    for train in (True, False):
        loss_fn, x, y = problem(model.train(train))
        one, other = (landscape.grid(loss_fn, params, pair, XS, YS, each, x, y) for each in (buffers, others))
        assert torch.equal(one, other) is train


def test_the_scale_of_normalised_filters_does_not_matter():
    """A filter in front of batch normalisation may be of any size: the network is the same, and so is its picture."""
    model = network()
    nn.init.zeros_(model[0].bias)
    model[1].eps = 1e-30
    params, buffers = fs.nn.split(model)
    sizes = torch.tensor([0.5, 3.0, 10.0], dtype=torch.float64).view(3, 1, 1, 1)
    rescaled = {**params, "0.weight": sizes * params["0.weight"]}
    loss_fn, x, y = problem(model.train())
    one, other = (
        landscape.grid(loss_fn, p, landscape.directions(p), XS, YS, buffers, x, y) for p in (params, rescaled)
    )
    close(one, other, rtol=1e-12)


def test_the_scale_of_relu_layers_does_not_matter():
    """A layer three times as large, the next three times as small."""
    torch.manual_seed(0)
    x, params = torch.randn(8, 3), (torch.randn(5, 3), torch.randn(2, 5))
    rescaled = (3 * params[0], params[1] / 3)

    def loss_fn(params):
        return (torch.relu(x @ params[0].T) @ params[1].T).square().mean()

    one, other = (landscape.grid(loss_fn, p, landscape.directions(p), XS, YS) for p in (params, rescaled))
    close(one, other, rtol=1e-5)


def test_nothing_changes_and_no_graph_grows():
    """Params that require grad are values here; module, params and buffers stay as they are."""
    model = network()
    params, buffers = fs.nn.split(model)
    loss_fn, x, y = problem(model)
    tracked = {name: w.clone().requires_grad_() for name, w in params.items()}
    before = copy.deepcopy((model.state_dict(), params, buffers))
    pair = landscape.directions(params)
    for chunk_size in (1, 4):
        losses = landscape.grid(loss_fn, tracked, pair, XS, YS, buffers, x, y, chunk_size=chunk_size)
        assert not losses.requires_grad
    equal((model.state_dict(), params, buffers), before)


def test_a_loss_may_take_gradients():
    """A picture of the gradient norm: that of `w^2 / 2` is `|w|`."""
    grads_fn = fs.grad_and_value(lambda w: (w**2).sum() / 2)
    w, pair = torch.tensor([[1.0]]), (torch.tensor([[2.0]]), torch.tensor([[0.0]]))
    for chunk_size in (1, 2):
        got = landscape.grid(lambda w: grads_fn(w)[0].abs().sum(), w, pair, [-1.0, 0.0], [0.0], chunk_size=chunk_size)
        equal(got, torch.tensor([[1.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_same_in_batches(dtype):
    """Weights move in float32 and are rounded once per direction."""
    w, d, e = (torch.randn(4, 4, generator=torch.Generator().manual_seed(k)).to(dtype) for k in range(3))
    one, many = (
        landscape.grid(lambda w: w.float().square().sum(), w, (d, e), XS, YS, chunk_size=chunk) for chunk in (1, 100)
    )
    close(one, many, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_come_out_in_float32_at_least(dtype, chunk_size):
    w = torch.ones(2, 2, dtype=dtype)
    assert landscape.grid(torch.sum, w, (w, w), XS, YS, chunk_size=chunk_size).dtype is torch.float32
    assert landscape.line(torch.sum, w, w, XS, chunk_size=chunk_size).dtype is torch.float32


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_exact_in_the_precision_of_the_params(dtype, default):
    """0.1 is the 0.1 of the params, whatever the default dtype and the default device are."""
    w, d, none = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    ends, losses = torch.tensor([0.1], dtype=dtype), torch.tensor([[0.1]], dtype=dtype)
    with defaults(default):
        found = landscape.grid(torch.sum, w, (d, none), [0.1], [0.3]), landscape.line(torch.sum, w, d, [0.1])
    equal(found, (losses, ends))


def test_directions_do_not_depend_on_defaults():
    """A generator of the CPU draws on the CPU."""
    params, _ = fs.nn.split(network())
    wanted = landscape.directions(params)
    with defaults(torch.float64):
        found = landscape.directions(params)
    equal(found, wanted)


# Lines


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_the_line_of_a_quadratic(chunk_size):
    """`L((1 - t) a + t b) = (1 - t)^2 L(a) + t (1 - t) a'Hb + t^2 L(b)`, beyond the solutions too."""
    a, b, h = (matrices(k) for k in range(3))
    t = torch.tensor([-0.5, 0.0, 0.3, 1.0, 2.0], dtype=torch.float64)
    want = (1 - t) ** 2 * quadratic(a, h) + t * (1 - t) * product(a, b, h) + t**2 * quadratic(b, h)
    close(landscape.line(quadratic, a, b, t, h, chunk_size=chunk_size), want, rtol=1e-13)


def test_the_line_ends_in_the_solutions():
    """Bit for bit, in float32 too."""
    a, b = torch.tensor([0.1, 1e8]), torch.tensor([0.7, 1.0])
    got = landscape.line(lambda w: w.sin().sum(), a, b, [0.0, 1.0])
    equal(got, torch.stack([a.sin().sum(), b.sin().sum()]))


def test_a_line_with_batch_statistics_needs_no_buffers_of_its_own():
    """In training mode either solution's buffers give the same line."""
    model, other = network().train(), network()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    (params, buffers), (params_b, _) = fs.nn.split(model), fs.nn.split(other)
    loss_fn, x, y = problem(model)
    moved = {**buffers, "1.running_mean": buffers["1.running_mean"] + 5}
    lines = [landscape.line(loss_fn, params, params_b, [0.0, 0.5, 1.0], each, x, y) for each in (buffers, moved)]
    equal(*lines)
    equal(lines[0][2], loss_fn(params_b, buffers, x, y)[0])


# Progress, messages


def test_progress_counts_every_point():
    w = torch.ones(2, 2)
    for chunk_size, told in ((1, [1] * 6), (4, [4, 2]), (100, [6])):
        seen = []
        landscape.grid(torch.sum, w, (w, w), XS, YS, chunk_size=chunk_size, progress=seen.append)
        assert seen == told
    seen = []
    landscape.line(torch.sum, w, w, XS, chunk_size=2, progress=seen.append)
    assert seen == [2, 1]


W = torch.ones(2, 2)
CASES = [
    (
        lambda: landscape.directions(W, seed=0.5),
        TypeError,
        "directions: `seed` must be a whole number, got float.",
    ),
    (
        lambda: landscape.directions({"w": torch.ones(2, 2, dtype=torch.int64)}),
        TypeError,
        "directions: `params` must hold floating-point or complex tensors, got torch.int64 at ['w']. "
        "Pass what is not trained through the batch.",
    ),
    (
        lambda: landscape.directions({"b": torch.ones(2)}),
        ValueError,
        "directions: `params` must have a leaf of two axes or more, got none. Without filters every direction is zero.",
    ),
    (
        lambda: landscape.filter_normalize({"w": torch.ones(2)}, {"w": W}),
        ValueError,
        "filter_normalize: `direction` must have the shapes of `params`, got (2,) for (2, 2) at ['w'].",
    ),
    (
        lambda: landscape.grid(torch.sum, W, (W, W, W), XS, YS),
        ValueError,
        "grid: `directions` must be a pair of trees, got 3.",
    ),
    (
        lambda: landscape.grid(torch.sum, W, W, XS, YS),
        ValueError,
        "grid: `directions` must be a pair of trees, got Tensor.",
    ),
    (
        lambda: landscape.grid(torch.sum, {"w": W}, ({"w": W}, {}), XS, YS),
        ValueError,
        "grid: `directions[1]` must have the structure of `params`, got no leaf at ['w'].",
    ),
    (
        lambda: landscape.grid(torch.sum, W, (W, W), [], YS),
        ValueError,
        "grid: `xs` must have shape (n,) with n at least 1, got (0,).",
    ),
    (
        lambda: landscape.grid(torch.sum, W, (W, W), XS, W),
        ValueError,
        "grid: `ys` must have shape (n,) with n at least 1, got (2, 2).",
    ),
    (
        lambda: landscape.grid(torch.sum, W, (W, W), XS, torch.tensor([1j])),
        TypeError,
        "grid: `ys` must hold real numbers, got torch.complex64.",
    ),
    (
        lambda: landscape.grid(torch.sum, W, (W, W), 0.5, YS),
        TypeError,
        "grid: `xs` must be a tensor of shape (n,) or a sequence of numbers, got float.",
    ),
    (
        lambda: landscape.line(torch.sum, W, W, [0.0, lambda step: step]),
        TypeError,
        "line: `ts` must hold numbers, got function at [1].",
    ),
    (
        lambda: landscape.line(torch.sum, W, W, [0.0, -1e39]),
        ValueError,
        "line: `ts` must be finite in torch.float32, got -1e+39 at [1].",
    ),
    (
        lambda: landscape.grid(torch.sum, W, (W, W), [0.0, float("nan")], YS),
        ValueError,
        "grid: `xs` must be finite, got nan at [1].",
    ),
    (
        lambda: landscape.grid(torch.sum, W, (W, W), XS, YS, chunk_size=0),
        ValueError,
        "grid: `chunk_size` must be at least 1, got 0.",
    ),
    (
        lambda: landscape.grid(lambda w: w, W, (W, W), XS, YS, chunk_size=2),
        ValueError,
        "grid: `loss_fn` must return a loss of shape (), or a pair of it and more, got (2, 2).",
    ),
    (
        lambda: landscape.line(lambda w: 1.0, W, W, XS),
        ValueError,
        "line: `loss_fn` must return a loss of shape (), or a pair of it and more, got float.",
    ),
    (lambda: landscape.line(3, W, W, XS), TypeError, "line: `loss_fn` must be a function, got int."),
    (
        lambda: landscape.line(torch.sum, {"w": W}, {"v": W}, XS),
        ValueError,
        "line: `end` must have the structure of `start`, got no leaf at ['w'].",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), CASES, ids=[case[2][:60] for case in CASES])
def test_bad_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()


def test_random_losses_are_refused_in_batches():
    """A picture of dropout masks says nothing; torch says so where it can see it."""
    with pytest.raises(RuntimeError, match="random"):
        landscape.grid(lambda w: F.dropout(w).sum(), W, (W, W), XS, YS, chunk_size=2)
