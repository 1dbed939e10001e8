"""Arithmetic on pytrees of tensors.

Every function returns new trees, keeps each leaf's dtype, device and layout, and works under `vmap`, `torch.func.grad`
and `torch.compile`. A factor is a number or a tensor of shape (). Leaves may be DTensors.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import optree
import torch
from torch import Tensor
from torch.nn import Parameter

from funcsam.core import checks, frames, kernels, levels, masks, shards
from funcsam.core.types import Mask, Number, P, Tree

__all__ = [
    "add",
    "add_scaled",
    "all_finite",
    "counter",
    "divide",
    "dot",
    "lerp",
    "map",
    "maximum",
    "multiply",
    "norm",
    "reciprocal",
    "reject",
    "scale",
    "shift",
    "sqrt",
    "where",
    "zeros_like",
]


vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm
Words: TypeAlias = tuple[str, str, str]
"""What an error says if trees do not fit: where, what, and what it must be like."""
STATE: Words = ("step", "state", "params")
UPDATES: Words = ("apply_updates", "updates", "params")


def flatten(x: Tree) -> tuple[list[Tensor], optree.PyTreeSpec]:
    """Returns the leaves and the structure."""
    leaves, spec = optree.tree_flatten(x)
    return leaves, spec


def empty(x: object) -> bool:
    """Tells whether a node is a dict without entries, such as the buffers of many modules."""
    return isinstance(x, dict) and not x


def flatten_any(x: Tree) -> tuple[list[Tree], optree.PyTreeSpec]:
    """Flattens a tree that may hold empty dicts, such as `aux` or a batch; an empty dict counts as a leaf.

    The compiler cannot take an empty dict apart (torch 2.13 with optree 0.20).
    """
    leaves, spec = optree.tree_flatten(x, is_leaf=empty)
    return leaves, spec


def unflatten(spec: optree.PyTreeSpec, leaves: Iterable[object], like: P) -> P:
    """Puts leaves into a structure; `like`, a tree of this structure, is for type checkers alone."""
    tree: P = optree.tree_unflatten(spec, leaves)  # type: ignore[assignment]
    return tree


def detached(params: P, where: str = "step") -> P:
    """Detaches params that are leaves, so that a step does not extend their graph; see `frames` for the rule."""
    leaves, spec = flatten(params)
    # The compiler does not compile again for a leaf, but for an `nn.Parameter` it does.
    compiling = torch.compiler.is_compiling()
    found = [x.requires_grad and (isinstance(x, Parameter) if compiling else x.is_leaf) for x in leaves]
    if not any(found) or frames.differentiating():
        return params
    if not compiling:
        levels.refuse_functional(where)
    return unflatten(spec, [leaf.detach() if on else leaf for leaf, on in zip(leaves, found, strict=True)], params)


def _leaves_like(tree: Tree, xs: Sequence[Tensor], spec: optree.PyTreeSpec, words: Words) -> list[Tensor]:
    """Returns the leaves of a tree, and raises unless it has the structure and the shapes of another."""
    leaves, found = flatten(tree)
    if found != spec or any(not isinstance(y, Tensor) or y.shape != x.shape for x, y in zip(xs, leaves, strict=True)):
        where, what, like = words
        checks.same(where, what, tree, optree.tree_unflatten(spec, xs), like)
    return leaves


def _each(
    where: str, fused: Callable[..., Sequence[Tensor]] | None, single: Callable[..., Tensor], x: P, *rest: Tree
) -> P:
    """Applies one fused kernel, or the operation on each leaf, and casts back to the dtypes of `x`."""
    xs, spec = flatten(x)
    others = [_leaves_like(tree, xs, spec, (where, "y", "x")) for tree in rest]
    return unflatten(spec, kernels.each(fused, single, xs, *others), x)


def map(fn: Callable[..., Tensor], x: P, *rest: Tree) -> P:
    """Applies `fn` leaf by leaf and casts back to the dtypes of `x`."""
    return _each("map", None, fn, x, *rest)


def zeros_like(x: P) -> P:
    """Returns zeros in the structure, shapes and dtypes of `x`."""
    xs, spec = flatten(x)
    return unflatten(spec, [torch.zeros_like(a) for a in xs], x)


def widened(x: P) -> P:
    """Returns leaves of half precision in float32, and others as they are."""
    xs, spec = flatten(x)
    return unflatten(spec, [a.float() if a.dtype in kernels.HALF else a for a in xs], x)


def cast(x: P, like: Tree) -> P:
    """Returns `x` in the dtypes of another tree."""
    xs, spec = flatten(x)
    return unflatten(spec, kernels.cast(xs, flatten(like)[0]), x)


def device(x: Tree) -> torch.device:
    """Returns the device of the first leaf; of none, the CPU."""
    return next((leaf.device for leaf in optree.tree_leaves(x)), torch.device("cpu"))


def counter(params: Tree) -> Tensor:
    """Returns a step count of zero, int64 of shape (), on the device of the first leaf."""
    return torch.zeros((), dtype=torch.int64, device=device(params))


def add(x: P, y: P, words: Words = ("add", "y", "x")) -> P:
    """Returns `x + y`; `words` are those of an error if they do not fit."""
    xs, spec = flatten(x)
    ys = _leaves_like(y, xs, spec, words)
    return unflatten(spec, kernels.each(torch._foreach_add, operator.add, xs, ys), x)


def multiply(x: P, y: P) -> P:
    """Returns the elementwise product."""
    return _each("multiply", torch._foreach_mul, operator.mul, x, y)


def divide(x: P, y: P) -> P:
    """Returns the elementwise quotient."""
    return _each("divide", torch._foreach_div, operator.truediv, x, y)


def maximum(x: P, y: P) -> P:
    """Returns the elementwise maximum."""
    return _each("maximum", torch._foreach_maximum, torch.maximum, x, y)


def sqrt(x: P) -> P:
    """Returns the elementwise root; its derivative at zero is defined as zero."""
    tracked = any(leaf.requires_grad for leaf in flatten(x)[0])
    return _each("sqrt", None if tracked else torch._foreach_sqrt, _sqrt, x)


def _sqrt(x: Tensor) -> Tensor:
    zero = x == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, x)))


def shift(x: P, number: Number) -> P:
    """Returns `x + number`."""
    if isinstance(number, Tensor):
        return map(lambda a: a + kernels.on(number, a), x)
    return _each("shift", lambda xs: torch._foreach_add(xs, number), lambda a: a + number, x)


def lerp(x: P, y: P, weight: Number) -> P:
    """Returns `x + weight (y - x)`."""
    if isinstance(weight, Tensor):
        return _each("lerp", None, lambda a, b: a + kernels.on(weight, a) * (b - a), x, y)
    return _each(
        "lerp", lambda xs, ys: torch._foreach_lerp(xs, ys, weight), lambda a, b: torch.lerp(a, b, weight), x, y
    )


def real_views(x: P) -> P:
    """Views complex leaves as pairs of reals."""
    xs, spec = flatten(x)
    return unflatten(spec, [torch.view_as_real(a) if a.is_complex() else a for a in xs], x)


def like_views(x: P, like: Tree) -> P:
    """Undoes `real_views`, given a tree of the original dtypes."""
    xs, spec = flatten(x)
    likes = flatten(like)[0]
    return unflatten(
        spec, [torch.view_as_complex(a) if b.is_complex() else a for a, b in zip(xs, likes, strict=True)], x
    )


def _scaled(x: Tensor, factor: Number) -> Tensor:
    if x.dtype in kernels.HALF:  # a float32 factor such as 1/||g|| may lie outside the range of float16
        return (x.float() * kernels.on(factor, x)).to(x.dtype)
    return (x * kernels.on(factor, x)).to(x.dtype)


def scale(factor: Tree, x: P) -> P:
    """Returns `factor * x`; the factor is a number, a tensor of shape () or a prefix tree of them."""
    xs, spec = flatten(x)
    if isinstance(factor, float | int | Tensor):
        if kernels.fusable(xs) and kernels.uniform(factor, xs):
            return unflatten(spec, shards.fused(lambda xs: torch._foreach_mul(xs, factor), xs), x)
        factors = [factor] * len(xs)
    else:
        factors = masks.broadcast(factor, x)
    return unflatten(spec, [_scaled(a, s) for a, s in zip(xs, factors, strict=True)], x)


def add_scaled(x: P, factor: Number, y: P, mask: Mask = None, words: Words = ("add_scaled", "y", "x")) -> P:
    """Returns `x + factor * y`, and `x` itself where the mask is False; `words` are those of an error."""
    xs, spec = flatten(x)
    ys = _leaves_like(y, xs, spec, words)
    if mask is None and isinstance(factor, float | int) and kernels.fusable(xs):
        return unflatten(spec, kernels.cast(shards.fused(torch._foreach_add, xs, ys, alpha=factor), xs), x)
    chosen = [True] * len(xs) if mask is None else masks.masks(mask, y)
    out = [_add_scaled(a, factor, b) if on else a for a, b, on in zip(xs, ys, chosen, strict=True)]
    return unflatten(spec, kernels.cast(out, xs), x)


def _add_scaled(x: Tensor, factor: Number, y: Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return x + _scaled(y, factor)
    return x + factor * y  # not `torch.add(x, y, alpha=factor)`: compiled, it loses `alpha` where `x` is a product


def scale_by_magnitude(x: P, w: P, eta: Tree = 0.0, mask: Mask = None) -> P:
    """Returns `(|w| + eta) x` in the dtypes of `x`, and `x` itself where the mask is False."""
    xs, spec = flatten(x)
    ws = _leaves_like(w, xs, spec, ("scale_by_magnitude", "w", "x"))
    if mask is None and isinstance(eta, float | int) and kernels.fusable(xs):
        sizes = shards.fused(torch._foreach_abs, ws)
        if eta:
            sizes = shards.fused(lambda sizes: torch._foreach_add(sizes, eta), sizes)
        return unflatten(spec, kernels.cast(shards.fused(torch._foreach_mul, xs, sizes), xs), x)
    etas = [eta] * len(xs) if isinstance(eta, float | int | Tensor) else masks.broadcast(eta, x)
    out = [
        a * (b.abs() + kernels.on(shift, b)) if on else a
        for a, b, shift, on in zip(xs, ws, etas, masks.masks(mask, w), strict=True)
    ]
    return unflatten(spec, kernels.cast(out, xs), x)


def all_finite(x: Tree) -> Tensor:
    """Tells whether no entry is NaN or infinite, as a boolean of shape ()."""
    leaves = optree.tree_leaves(x)
    if shards.any_sharded(leaves):
        return shards.total(leaves, _count_not_finite) == 0
    finite = [leaf.isfinite().all().to(device(leaves)) for leaf in leaves]
    return torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool, device="cpu")


def _count_not_finite(leaves: list[Tensor]) -> Tensor:
    return torch.stack([(~leaf.isfinite()).sum() for leaf in leaves]).sum()


def where(condition: Tensor, x: P, y: P) -> P:
    """Chooses whole trees by a boolean of shape ()."""
    return _each("where", None, lambda a, b: torch.where(condition, a, b), x, y)


def norm(x: Tree) -> Tensor:
    """Returns the global 2-norm, shape (), in float32 at least and `abs`-based for complex leaves.

    In float32, entries below about 1e-19 or above about 1e19 are out of range: their squares are.
    """
    leaves = [leaf for leaf in optree.tree_leaves(x) if leaf.numel()]
    if not leaves:
        return torch.zeros((), dtype=torch.float32, device=device(x))
    if shards.any_sharded(leaves):
        return shards.total(leaves, _square).sqrt()
    if levels.eager() and not any(leaf.dtype in kernels.HALF for leaf in leaves):
        norms = list(torch._foreach_norm(leaves))
    else:
        norms = [_norm(leaf) for leaf in leaves]
    if len(norms) == 1:
        return norms[0]
    dtype, place = norms[0].dtype, norms[0].device
    if any(each.dtype is not dtype or each.device != place for each in norms):
        for each in norms:
            dtype = torch.promote_types(dtype, each.dtype)
        norms = [each.to(place, dtype) for each in norms]
    return vector_norm(torch.stack(norms))


def _square(leaves: list[Tensor]) -> Tensor:
    return norm(leaves).square().to(real_dtype(leaves))  # one dtype on all ranks, also where a shard is empty


def _norm(x: Tensor) -> Tensor:
    return vector_norm(x, dtype=torch.float32 if x.dtype in kernels.HALF else None)


def dot(x: Tree, y: Tree) -> Tensor:
    """Returns the real inner product of two trees, `sum_i Re(conj(x_i) y_i)` over all entries of all leaves.

    It is computed in float32 at least. Products out of its range are lost, as the squares in `norm` are.

    Args:
        x: A pytree of tensors.
        y: A pytree of tensors with the structure and the shapes of `x`; dtypes may differ.

    Returns:
        A real tensor of shape () in the widest dtype among the leaves, float32 at least; 0 if there are no entries.

    Raises:
        ValueError: If `y` does not have the structure and the shapes of `x`.

    >>> dot([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([4.0, 5.0]), torch.tensor(-2.0)])
    tensor(8.)
    """
    xs, spec = flatten(x)
    ys = _leaves_like(y, xs, spec, ("dot", "y", "x"))
    products = [_product(a, b) for a, b in zip(xs, ys, strict=True) if a.numel()]
    if not products:
        return torch.zeros((), dtype=torch.float32, device=device(x))
    return shards.total(products, _sum) if shards.any_sharded(products) else _sum(products)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Returns the real product entry by entry, in float32 at least."""
    x, y = (a.float() if a.dtype in kernels.HALF else a for a in (x, y))
    return (x.conj() * y).real if x.is_complex() or y.is_complex() else x * y


