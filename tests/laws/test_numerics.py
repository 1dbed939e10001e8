"""Half precision, tiny and huge gradients, complex leaves, mixed types: where the other laws stay away."""

import optree
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import funcsam as fs
from funcsam.core import tree
from tests.asserts import close, equal
from tests.strategies import Problem, ascent, call, flat, positives, problems, run, structural
from tests.zoo import Claim, claiming, each

EPS = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def cast(problem, dtype):
    """The problem in another type."""
    return Problem(optree.tree_map(lambda w: w.to(dtype), problem.params), problem.loss)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@given(problem=problems(), rho=positives)
def test_on_the_sphere_to_the_accuracy_of_the_type(dtype, problem, rho):
    """`||normalize(g)|| = 1` and `||rho g / ||g|| || = rho`, where the entries are numbers of this type."""
    grads = cast(problem, dtype).grads
    assume(tree.norm(grads) > 1e-2)
    climb = fs.chain(fs.normalize(), fs.scale(rho))
    e, _, _ = climb.update(grads, lambda params: grads, climb.init(grads))
    assert abs(tree.norm(e).item() / rho - 1) < EPS[dtype]


@claiming(Claim.IDENTITY_AT_ZERO_RHO)
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_zero_rho_in_low_precision(entry, dtype):
    """The base optimizer to the last bit, also where `1 / ||g||` is out of range."""
    params = {"w": torch.tensor([1e-7, 3e-6, 0.0]).to(dtype), "b": torch.tensor(-2e-7).to(dtype)}
    problem = Problem(params, lambda params: 0.5 * (flat(params) ** 2).sum())
    equal(run(entry(rho=0.0), problem)[0], run(entry.base(), problem)[0])


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-6, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiny_and_huge_gradients(size, dtype):
    """The direction is right from 1e-18 to 1e18 in float32; beyond, in float64, whose range is larger."""
    grads = {"w": torch.tensor([3 * size, 0.0], dtype=dtype), "b": torch.tensor(4 * size, dtype=dtype)}
    updates = fs.normalize().update(grads, lambda params: grads, ())[0]
    wanted = {"w": torch.tensor([0.6, 0.0], dtype=dtype), "b": torch.tensor(0.8, dtype=dtype)}
    if dtype is torch.float32 and not 1e-19 < size < 1e19:
        wanted = (
            tree.zeros_like(wanted) if size < 1 else {key: torch.full_like(x, torch.nan) for key, x in wanted.items()}
        )
    close(updates, wanted, rtol=1e-6)


def test_a_subnormal_half_gradient_has_a_direction():
    """Norms are taken in float32: the smallest float16 squared is zero in float16."""
    grads = torch.tensor([2.0**-24, 0.0], dtype=torch.float16)
    equal(fs.normalize().update(grads, lambda w: grads, ())[0], torch.tensor([1.0, 0.0], dtype=torch.float16))


def test_a_large_half_gradient_has_a_direction():
    """The largest float16 squared is infinite in float16."""
    grads = torch.full((4,), 6e4, dtype=torch.float16)
    equal(fs.normalize().update(grads, lambda w: grads, ())[0], torch.full((4,), 0.5, dtype=torch.float16))


@each
def test_zero_dimensional_leaves_keep_their_type(entry):
    """A float32 leaf of shape () does not become float64 where a number is."""
    params = {"w": torch.tensor(0.5), "b": torch.tensor([1.0, 2.0])}
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in entry.numbers.items()}
    updates, _ = call(entry(**numbers), Problem(params, lambda params: (flat(params) ** 2).sum()))
    equal(optree.tree_map(torch.zeros_like, updates), optree.tree_map(torch.zeros_like, params))


@each
@structural
@given(problem=problems(), data=st.data())
def test_mixed_types(entry, problem, data):
    """Leaves of different types keep them, and are near what float64 gives."""
    leaves, spec = optree.tree_flatten(problem.params)
    types = [data.draw(st.sampled_from([torch.float64, torch.float32])) for _ in leaves]
    mixed = Problem(optree.tree_unflatten(spec, [w.to(t) for w, t in zip(leaves, types, strict=True)]), problem.loss)
    assume(tree.norm(problem.grads) > 1e-1)
    updates, _ = call(entry(), mixed)
    assert [u.dtype for u in optree.tree_leaves(updates)] == types
    close(optree.tree_map(lambda u: u.double(), updates), call(entry(), problem)[0], rtol=1e-3)


def test_float32_and_bfloat16_side_by_side():
    """The norm is over both, in float32."""
    params = {"w": torch.tensor([3.0], dtype=torch.bfloat16), "b": torch.tensor([4.0])}
    updates = fs.normalize().update(params, lambda params: params, ())[0]
    close(updates, {"w": torch.tensor([0.6], dtype=torch.bfloat16), "b": torch.tensor([0.8])})


