"""Measures of sharpness: closed forms on quadratics, dense Hessians, and invariance under rescaling."""

import inspect
import itertools
import math
import sys

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import funcsam as fs
from funcsam import measures
from tests.asserts import close, equal
from tests.core.test_messages import refuses
from tests.strategies import ensembles, flat, member, positives, problems, stack, structural, unflat

A = torch.tensor([[2.0, 1.0, 0.0], [1.0, -6.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
B = torch.tensor([0.3, 0.8, -0.2], dtype=torch.float64)
MEASURES = {
    "gradient norm": measures.gradient_norm,
    "one step": lambda *args: measures.worst_case_sharpness(*args, rho=0.3),
    "four steps": lambda *args: measures.worst_case_sharpness(*args, rho=0.3, steps=4),
    "adaptive": lambda *args: measures.worst_case_sharpness(*args, rho=0.3, steps=2, adaptive=True, eta=0.1),
    "average": lambda *args: measures.average_case_sharpness(*args, rho=0.3, draws=3),
    "trace": lambda *args: measures.hessian_trace(*args, draws=3),
}
each = pytest.mark.parametrize("name", MEASURES)


def quadratic(e):
    """A loss whose minimum, saddle or maximum is not at zero."""
    return B @ e + 0.5 * e @ A @ e


def bowl(params):
    return sum(0.5 * (leaf**2).sum() for leaf in optree.tree_leaves(params))


def network(*sizes, dtype=torch.float64, seed=0):
    """Params of a ReLU network, and data."""
    g = torch.Generator().manual_seed(seed)
    params = {}
    for k, (a, b) in enumerate(itertools.pairwise(sizes)):
        params[f"w{k}"] = torch.randn(b, a, generator=g, dtype=dtype) / a**0.5
        params[f"b{k}"] = torch.randn(b, generator=g, dtype=dtype) / 2
    x, y = torch.randn(12, sizes[0], generator=g, dtype=dtype), torch.randint(0, sizes[-1], (12,), generator=g)
    return params, x, y


def loss_fn(params, x, y):
    for k in range(len(params) // 2):
        x = (F.relu(x) if k else x) @ params[f"w{k}"].T + params[f"b{k}"]
    return F.cross_entropy(x, y)


def smooth(params, x, y):
    return loss_fn({"w0": params["w0"], "b0": params["b0"]}, x, y) + sum(torch.sin(p).sum() for p in params.values())


def dense(loss, params, *batch):
    """The Hessian as a matrix, in the order of `flat`."""
    return torch.autograd.functional.hessian(lambda v: loss(unflat(v, params), *batch), flat(params))


# Worst case


def test_along_an_eigenvector_it_is_that_of_a_parabola():
    """`L = 3/2 w0^2 + 1/2 w1^2` at `(c, 0)` rises by `3 c rho + 3/2 rho^2`, whatever the number of steps."""
    w, rho = torch.tensor([0.5, 0.0], dtype=torch.float64), 0.2
    for steps in (1, 2, 7):
        rise = measures.worst_case_sharpness(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2, w, rho=rho, steps=steps)
        close(rise, torch.tensor(3 * 0.5 * rho + 1.5 * rho**2, dtype=torch.float64))


@given(problems(), positives)
def test_one_step_looks_where_sam_looks(problem, rho):
    """`L(w + rho g / ||g||) - L(w)`, on one vector."""
    w, g = flat(problem.params), flat(problem.grads)
    wanted = problem.loss(w + rho * g / (g.norm() if g.any() else 1)) - problem.loss(w)
    close(measures.worst_case_sharpness(problem.loss, problem.params, rho=rho), wanted)


def ascended(loss, w, rho, steps, eta):
    """The definition in the coordinates of the params: what is visited."""
    t, e, visited = w.abs() + eta, torch.zeros_like(w), []
    for _ in range(steps):
        g = torch.func.grad(loss)(w + e)
        size = (t * g).norm()
        e = e + rho * t**2 * g / size if size else e
        length = (e / t).norm()
        e = e * rho / length if length > rho else e
        visited.append(e)
    return visited


@given(problems(), positives, positives, st.integers(1, 5))
def test_several_steps_are_projected_ascent(problem, rho, eta, steps):
    """The largest rise over the points of projected, normalised ascent in the ball `||T^-1 e|| <= rho`."""
    w = flat(problem.params)
    rises = [problem.loss(w + e) - problem.loss(w) for e in ascended(problem.loss, w, rho, steps, eta)]
    got = measures.worst_case_sharpness(problem.loss, problem.params, rho=rho, steps=steps, adaptive=True, eta=eta)
    close(got, torch.stack(rises).max(), rtol=1e-7)


@given(problems(), positives)
def test_more_steps_never_find_less(problem, rho):
    """The points of fewer steps are among those of more."""
    found = [measures.worst_case_sharpness(problem.loss, problem.params, rho=rho, steps=n) for n in (1, 2, 4, 8)]
    assert found == sorted(found)


def test_the_best_point_counts_and_not_the_last():
    """`L = -(w - 0.1)^2` from 0 with radius 1: the first step overshoots to 1, the next is back at 0, and so on."""
    w = torch.tensor(0.0, dtype=torch.float64)
    rises = [measures.worst_case_sharpness(lambda w: -((w - 0.1) ** 2), w, rho=1.0, steps=n) for n in (1, 2, 3)]
    close(torch.stack(rises), torch.tensor([-0.8, 0.0, 0.0], dtype=torch.float64))


def test_many_steps_find_the_top_of_the_ball():
    """The maximum of an indefinite quadratic over a ball solves `(mu - A) e = b`, `||e|| = rho`, `mu > lambda_max`."""
    values, vectors = torch.linalg.eigh(A)
    b, rho = vectors.T @ B, 0.7
    low, high = float(values[-1]), float(values[-1]) + 100
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (b / (mu - values)).norm() > rho else (low, mu)
    wanted = quadratic(vectors @ (b / (mu - values)))
    close(measures.worst_case_sharpness(quadratic, torch.zeros_like(B), rho=rho, steps=60), wanted)
    assert measures.worst_case_sharpness(quadratic, torch.zeros_like(B), rho=rho, steps=1) < 0 < wanted


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_it_stays_in_the_ball(eta):
    """Every point is within `||T^-1 e|| <= rho`; there are `steps` gradients and one loss."""
    w, points = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64), []

    def spy(w):
        points.append(w.detach())
        return quadratic(w)

    measures.worst_case_sharpness(spy, w, rho=0.4, steps=6, adaptive=True, eta=eta)
    lengths = [float(((p - w) / (w.abs() + eta)).norm()) for p in points]
    assert len(points) == 7
    assert lengths[0] == 0
    assert lengths[1] == pytest.approx(0.4)
    assert max(lengths) <= 0.4 * (1 + 1e-12)


def test_a_param_that_is_zero_does_not_move_without_eta():
    w = torch.tensor([1.0, 0.0], dtype=torch.float64)
    rise = measures.worst_case_sharpness(lambda w: w[0] + 100 * w[1], w, rho=0.5, adaptive=True)
    close(rise, torch.tensor(0.5, dtype=torch.float64))


def test_a_mask_says_where_it_is_adaptive():
    """Elsewhere `T = 1`: of a linear loss the rise is `rho ||T g||`."""
    params = {"w": torch.tensor(3.0, dtype=torch.float64), "b": torch.tensor(5.0, dtype=torch.float64)}
    options = {"rho": 0.1, "adaptive": True, "mask": {"w": True, "b": False}}
    rise = measures.worst_case_sharpness(lambda p: p["w"] + 4 * p["b"], params, **options)
    close(rise, torch.tensor(0.1 * 5.0, dtype=torch.float64))
    spread = measures.average_case_sharpness(lambda p: (p["w"] - 3) ** 2 / 9 + (p["b"] - 5) ** 2, params, **options)
    whole = measures.average_case_sharpness(lambda p: bowl(p), {k: p * 0 for k, p in params.items()}, rho=0.1)
    close(spread, measures.Estimate(2 * whole.mean, 2 * whole.standard_error))


@given(problems())
def test_the_gradient_norm_is_that_of_one_vector(problem):
    close(measures.gradient_norm(problem.loss, problem.params), flat(problem.grads).norm())


@given(problems())
def test_a_zero_radius_gives_zero(problem):
    zero = torch.zeros((), dtype=torch.float64)
    equal(measures.worst_case_sharpness(problem.loss, problem.params, rho=0.0, steps=3), zero)
    close(measures.average_case_sharpness(problem.loss, problem.params, rho=0.0), measures.Estimate(zero, zero))


def test_a_zero_gradient_gives_zero():
    """At the bottom of a bowl no direction is the steepest: no NaN."""
    zero = torch.zeros((), dtype=torch.float64)
    for adaptive in (False, True):
        got = measures.worst_case_sharpness(bowl, torch.zeros(3, dtype=torch.float64), steps=3, adaptive=adaptive)
        equal(got, zero)
    equal(measures.gradient_norm(bowl, torch.zeros(3, dtype=torch.float64)), zero)


# Slices


@pytest.mark.parametrize("m", [1, 3, 4, 12])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_m_sharpness_is_the_mean_over_slices(m, chunk_size):
    """An ascent for each slice of `m` examples; of the whole batch it is the plain one."""
    params, x, y = network(3, 4, 3)
    options = {"rho": 0.3, "steps": 2, "adaptive": True, "eta": 0.1}
    slices = zip(x.split(m), y.split(m), strict=True)
    wanted = torch.stack([measures.worst_case_sharpness(loss_fn, params, *part, **options) for part in slices]).mean()
    got = measures.m_sharpness(loss_fn, params, x, y, m=m, chunk_size=chunk_size, **options)
    close(got, wanted)


def test_uneven_slices_weigh_as_many_examples_as_they_have():
    """Twelve examples in slices of at most five are three of four; eleven are four, four and three."""
    params, x, y = network(3, 4, 3)
    for count, sizes in ((12, [4, 4, 4]), (11, [4, 4, 3])):
        slices = zip(sizes, x[:count].split(sizes), y[:count].split(sizes), strict=True)
        parts = [n / count * measures.worst_case_sharpness(loss_fn, params, a, b, rho=0.3) for n, a, b in slices]
        close(measures.m_sharpness(loss_fn, params, x[:count], y[:count], m=5, rho=0.3), sum(parts))


def test_slices_follow_in_dims():
    """What is not sliced goes whole to every slice."""
    params, x, y = network(3, 4, 3)
    got = measures.m_sharpness(
        lambda params, scale, x, y: loss_fn(params, scale * x.T, y),
        params,
        torch.tensor(2.0, dtype=torch.float64),
        x.T,
        y,
        m=3,
        in_dims=(None, 1, 0),
    )
    close(got, measures.m_sharpness(loss_fn, params, 2 * x, y, m=3))


# Average case


def test_of_a_quadratic_it_is_half_the_trace():
    """`E = rho^2 / 2 tr(T A T)`, and the draws vary as normal ones do: `rho^2 ||Tg||^2 + rho^4 / 2 ||TAT||^2`."""
    w, rho, draws = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64), 0.4, 4000
    for adaptive, t in ((False, torch.ones_like(w)), (True, w.abs() + 0.1)):
        options = {"adaptive": adaptive, "eta": 0.1 if adaptive else 0.0}
        mean, error = measures.average_case_sharpness(quadratic, w, rho=rho, draws=draws, **options)
        scaled = t[:, None] * A * t
        variance = rho**2 * (t * (B + A @ w)).square().sum() + rho**4 / 2 * scaled.square().sum()
        close(error, (variance / draws).sqrt(), rtol=0.03)
        assert abs(mean - rho**2 / 2 * scaled.trace()) < 3 * error


@given(problems(), positives, st.integers(2, 4), st.integers(0, 3))
@settings(max_examples=10)
def test_draws_are_those_of_a_generator(problem, rho, draws, seed):
    """One draw after the other, leaf by leaf, from the seed."""
    g = torch.Generator().manual_seed(seed)
    leaves = optree.tree_leaves(problem.params)
    noise = [
        torch.cat([torch.randn(p.shape, generator=g, dtype=p.dtype).reshape(-1) for p in leaves]) for _ in range(draws)
    ]
    rises = torch.stack(
        [problem.loss(flat(problem.params) + rho * z) - problem.loss(flat(problem.params)) for z in noise]
    )
    wanted = measures.Estimate(rises.mean(), rises.std() / draws**0.5)
    close(measures.average_case_sharpness(problem.loss, problem.params, rho=rho, draws=draws, seed=seed), wanted)


def test_slices_pass_on_every_number():
    """`m_sharpness` of one slice is `worst_case_sharpness`, whatever is set; each number makes a difference."""
    params, x, y = network(3, 4, 3)
    options = {"rho": 0.3, "steps": 3, "adaptive": True, "eta": 0.2, "mask": {name: name == "w0" for name in params}}
    wanted = measures.worst_case_sharpness(loss_fn, params, x, y, **options)
    close(measures.m_sharpness(loss_fn, params, x, y, m=12, **options), wanted)
    for name, value in {"rho": 0.2, "steps": 1, "eta": 0.0, "mask": None}.items():
        other = measures.m_sharpness(loss_fn, params, x, y, m=12, **options | {name: value})
        assert (other - wanted).abs() > 1e-6, name


def test_seeds_draw_anew():
    """Of every measure that draws."""
    params, x, y = network(3, 4, 3)
    for measure in (measures.average_case_sharpness, measures.hessian_trace):
        first, again, other = (measure(loss_fn, params, x, y, draws=3, seed=seed) for seed in (1, 1, 2))
        equal(first, again)
        assert first.mean != other.mean


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks_change_nothing(chunk_size):
    params, x, y = network(3, 4, 3)
    for measure in (measures.average_case_sharpness, measures.hessian_trace):
        close(measure(loss_fn, params, x, y, draws=5, chunk_size=chunk_size), measure(loss_fn, params, x, y, draws=5))


def test_the_generators_of_the_caller_are_left_alone():
    before = torch.get_rng_state()
    for measure in (measures.average_case_sharpness, measures.hessian_trace, measures.hessian_eigenpairs):
        measure(quadratic, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), before)


# Hessian


@pytest.mark.parametrize(("sizes", "k"), [((2, 3, 2), 4), ((3, 4, 3), 5), ((6, 8, 4), 3), ((2, 2), 6)])
def test_eigenvalues_are_those_of_the_dense_hessian(sizes, k):
    """The largest first; vectors are theirs, of length 1 and orthogonal; by Lanczos or, where small, outright."""
    params, x, y = network(*sizes)
    params = {**params, "w1": params.get("w1", params["w0"][:0])}
    loss = loss_fn if len(sizes) == 3 else smooth
    matrix = dense(loss, params, x, y)
    wanted = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    values, vectors = measures.hessian_eigenpairs(loss, params, x, y, k=k, tol=1e-12)
    close(values, wanted)
    rows = torch.stack([flat(member(vectors, i)) for i in range(k)])
    close(rows @ rows.T, torch.eye(k, dtype=torch.float64), rtol=1e-7)
    close(rows @ matrix, values[:, None] * rows, rtol=1e-6)


@pytest.mark.parametrize("size", [4, 60])
def test_largest_means_most_positive(size):
    """Not the largest in size; the most negative are minus those of `-L`."""
    diagonal = torch.linspace(-9, 3, size, dtype=torch.float64)
    w = torch.zeros(size, dtype=torch.float64)
    top = measures.hessian_eigenpairs(lambda w: (diagonal * w**2).sum() / 2, w, k=2, tol=1e-12).values
    bottom = measures.hessian_eigenpairs(lambda w: -(diagonal * w**2).sum() / 2, w, k=2, tol=1e-12).values
    close(top, diagonal.flip(0)[:2])
    close(-bottom, diagonal[:2])


@pytest.mark.parametrize("sizes", [(2, 3, 2), (6, 8, 4)])
def test_spectra_in_float32(sizes):
    """Nets in float32 give what they give in float64, up to their own rounding."""
    params, x, y = network(*sizes)
    single = {name: p.float() for name, p in params.items()}
    values, vectors = measures.hessian_eigenpairs(loss_fn, single, x.float(), y, k=3, tol=1e-6)
    assert {leaf.dtype for leaf in (values, *vectors.values())} == {torch.float32}
    close(values.double(), measures.hessian_eigenpairs(loss_fn, params, x, y, k=3, tol=1e-12).values, rtol=1e-5)
    close(
        measures.hessian_trace(loss_fn, single, x.float(), y).mean.double(),
        measures.hessian_trace(loss_fn, params, x, y).mean,
        rtol=1e-5,
    )


def test_the_trace_and_its_error():
    """`E z'Hz = tr H`; the draws vary by `2 sum_ij H_ij^2` off the diagonal."""
    params, x, y = network(3, 4, 3)
    matrix = dense(loss_fn, params, x, y)
    mean, error = measures.hessian_trace(loss_fn, params, x, y, draws=4000)
    assert abs(mean - matrix.trace()) < 3 * error
    variance = 2 * (matrix - matrix.diag().diag()).square().sum()
    close(error, (variance / 4000).sqrt(), rtol=0.01)


@given(problems(), st.integers(0, 3))
@settings(max_examples=10)
def test_probes_are_signs(problem, seed):
    """The estimate is the mean of `z'Hz` over signs from the seed, with the dense `H`."""
    g = torch.Generator().manual_seed(seed)
    matrix, leaves = dense(problem.loss, problem.params), optree.tree_leaves(problem.params)
    bits = [[torch.randint(0, 2, p.shape, generator=g, dtype=p.dtype) for p in leaves] for _ in range(3)]
    samples = torch.stack([z @ matrix @ z for z in (2 * torch.cat([b.reshape(-1) for b in each]) - 1 for each in bits)])
    wanted = measures.Estimate(samples.mean(), samples.std() / 3**0.5)
    close(measures.hessian_trace(problem.loss, problem.params, draws=3, seed=seed), wanted)


@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("loss", [lambda w: w.sum(), lambda w: torch.ones((), dtype=torch.float64)])
def test_a_loss_without_curvature_has_a_zero_spectrum(size, loss):
    w = torch.ones(size, dtype=torch.float64)
    values, vectors = measures.hessian_eigenpairs(loss, w, k=2)
    equal(values, torch.zeros(2, dtype=torch.float64))
    close(vectors @ vectors.T, torch.eye(2, dtype=torch.float64))
    equal(measures.hessian_trace(loss, w).mean, torch.zeros((), dtype=torch.float64))


def test_equal_eigenvalues_are_all_found():
    """Lanczos starts again where its space ends early."""
    w = torch.zeros(50, dtype=torch.float64)
    close(measures.hessian_eigenpairs(lambda w: w @ w, w, k=3).values, torch.full((3,), 2.0, dtype=torch.float64))


def test_spectra_repeat():
    """The same call gives the same, bit for bit."""
    params, x, y = network(6, 8, 4)
    first, again = (measures.hessian_eigenpairs(loss_fn, params, x, y, k=2) for _ in range(2))
    equal(first, again)


def test_curvlinops_agrees():
    """Another implementation of the Hessian, where it is installed."""
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    _, x, y = network(3, 4, 3)
    named = dict(model.named_parameters())
    wants = inspect.signature(curvlinops.HessianLinearOperator).parameters["params"].annotation
    given = named if "dict" in str(wants).lower() else list(named.values())  # its releases differ
    hessian = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), given, [(x, y)])
    matrix = hessian @ torch.eye(hessian.shape[1], dtype=torch.float64)
    params, buffers = fs.nn.split(model)
    values = measures.hessian_eigenpairs(
        lambda params: F.cross_entropy(fs.nn.predict(model, params, buffers, x), y), params, k=3, tol=1e-10
    ).values
    close(values, torch.linalg.eigvalsh(matrix.detach()).flip(0)[:3], rtol=1e-7)


