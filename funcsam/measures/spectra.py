"""The Hessian: its largest eigenvalues and its trace, from Hessian-vector products."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import optree
import torch
from torch import Tensor

from funcsam.core import checks, levels, tree
from funcsam.core.gradients import grad_and_value
from funcsam.core.states import saveable
from funcsam.core.types import P, Params
from funcsam.measures.support import Estimate, Loss, checked, estimate, generator, rademacher

Product = Callable[[Params], Params]


@saveable
class Eigenpairs(NamedTuple, Generic[P]):
    """Eigenvalues and eigenvectors.

    Attributes:
        values: The eigenvalues, the largest first, of shape (k,).
        vectors: The eigenvectors, of length 1 and of either sign, side by side: the structure of the params, every leaf
            with a leading axis of `k`. Complex leaves are taken as pairs of reals.
    """

    values: Tensor
    vectors: P


def _product(where: str, loss_fn: Loss, params: Params, batch: tuple[object, ...]) -> tuple[Product, Params]:
    """Returns the function `v -> H v` of trees of reals, and the params as such a tree.

    Reverse mode over reverse mode: the gradient is taken once, and each product is a backward pass through it. Forward
    mode over reverse mode would need less memory, but repeats the gradient in every product and fails where an
    operation has no forward derivative, as many that are written by hand have not.
    """
    loss, params = checked(where, loss_fn, params)
    real = tree.real_views(params)
    if not tree.flatten(real)[0]:
        return lambda v: v, real
    grads_fn = grad_and_value(lambda real: loss(tree.like_views(real, params), *batch), backend="func")
    backward = torch.func.vjp(lambda real: grads_fn(real)[0], real)[1]

    def product(v: Params) -> Params:
        # Under `vmap` some backward passes write into what comes in, which must then be batched as the params are.
        return backward(tree.map(lambda a, w: torch.where(w == w, a, a), v, real))[0]

    return product, real


def hessian_trace(
    loss_fn: Loss, params: P, *batch: object, draws: int = 32, seed: int = 0, chunk_size: int | None = None
) -> Estimate:
    """Estimates the trace of the Hessian: `tr H = E z'Hz` over random signs `z`.

    The diagonal adds no noise: where the Hessian is diagonal, every draw is exact. Times `rho^2 / 2` it is
    `average_case_sharpness` to second order. It predicts generalisation only weakly (Andriushchenko et al., 2023).

    Args:
        loss_fn: `loss_fn(params, *batch)` returns the loss, a real tensor of shape (). It must have second derivatives:
            of attention, torch's fused kernels have none (`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` has).
        params: A pytree of tensors.
        *batch: Passed on to `loss_fn`.
        draws: Number of probes, at least 2; one Hessian-vector product each.
        seed: Where the generators of the probes start; as in `average_case_sharpness`.
        chunk_size: How many probes are computed at once by `vmap`; `None` takes all, 1 takes them in a plain loop.

    Returns:
        `(mean, standard_error)`, tensors of shape ().

    Raises:
        TypeError: If `loss_fn` does not return a real tensor of shape ().
        ValueError: If a number is out of range.

    >>> w = torch.tensor([1.0, 2.0])
    >>> hessian_trace(lambda w: (w**2).sum(), w)
    Estimate(mean=tensor(4.), standard_error=tensor(0.))

    References:
        Hutchinson, 1989, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines.
    """
    product, real = _product("hessian_trace", loss_fn, params, batch)

    return estimate("hessian_trace", lambda z: _dot(z, product(z), real), rademacher, real, draws, seed, chunk_size)


def hessian_eigenpairs(
    loss_fn: Loss, params: P, *batch: object, k: int = 1, tol: float = 1e-4, seed: int = 0
) -> Eigenpairs[P]:
    """Finds the `k` largest eigenvalues of the Hessian, and their vectors, by SciPy's Lanczos method.

    Largest means the most positive: the loss curves upwards along them. The most negative are minus those of `-L`.
    Vectors are kept in float64 between products; each product is computed in the dtype of the params. Needs
    `pip install "funcsam[measures]"`. The largest eigenvalue predicts generalisation only weakly (Andriushchenko et
    al., 2023), and follows the scale of the params and the learning rate.

    Args:
        loss_fn: `loss_fn(params, *batch)` returns the loss, a real tensor of shape (). It must have second derivatives,
            see `hessian_trace`.
        params: A pytree of tensors; of one model. Loop over the members of an ensemble.
        *batch: Passed on to `loss_fn`. Its whole graph stays in memory meanwhile.
        k: Number of eigenvalues, at most the number of params.
        tol: Relative accuracy of the eigenvalues. Products in float32 limit it to about 1e-6.
        seed: Where the generator of the starting vector starts.

    Returns:
        `(values, vectors)`, the values of shape (k,), on the device of the params and in their widest dtype. NaN
        throughout if the Hessian is not finite.

    Raises:
        ImportError: If SciPy is not installed.
        TypeError: If `loss_fn` does not return a real tensor of shape ().
        ValueError: If a number is out of range.
        RuntimeError: Under `vmap`, or if the method does not converge.

    >>> w = torch.tensor([1.0, 1.0])
    >>> hessian_eigenpairs(lambda w: 3 * w[0] ** 2 - 4 * w[1] ** 2, w).values
    tensor([6.])

    References:
        Lehoucq, Sorensen and Yang, 1998, ARPACK Users' Guide: implicitly restarted Lanczos.
        Pearlmutter, 1994, Fast exact multiplication by the Hessian.
    """
    where = "hessian_eigenpairs"
    checks.count(where, k=k)
    checks.positive(where, tol=tol)
    if not levels.eager():
        raise RuntimeError(
            f"{where}: must not run under `vmap` or another transform of torch.func, nor be compiled. Loop over the "
            "members, `for params in ensemble.unstack(stacked)`; differentiate the values by `grad_and_value`."
        )
    product, real = _product(where, loss_fn, params, batch)
    leaves = tree.flatten(real)[0]
    size = sum(leaf.numel() for leaf in leaves)
    if k > size:
        raise ValueError(f"{where}: `k` must be at most the number of params, got {k} for {size}.")
    start = torch.randn(size, dtype=torch.float64, device="cpu", generator=generator(where, seed))
    tracked = []

    def matvec(v: Tensor) -> Tensor:
        found = product(_unflat(v, real))
        tracked.append(any(leaf.requires_grad for leaf in tree.flatten(found)[0]))
        return _flat(found)

    values, vectors = _top(matvec, start, k, tol)
    values, pairs = values.to(leaves[0].device, tree.real_dtype(real)), _unflat(vectors, real)
    if any(tracked):  # the derivative of an eigenvalue is that of `v'Hv` at a fixed vector
        units = [_unflat(row, real) for row in vectors]
        values = torch.stack([_dot(v, product(v), real) for v in units])
        apply: Callable[..., Tensor] = _NotDifferentiable.apply
        pairs = tree.map(lambda leaf: apply(leaf, values), pairs)
    return Eigenpairs(values, tree.like_views(pairs, params))


class _NotDifferentiable(torch.autograd.Function):
    """Hands eigenvectors on, and refuses to differentiate them."""

    @staticmethod
    def forward(ctx: object, vector: Tensor, values: Tensor) -> Tensor:
        return vector.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(
            "hessian_eigenpairs: `vectors` must not be differentiated, got a backward pass through them. "
            "Detach them; the values can be differentiated."
        )


def _dot(x: Params, y: Params, real: Params) -> Tensor:
    dtype = tree.real_dtype(real)
    sums = [torch.sum(a * b, dtype=dtype) for a, b in zip(tree.flatten(x)[0], tree.flatten(y)[0], strict=True)]
    return (
        torch.stack([each.to(sums[0].device) for each in sums]).sum()
        if sums
        else torch.zeros((), dtype=dtype, device=tree.device(real))
    )


def _flat(x: Params) -> Tensor:
    """Returns one vector in float64 on the CPU, where SciPy works."""
    return torch.cat([leaf.detach().reshape(-1).cpu().double() for leaf in optree.tree_leaves(x)])


def _unflat(v: Tensor, like: P) -> P:
    """Undoes `_flat`, of one vector or of rows of them."""
    leaves, spec = tree.flatten(like)
    parts = torch.split(v, [leaf.numel() for leaf in leaves], dim=-1)
    pairs = zip(parts, leaves, strict=True)
    new = [part.reshape(*v.shape[:-1], *leaf.shape).to(leaf.device, leaf.dtype) for part, leaf in pairs]
    return tree.unflatten(spec, new, like)


def _top(matvec: Callable[[Tensor], Tensor], start: Tensor, k: int, tol: float) -> tuple[Tensor, Tensor]:
    """Returns the `k` largest eigenvalues of a symmetric matrix, the largest first, and their vectors as rows."""
    eigsh, operator, no_convergence = _scipy()
    size = len(start)
    first = matvec(start)
    if not first.isfinite().all():
        return start.new_full((k,), torch.nan), start.new_full((k, size), torch.nan)
    if size <= max(2 * k + 1, 20):  # then Lanczos would span the whole space, and may break down where it is degenerate
        matrix = torch.stack([matvec(row) for row in torch.diag(torch.ones_like(start))])
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return values[-k:].flip(0), vectors.T[-k:].flip(0)
    if not first.any():  # of a matrix that is zero Lanczos knows no start
        return start.new_zeros(k), torch.diag(torch.ones_like(start))[:k]
    matrix = operator((size, size), matvec=lambda v: matvec(torch.from_numpy(v).reshape(-1)).numpy(), dtype="float64")
    try:
        found = eigsh(matrix, k=k, which="LA", v0=start.numpy(), tol=tol)
    except no_convergence as error:
        raise RuntimeError(
            f"hessian_eigenpairs: Lanczos must converge, got {len(error.eigenvalues)} of {k} eigenvalues. "
            "Give a larger `tol`."
        ) from None
    values, vectors = (torch.from_numpy(each) for each in found)
    return values.flip(0), vectors.T.flip(0)


def _scipy() -> tuple[Any, Any, Any]:
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError:
        raise ImportError('hessian_eigenpairs: SciPy must be installed, try: pip install "funcsam[measures]"') from None
    return eigsh, LinearOperator, ArpackNoConvergence