LARGE, SMALL = 2.0**-100, 2.0**100  # their squares are out of the range of float32
MIXED = [
    ((torch.float32, torch.float64), (3.0, 4 * SMALL), 4 * SMALL),
    ((torch.float64, torch.float32), (4 * SMALL, 3.0), 4 * SMALL),
    ((torch.bfloat16, torch.float64), (0.0, 3 * LARGE), 3 * LARGE),
    ((torch.float64, torch.float16), (3 * LARGE, 0.0), 3 * LARGE),
    ((torch.bfloat16, torch.float32), (3.0, 4.0), 5.0),
    ((torch.float32, torch.bfloat16), (4.0, 3.0), 5.0),
    ((torch.float16, torch.bfloat16), (4.0, 3.0), 5.0),
    ((torch.complex64, torch.float64), (3.0, 4 * SMALL), 4 * SMALL),
    ((torch.float32, torch.complex128), (3.0, 4 * SMALL), 4 * SMALL),
]


@pytest.mark.parametrize(("types", "values", "wanted"), MIXED, ids=lambda x: str(x) if isinstance(x, tuple) else "")
def test_a_norm_of_mixed_types_has_the_widest(types, values, wanted):
    """Float32 at least, whichever leaf comes first: what only float64 holds is not lost, nor is the last digit."""
    leaves = [torch.full((1,), value, dtype=dtype) for dtype, value in zip(types, values, strict=True)]
    wide = torch.float64 if {torch.float64, torch.complex128} & set(types) else torch.float32
    for found in (tree.norm(leaves), torch.vmap(lambda *leaves: tree.norm(leaves))(*(x[None] for x in leaves))[0]):
        assert found.dtype is wide
        assert found == wanted
    third = [torch.full((1,), 1 / 3, dtype=dtype) for dtype in types]
    exact = torch.stack([x.abs().double().square().sum() for x in third]).sum().sqrt()
    close(tree.norm(third).double(), exact, rtol=1e-15 if wide is torch.float64 else 1e-7)
    close(tree.norm([x.expand(700) for x in third]).double(), 700**0.5 * exact, rtol=1e-4)


@pytest.mark.parametrize("types", [types for types, *_ in MIXED], ids=str)
def test_scalars_are_computed_in_the_widest_type(types):
    """Float32 at least, whichever leaf comes first."""
    wide = torch.float64 if {torch.float64, torch.complex128} & set(types) else torch.float32
    leaves = [torch.ones(1, dtype=dtype) for dtype in types]
    assert tree.real_dtype(leaves) is tree.real_dtype(leaves[::-1]) is wide
    assert tree.real_dtype([]) is torch.float32


def _complex(problem):
    """The same entries as complex numbers, and the loss of their real and imaginary parts."""
    pairs = optree.tree_map(lambda w: torch.stack([w, w + 0.5], dim=-1), problem.params)
    complexes = optree.tree_map(torch.view_as_complex, pairs)
    of_complex = lambda params: problem.loss(optree.tree_map(torch.view_as_real, params))  # noqa: E731
    return Problem(pairs, problem.loss), Problem(complexes, of_complex)


@pytest.mark.parametrize(
    "tx",
    [fs.sam(0.5), fs.normalize(), fs.clip_by_global_norm(1.0), fs.sgd(0.1, 0.9, weight_decay=0.1), fs.adamw(0.1)],
    ids=["sam", "normalize", "clip_by_global_norm", "sgd", "adamw"],
)
@given(problem=problems())
def test_complex_leaves_are_pairs_of_reals(tx, problem):
    """The norm of a complex tree is that of its real and imaginary parts, and so is every update."""
    pairs, complexes = _complex(problem)
    params, _ = run(tx, complexes, 2)
    assume(tree.norm(pairs.grads) > 1e-3)
    close(optree.tree_map(torch.view_as_real, params), run(tx, pairs, 2)[0], rtol=1e-6)


@given(problem=problems(), rho=positives)
def test_asam_of_complex_leaves(problem, rho):
    """The size of a complex param is its modulus: `||e / |w| || = rho`."""
    _, complexes = _complex(problem)
    assume((flat(complexes.params).abs() * flat(complexes.grads).abs()).norm() > 1e-6)
    e, size = flat(ascent(fs.asam(rho), complexes)), flat(complexes.params).abs()
    close((e / torch.where(size > 0, size, 1)).abs().norm(), torch.tensor(rho, dtype=size.dtype), rtol=1e-8)