# Rescaling


@pytest.mark.parametrize("factor", [5.0, 0.2])
def test_adaptive_measures_do_not_see_a_rescaling_that_the_function_does_not(factor):
    """Of two ReLU layers, one times `a` and the next by `a`: adaptive measures stay (eta = 0), plain ones move."""
    params, x, y = network(3, 4, 3)
    other = {"w0": params["w0"] * factor, "b0": params["b0"] * factor, "w1": params["w1"] / factor, "b1": params["b1"]}
    close(loss_fn(other, x, y), loss_fn(params, x, y))
    for measure, options in (
        (measures.worst_case_sharpness, {"steps": 1}),
        (measures.worst_case_sharpness, {"steps": 5}),
        (measures.m_sharpness, {"m": 4}),
        (measures.average_case_sharpness, {}),
    ):
        before, after = (measure(loss_fn, p, x, y, rho=0.3, adaptive=True, **options) for p in (params, other))
        close(after, before, rtol=1e-10)
        before, after = (measure(loss_fn, p, x, y, rho=0.3, **options) for p in (params, other))
        assert (optree.tree_leaves(after)[0] / optree.tree_leaves(before)[0] - 1).abs() > 0.05
    tops = [measures.hessian_eigenpairs(loss_fn, p, x, y).values for p in (params, other)]
    assert (tops[1] / tops[0] - 1).abs() > 0.05


