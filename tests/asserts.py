"""`equal` and `close` compare structure, then dtype and shape, then values, and never broadcast.

`defaults` changes the default dtype and device of torch, on which nothing may depend.
"""

import contextlib

import optree
import torch


def _pairs(got, wanted):
    assert optree.tree_structure(got) == optree.tree_structure(wanted)
    pairs = list(zip(optree.tree_leaves(got), optree.tree_leaves(wanted), strict=True))
    for a, b in pairs:
        assert (a.dtype, a.shape, a.device, a.layout) == (b.dtype, b.shape, b.device, b.layout)
    return pairs


def equal(got, wanted):
    """Asserts that two trees are the same, bit for bit up to the sign of zero; NaN equals NaN."""
    for a, b in _pairs(got, wanted):
        assert ((a == b) | (a.isnan() & b.isnan())).all(), f"{got} is not {wanted}"


def close(got, wanted, rtol=1e-9):
    """Asserts that no entry differs by more than `rtol (1 + largest entry)`; NaN, inf and -inf must agree."""
    pairs = [(a.double(), b.double()) if b.dtype is torch.bool else (a, b) for a, b in _pairs(got, wanted)]
    sizes = [b[b.isfinite()].abs().max().item() for _, b in pairs if b.isfinite().any()]
    atol = rtol * (1 + max(sizes, default=0))
    for a, b in pairs:
        same = (a == b) | (a.isnan() & b.isnan())
        assert (same | ((a - b).abs() <= atol)).all(), f"{got} is not within {atol:.1e} of {wanted}"


@contextlib.contextmanager
def defaults(dtype=torch.bfloat16, device="meta"):
    """Sets torch's default dtype and default device for a while."""
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