def _sum(leaves: list[Tensor]) -> Tensor:
    dtype = real_dtype(leaves)
    return torch.stack([leaf.sum().to(leaves[0].device, dtype) for leaf in leaves]).sum()


def reject(x: P, y: Tree) -> P:
    """Returns the part of `x` that is orthogonal to `y`, exactly zero where only rounding is left of it.

    `r = x - (<x, y> / <y, y>) y`, with the inner product of `dot` over the whole trees. Leaves of half precision are
    computed in float32. If `x` and `y` are parallel, the difference is rounding, and a normalisation would make a
    direction of it. So `r` is zero if `||r|| < t ||x - r||`, with `t = eps + 64 min(eps, eps_32)`:

    - `eps` is that of the coarsest dtype among the leaves (1.2e-7 in float32, 7.8e-3 in bfloat16). Entries that are
      numbers of this dtype are known to `eps / 2` of their size, in `x` and in `y` alike, so that a shorter `r` says
      nothing.
    - 64 of the dtype that is computed in are for the sums of many products (`eps_32` is that of float32).

    Args:
        x: A pytree of tensors.
        y: A pytree of tensors with the structure and the shapes of `x`. If it is zero, `x` comes back unchanged.

    Returns:
        A tree in the dtypes of `x`. NaN and infinity in either tree give NaN. Where it is set to zero, so is its
        derivative.

    Raises:
        ValueError: If `y` does not have the structure and the shapes of `x`.

    >>> reject(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0]))
    tensor([0., 4.])
    """
    xs, spec = flatten(x)
    ys = _leaves_like(y, xs, spec, ("reject", "y", "x"))
    if not xs:
        return x
    eps = max(torch.finfo(leaf.dtype).eps for leaf in (*xs, *ys))
    wide, other = widened(xs), widened(ys)
    square = dot(other, other)  # whose sums are exact enough for the tolerance; those of `norm` are not
    zero = square == 0
    share = torch.where(zero, 0.0, dot(wide, other) / torch.where(zero, 1.0, square))
    share = share + (square - square)  # NaN if the square is infinite, where the quotient says 0
    rest = [_add_scaled(a, -share, b) for a, b in zip(wide, other, strict=True)]
    tolerance = eps + 64 * min(eps, torch.finfo(torch.float32).eps)
    lost = norm(rest) < tolerance * (share.abs() * square.sqrt())
    return unflatten(spec, kernels.cast([torch.where(lost, 0.0, a) for a in rest], xs), x)


def reciprocal(x: Tensor) -> Tensor:
    """Returns `1 / x` with `1 / 0 = 0`; NaN and infinity both give NaN, so that neither passes for a small factor."""
    zero = x == 0
    if levels.eager() and not x.requires_grad:
        return torch.where(zero, x, x.reciprocal()) + (x - x)
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, x)) + (x - x)


def unit(x: P) -> P:
    """Returns `x / ||x||`, and zero for zero; one entry that is NaN or infinite makes every entry NaN."""
    return scale(reciprocal(norm(x)), x)


def real_dtype(x: Tree) -> torch.dtype:
    """Returns the widest real dtype among the leaves, float32 at least: scalars are computed in it."""
    dtype = torch.float32
    for leaf in optree.tree_leaves(x):
        dtype = torch.promote_types(dtype, (leaf.real if leaf.is_complex() else leaf).dtype)
    return dtype