# torch.func


@each
@given(ensembles())
@structural
def test_vmap_is_a_loop(name, ensemble):
    """Over members of an ensemble; the same random directions for each."""
    measure = lambda params: MEASURES[name](ensemble.loss, params)  # noqa: E731
    wanted = stack([measure(params) for params in ensemble.members])
    close(torch.vmap(measure)(stack(ensemble.members)), wanted, rtol=1e-7)


def test_vmap_over_radii():
    """One call for a curve over `rho`."""
    params, x, y = network(3, 4, 3)
    rho = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    for measure in (measures.worst_case_sharpness, measures.average_case_sharpness):
        wanted = stack([measure(loss_fn, params, x, y, rho=float(r)) for r in rho])
        close(torch.vmap(lambda r, measure=measure: measure(loss_fn, params, x, y, rho=r))(rho), wanted)


def test_slices_of_members():
    """Slices are batched inside of members."""
    members, data = [network(3, 4, 3, seed=k)[0] for k in range(2)], network(3, 4, 3)[1:]
    measure = lambda p: measures.m_sharpness(loss_fn, p, *data, m=4, steps=2)  # noqa: E731
    close(torch.vmap(measure)(stack(members)), stack([measure(p) for p in members]))


class Words(nn.Module):
    """Of an embedding, and of batch normalisation, the backward pass writes in place."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.last = nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.words(x).mean(1))))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_traces_of_modules_batch(chunk_size):
    """Members by probes, with batch statistics and an embedding: as in a loop, and as the dense Hessian says."""
    torch.manual_seed(0)
    model, x = Words().double(), torch.randint(0, 5, (8, 4))
    params, buffers = fs.nn.split(model)
    inner = fs.nn.loss_fn(model, lambda model, x: F.cross_entropy(model(x), x[:, 0] % 3))
    loss = lambda params: inner(params, buffers, x)[0]  # noqa: E731
    several = [params, {name: 1.1 * p for name, p in params.items()}]
    measure = lambda params: measures.hessian_trace(loss, params, draws=3, chunk_size=chunk_size)  # noqa: E731
    if torch.__version__ >= "2.14":  # from there on torch refuses second derivatives of batch normalisation in `vmap`
        with pytest.raises(RuntimeError, match="accessing `data` under vmap transform is not allowed"):
            torch.vmap(measure)(stack(several))
        return
    close(torch.vmap(measure)(stack(several)), stack([measure(p) for p in several]))
    matrix = dense(loss, params)
    mean, error = measures.hessian_trace(loss, params, draws=400)
    assert abs(mean - matrix.trace()) < 3 * error


@each
def test_nan_stays_nan_and_alone(name):
    """A member that has diverged is NaN, and the others are what they are."""
    members = [torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0], [1.0, math.nan], [0.5, -1.0])]
    measure = lambda w: MEASURES[name](lambda w: (w**4).sum(), w)  # noqa: E731
    got = optree.tree_leaves(torch.vmap(measure)(stack(members)))
    for leaf, *alone in zip(got, *(optree.tree_leaves(measure(w)) for w in members), strict=True):
        assert leaf.isnan().tolist() == [False, True, False]
        assert alone[1].isnan()
        close(leaf[[0, 2]], torch.stack([alone[0], alone[2]]))


@pytest.mark.parametrize("size", [2, 40])
def test_a_hessian_that_is_nan_has_eigenvalues_that_are(size):
    w = torch.full((size,), math.nan)
    values, vectors = measures.hessian_eigenpairs(lambda w: (w**4).sum(), w, k=2)
    equal(values, torch.full((2,), math.nan))
    equal(vectors, torch.full((2, size), math.nan))


@pytest.mark.compile
def test_worst_cases_compile_in_one_graph():
    params, x, y = network(3, 4, 3)
    for options in ({}, {"steps": 3, "adaptive": True}):
        measure = lambda p, options=options: measures.worst_case_sharpness(loss_fn, p, x, y, **options)  # noqa: E731
        close(torch.compile(measure, backend="eager", fullgraph=True)(params), measure(params))


# Trees, types


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@each
def test_results_have_32_bits_at_least(name, dtype):
    params = {"w": torch.tensor([1.0, -0.5], dtype=dtype), "b": torch.tensor(0.25, dtype=dtype)}
    wide = torch.promote_types(dtype, torch.float32)
    for leaf in optree.tree_leaves(MEASURES[name](bowl, params)):
        assert (leaf.dtype, leaf.shape) == (wide, ())
    wanted = MEASURES[name](bowl, optree.tree_map(torch.Tensor.double, params))
    if dtype in (torch.float64, torch.float32) or name in ("gradient norm", "trace"):
        got = optree.tree_map(torch.Tensor.double, MEASURES[name](bowl, params))
        if name != "average":  # other numbers are drawn in another type
            close(got, wanted, rtol=1e-2 if wide is not dtype else 1e-6)


@each
def test_complex_entries_are_pairs_of_reals(name):
    """The same loss of the same numbers gives the same; adaptive measures take the modulus, which is another."""
    z = torch.tensor([1 + 2j, -0.5 + 0.3j], dtype=torch.complex128)
    got = MEASURES[name](lambda z: (z.abs() ** 4).sum() + z.real.sum(), z)
    if name != "adaptive":
        close(got, MEASURES[name](lambda w: (w.square().sum(-1) ** 2).sum() + w[:, 0].sum(), torch.view_as_real(z)))
    else:
        assert got > 0


def test_eigenvectors_of_complex_params_are_complex():
    z = torch.tensor([1 + 2j, -0.5 + 0.3j], dtype=torch.complex128)
    values, vectors = measures.hessian_eigenpairs(lambda z: z.real.square().sum() + 3 * z.imag[0] ** 2, z, k=2)
    close(values, torch.tensor([6.0, 2.0], dtype=torch.float64))
    close(vectors[0].abs(), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert vectors.dtype is torch.complex128


@pytest.mark.parametrize("empty", [{}, (), {"w": torch.zeros(0)}])
@each
def test_empty_params(name, empty):
    """Nothing to perturb: no rise, no curvature."""
    for leaf in optree.tree_leaves(MEASURES[name](lambda params: torch.ones(()), empty)):
        equal(leaf, torch.zeros(()))


@each
def test_inputs_stay_as_they_are_and_no_graph_grows(name):
    """Without grad mode, or where nothing requires grad."""
    params = {"w": torch.tensor([1.0, 2.0], requires_grad=True)}
    other = torch.tensor(2.0, requires_grad=True)
    before = params["w"].detach().clone()
    with torch.no_grad():
        got = MEASURES[name](lambda params: other * bowl(params), params)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(got))
    values = {"w": params["w"].detach()}
    got = MEASURES[name](lambda params: other.detach() * bowl(params), values)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(got))
    assert torch.equal(params["w"], before)
    assert params["w"].grad is None
    assert other.grad is None


# Messages

W = torch.tensor([1.0, 2.0])
BATCH = torch.ones(5)
RADIUS = {
    "worst_case_sharpness": lambda **options: measures.worst_case_sharpness(bowl, W, **options),
    "m_sharpness": lambda **options: measures.m_sharpness(lambda w, x: bowl(w), W, BATCH, m=2, **options),
    "average_case_sharpness": lambda **options: measures.average_case_sharpness(bowl, W, **options),
}
ALL = [*RADIUS, "gradient_norm", "hessian_trace", "hessian_eigenpairs"]


@pytest.mark.parametrize("where", RADIUS)
def test_bad_radii(where):
    call = RADIUS[where]
    for bad in (-1, math.nan, math.inf):
        with refuses(ValueError, f"{where}: `rho` must be finite and non-negative, got {bad}."):
            call(rho=bad)
        with refuses(ValueError, f"{where}: `eta` must be finite and non-negative, got {bad}."):
            call(eta=bad, adaptive=True)
    with refuses(TypeError, f"{where}: `rho` must be a number or a tensor of shape (), got str."):
        call(rho="0.1")
    with refuses(TypeError, f"{where}: `rho` must be a number or a tensor of shape (), got function."):
        call(rho=lambda step: 0.1)
    with refuses(ValueError, f"{where}: `eta` must come with `adaptive=True`, got `adaptive=False`."):
        call(eta=0.1)
    with refuses(ValueError, f"{where}: `mask` must come with `adaptive=True`, got `adaptive=False`."):
        call(mask=True)


@pytest.mark.parametrize("where", ALL)
def test_bad_losses(where):
    measure = getattr(measures, where)
    options = {"m": 2} if where == "m_sharpness" else {}
    for bad, got, hint in (
        (lambda w, x: w, "torch.float32 of shape (2,)", ""),
        (lambda w, x: 1.0, "float", ""),
        (lambda w, x: w.sum() * 1j, "torch.complex64 of shape ()", ""),
        (lambda w, x: (w.sum(), {}), "tuple", " Take the loss out of it, and of `nn.loss_fn` the first."),
    ):
        with refuses(TypeError, f"{where}: `loss_fn` must return a real tensor of shape (), got {got}.{hint}"):
            measure(bad, W, BATCH, **options)
    with refuses(TypeError, f"{where}: `loss_fn` must be a function, got Tensor."):
        measure(W, bowl, BATCH, **options)
    with refuses(TypeError, f"{where}: `params` must hold tensors only, got float at ['w']."):
        measure(lambda w, x: bowl(w), {"w": 1.0}, BATCH, **options)


def test_bad_counts():
    with refuses(ValueError, "worst_case_sharpness: `steps` must be at least 1, got 0."):
        measures.worst_case_sharpness(bowl, W, steps=0)
    with refuses(ValueError, "m_sharpness: `steps` must be at least 1, got 0."):
        RADIUS["m_sharpness"](steps=0)
    with refuses(ValueError, "m_sharpness: `m` must be at least 1, got 0."):
        measures.m_sharpness(lambda w, x: bowl(w), W, BATCH, m=0)
    with refuses(ValueError, "m_sharpness: `m` must be at most the number of examples, got 6 for 5."):
        measures.m_sharpness(lambda w, x: bowl(w), W, BATCH, m=6)
    with refuses(ValueError, "m_sharpness: `in_dims` must have one entry per argument of the batch, got 2 for 1."):
        RADIUS["m_sharpness"](in_dims=(0, 0))
    with refuses(ValueError, "m_sharpness: `chunk_size` must be at least 1, got 0."):
        RADIUS["m_sharpness"](chunk_size=0)
    for where in ("average_case_sharpness", "hessian_trace"):
        measure = getattr(measures, where)
        with refuses(ValueError, f"{where}: `draws` must be at least 2, for a standard error, got 1."):
            measure(bowl, W, draws=1)
        with refuses(ValueError, f"{where}: `chunk_size` must be at least 1, got 0."):
            measure(bowl, W, chunk_size=0)
        with refuses(TypeError, f"{where}: `seed` must be a whole number, got Generator."):
            measure(bowl, W, seed=torch.Generator())


def test_bad_spectra(monkeypatch):
    with refuses(ValueError, "hessian_eigenpairs: `k` must be at least 1, got 0."):
        measures.hessian_eigenpairs(bowl, W, k=0)
    with refuses(ValueError, "hessian_eigenpairs: `k` must be at most the number of params, got 3 for 2."):
        measures.hessian_eigenpairs(bowl, W, k=3)
    with refuses(ValueError, "hessian_eigenpairs: `k` must be at most the number of params, got 1 for 0."):
        measures.hessian_eigenpairs(lambda params: torch.ones(()), {})
    with refuses(ValueError, "hessian_eigenpairs: `tol` must be finite and positive, got 0."):
        measures.hessian_eigenpairs(bowl, W, tol=0)
    with refuses(TypeError, "hessian_eigenpairs: `seed` must be a whole number, got str."):
        measures.hessian_eigenpairs(bowl, W, seed="0")
    text = (
        "hessian_eigenpairs: must not run under `vmap` or another transform of torch.func, nor be compiled. "
        "Loop over the members, `for params in ensemble.unstack(stacked)`; "
        "differentiate the values by `grad_and_value`."
    )
    with refuses(RuntimeError, text):
        torch.vmap(lambda w: measures.hessian_eigenpairs(bowl, w).values)(torch.ones(2, 3))
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with refuses(ImportError, 'hessian_eigenpairs: SciPy must be installed, try: pip install "funcsam[measures]"'):
        measures.hessian_eigenpairs(bowl, W)


def test_a_method_that_does_not_converge_says_so(monkeypatch):
    """In practice, too few iterations for the accuracy asked for."""
    import scipy.sparse.linalg

    def gives_up(*args, k, **options):
        raise scipy.sparse.linalg.ArpackNoConvergence("no", torch.zeros(1).numpy(), torch.zeros(30, 1).numpy())

    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", gives_up)
    text = "hessian_eigenpairs: Lanczos must converge, got 1 of 2 eigenvalues. Give a larger `tol`."
    with refuses(RuntimeError, text):
        measures.hessian_eigenpairs(bowl, torch.ones(30), k=2)


def test_every_measure_cautions():
    """Each docstring that could sell a number says how little it predicts."""
    for name in ("worst_case_sharpness", "average_case_sharpness", "hessian_trace", "hessian_eigenpairs"):
        assert "generalisation only weakly" in " ".join(inspect.getdoc(getattr(measures, name)).split())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_in_half_precision_is_that_of_float32(dtype):
    """Only the loss sees half: squares overflow there, and small parts vanish."""
    w = torch.linspace(0.5, 1.5, 2000).to(dtype)
    weights = torch.linspace(1, 9, 2000)

    def steep(w):
        return (weights * w.float() ** 2).sum()

    got = measures.worst_case_sharpness(lambda params: steep(params["w"]), {"w": w}, rho=20.0, steps=3)
    wide = measures.worst_case_sharpness(
        lambda params: steep(params["w"].to(dtype)), {"w": w.float()}, rho=20.0, steps=3
    )
    equal(got, wide)
    close(
        measures.gradient_norm(lambda params: steep(params["w"]), {"w": w}),
        (2 * weights * w.float()).to(dtype).float().norm(),
        1e-6,
    )
