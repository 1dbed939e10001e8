"""The inner product of two trees, and what is left of one without its part along the other."""

import math
import re

import optree
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import funcsam as fs
from funcsam.core import tree
from tests.asserts import close, equal
from tests.strategies import ensembles, flat, like, stack, trees

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


@st.composite
def pairs(draw):
    """Two trees of one structure."""
    x = draw(trees())
    return x, draw(like(x))


def test_both_are_public():
    assert {"dot", "reject"} <= set(fs.tree.__all__)


@given(pair=pairs())
def test_dot_is_that_of_the_flat_vectors(pair):
    x, y = pair
    close(tree.dot(x, y), flat(x) @ flat(y))
    equal(tree.dot(x, y), tree.dot(y, x))
    close(tree.dot(x, x), tree.norm(x).square())


@given(pair=pairs())
def test_dot_of_complex_leaves_is_that_of_their_parts(pair):
    """The real part of `<x, y>`, where either, or both, are complex."""
    x, y = pair
    z, w = (optree.tree_map(torch.complex, a, b) for a, b in ((x, y), (y, x)))
    close(tree.dot(z, w), 2 * flat(x) @ flat(y))
    close(tree.dot(z, y), flat(x) @ flat(y))
    close(tree.dot(y, z), flat(x) @ flat(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_dot_is_computed_in_the_widest_type(dtype, other):
    """Float32 at least: sums and products of half precision are those of float32."""
    x, y = torch.full((300,), 300.0, dtype=dtype), torch.full((300,), 300.0, dtype=other)
    wide = torch.float64 if {dtype, other} & {torch.float64, torch.complex128} else torch.float32
    wanted = torch.tensor(300.0**3 + 1, dtype=wide)
    one = torch.ones((), dtype=torch.bfloat16)
    equal(tree.dot([x, one], [y, one]), wanted)
    equal(tree.dot([one, x], [one, y]), wanted)


@pytest.mark.parametrize("x", [{}, (), [torch.zeros(0, 2, dtype=torch.float64)]], ids=str)
def test_trees_without_entries(x):
    equal(tree.dot(x, x), torch.tensor(0.0))
    equal(tree.reject(x, x), x)


@given(ensemble=ensembles(size=2), data=st.data())
def test_under_vmap(ensemble, data):
    """Member by member, and where a member is parallel, its rest alone is zero."""
    xs = ensemble.members
    ys = [data.draw(like(xs[0])), tree.scale(3.0, xs[1])]
    both = stack(xs), stack(ys)
    for fn in (tree.dot, tree.reject):
        close(torch.vmap(fn)(*both), stack([fn(x, y) for x, y in zip(xs, ys, strict=True)]))
    equal(optree.tree_map(lambda leaf: leaf[1], torch.vmap(tree.reject)(*both)), tree.zeros_like(xs[1]))


@pytest.mark.parametrize("fn", [tree.dot, tree.reject])
def test_another_structure_is_refused(fn):
    """With the path, and the names of the arguments."""
    x = {"a": torch.ones(2), "b": [torch.ones(3)]}
    name = fn.__name__
    with pytest.raises(
        ValueError, match=f"^{name}: `y` must have the structure of `x`, got no leaf at \\['b'\\]\\[0\\]"
    ):
        fn(x, {"a": torch.ones(2), "b": []})
    text = f"{name}: `y` must have the shapes of `x`, got (2, 1) for (2,) at ['a']."
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fn(x, {"a": torch.ones(2, 1), "b": [torch.ones(3)]})


@given(pair=pairs())
def test_what_is_left_is_orthogonal(pair):
    """`x = r + c y` with `<r, y> = 0`."""
    x, y = pair
    assume(flat(y).norm() > 0)
    rest = tree.reject(x, y)
    assert tree.dot(rest, y).abs() <= 1e-13 * flat(x).norm() * flat(y).norm()
    along = (flat(x) @ flat(y)) / (flat(y) @ flat(y))
    close(flat(rest), flat(x) - along * flat(y))
    close(tree.reject(rest, y), rest)


@given(x=trees())
def test_nothing_is_taken_away_along_zero(x):
    equal(tree.reject(x, tree.zeros_like(x)), x)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@given(x=trees(), factor=st.floats(-4, 4))
def test_what_is_parallel_leaves_exactly_zero(dtype, x, factor):
    """To the accuracy of the type: a multiple has been rounded."""
    y = optree.tree_map(lambda leaf: leaf.to(dtype), x)
    multiple = optree.tree_map(lambda leaf: (factor * leaf.double()).to(dtype), y)
    assume(flat(multiple).abs().max() > 1e-2 or not factor)  # float16 has steps of 2^-24 below
    equal(tree.reject(multiple, y), tree.zeros_like(y))
    equal(tree.reject(y, y), tree.zeros_like(y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [10, 1000, 300_000])
def test_what_is_parallel_leaves_zero_at_any_size(dtype, size):
    y = (torch.arange(size, dtype=torch.float64) + 0.3).sin().to(dtype)
    equal(tree.reject((0.7 * y.double()).to(dtype), y), torch.zeros_like(y))


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_what_is_more_than_rounding_is_left(dtype):
    """A hundred units of the last place, in one entry of many that are parallel; three in half precision."""
    eps = torch.finfo(dtype).eps
    small = (100 if eps < 1e-6 else 3) * eps
    x, y = torch.tensor([1.0, small], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
    equal(tree.reject(x, y), torch.tensor([0.0, small], dtype=dtype))
    zeros = torch.zeros(2, dtype=dtype)
    equal(tree.reject(torch.tensor([1.0, 0.3 * eps], dtype=dtype), y), zeros)


def test_the_coarsest_type_says_what_rounding_is():
    """A float32 entry beside bfloat16 ones, on either side."""
    fine = lambda value: torch.tensor([value])  # noqa: E731
    coarse = torch.ones(4, dtype=torch.bfloat16)
    for x, y in (([coarse, fine(0.01)], [coarse, fine(0.0)]), ([coarse.float(), fine(0.01)], [coarse, fine(0.0)])):
        equal(tree.reject(x, y), tree.zeros_like(x))
    x, y = [coarse.float(), fine(0.01)], [coarse.float(), fine(0.0)]
    equal(tree.reject(x, y), [torch.zeros(4), fine(0.01)])


@pytest.mark.parametrize("dtype", DTYPES[2:4], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    """And rounded once."""
    x = (torch.arange(50.0).sin() + 0.5).to(dtype)
    y = torch.arange(50.0).cos().to(dtype) + x
    equal(tree.reject(x, y), tree.reject(x.float(), y.float()).to(dtype))


def test_products_that_float16_does_not_hold():
    x, y = torch.tensor([600.0, 0.0], dtype=torch.float16), torch.tensor([300.0, 300.0], dtype=torch.float16)
    equal(tree.reject(x, y), torch.tensor([300.0, -300.0], dtype=torch.float16))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
@given(pair=pairs(), data=st.data())
def test_what_is_not_finite_stays_visible(bad, which, pair, data):
    """NaN in every entry that has to do with it, zero in none."""
    pair = list(pair)
    leaves, spec = optree.tree_flatten(pair[which])
    k = data.draw(st.integers(0, len(leaves) - 1))
    leaves[k] = torch.full_like(leaves[k], bad)
    pair[which] = optree.tree_unflatten(spec, leaves)
    assert not optree.tree_leaves(tree.reject(*pair))[k].isfinite().any()


def test_a_square_out_of_range_is_not_taken_for_zero():
    """In float32, beyond 1e19, as for `norm`."""
    big = torch.tensor([1e25, 0.0])
    assert tree.reject(torch.ones(2), big).isnan().all()


@given(pair=pairs())
def test_reject_is_differentiable(pair):
    """Forwards, backwards and under plain autograd, by both; and finite at zero."""
    x, y = (flat(each) + 0.1 * torch.arange(len(flat(each))).cos() for each in pair)
    rest = tree.reject(x, y)
    assume(flat(y).norm() > 0.1 and (rest.norm() > 1e-2))

    def outcome(t):
        return torch.cos(tree.reject(x * (1 + t), y + t * x.roll(1))).sum()

    zero = torch.zeros((), dtype=torch.float64)
    wanted = (outcome(zero + 1e-6) - outcome(zero - 1e-6)) / 2e-6
    close(torch.func.grad(outcome)(zero), wanted, rtol=1e-5)
    close(torch.func.jvp(outcome, (zero,), (zero + 1,))[1], wanted, rtol=1e-5)
    t = zero.clone().requires_grad_()
    close(torch.autograd.grad(outcome(t), t)[0], wanted, rtol=1e-5)
    for point in (torch.zeros_like(y), x):
        assert torch.func.jacrev(lambda y: tree.reject(x, y))(point).isfinite().all()


@pytest.mark.compile
def test_both_compile():
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0, dtype=torch.bfloat16)}
    y = {"a": torch.tensor([-1.0, 0.5]), "b": torch.tensor(1.0, dtype=torch.bfloat16)}
    for fn in (tree.dot, tree.reject):
        close(torch.compile(fn, backend="aot_eager", fullgraph=True)(x, y), fn(x, y), rtol=1e-6)
