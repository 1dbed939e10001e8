"""Two ways to save an evaluation of the gradient: a branch, and a gradient that is already known."""

from collections.abc import Callable

import torch
from torch import Tensor

from funcsam.core import checks, levels, tree
from funcsam.core.types import P, Params


def either(pick: Tensor | bool, yes: Callable[[], P], no: Callable[[], P]) -> P:
    """Returns `yes()` where `pick` is true, and `no()` where it is not.

    The one branch of a member of the family, and there to save a gradient. In plain eager code exactly one of the two
    is called; on an accelerator that waits for the value of `pick`. Where a tensor has no value to look at, under
    `torch.func` and `torch.compile` and on the device `meta`, both are called, and `torch.where` chooses leaf by leaf.
    So both must be pure, and finite wherever the result is to be differentiated.

    Args:
        pick: A bool, or a boolean tensor of shape ().
        yes: Returns a pytree of tensors.
        no: Returns a pytree of tensors of the same structure, shapes and dtypes.

    Raises:
        TypeError: If `pick` is anything else, or the trees hold anything but tensors.
        ValueError: If both were called, and the trees differ in structure, shapes or dtypes.

    >>> import torch
    >>> either(torch.tensor(1) % 2 == 0, lambda: {"w": torch.tensor(1.0)}, lambda: {"w": torch.tensor(2.0)})
    {'w': tensor(2.)}
    """
    if not (isinstance(pick, bool) or (isinstance(pick, Tensor) and pick.dtype is torch.bool and not pick.ndim)):
        got = f"{pick.dtype} of shape {tuple(pick.shape)}" if isinstance(pick, Tensor) else type(pick).__name__
        raise TypeError(f"either: `pick` must be a bool or a boolean tensor of shape (), got {got}.")
    if not isinstance(pick, Tensor) or (levels.eager() and not pick.is_meta):
        return yes() if pick else no()
    chosen, other = yes(), no()
    checks.tensors("either", "yes", chosen)
    checks.same("either", "no", other, chosen, "yes")
    checks.dtypes("either", "no", other, chosen, "yes")
    return tree.where(pick, chosen, other)


def given(grads: P) -> Callable[..., tuple[P, tuple[()]]]:
    """Returns a known gradient as a grads_fn, so that an ascent that asks for it costs no evaluation.

    `offset, state, _ = ascent.update(params, given(grads), state)`

    Its `aux` is `()`, as that of a bare gradient: the caller has the aux that belongs to `grads`. The answer is
    the same at all params, so `given` is for transforms that only map gradients.

    Args:
        grads: A pytree with the structure of the params.

    >>> import torch
    >>> from funcsam import normalize
    >>> normalize().update(torch.zeros(2), given(torch.tensor([3.0, 4.0])), ())
    (tensor([0.6000, 0.8000]), (), ())
    """

    def answer(params: Params, *batch: object) -> tuple[P, tuple[()]]:
        return grads, ()

    return answer
