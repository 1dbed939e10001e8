"""GSAM: SAM that also closes the gap between the loss at the ascent and at the params."""

from torch import Tensor

from funcsam.core import checks, schedules, tree
from funcsam.core.records import factory
from funcsam.core.transform import Transform
from funcsam.core.types import Hyper, P, ScalarOrSchedule
from funcsam.family.sam import plain_ascent
from funcsam.family.sharpness_aware import sharpness_aware


@factory
def gsam(rho: Hyper = 0.05, alpha: ScalarOrSchedule = 0.4) -> Transform:
    """Descends the loss at SAM's ascent, and ascends the loss at the params across it.

    `u = g+ - alpha r`, where `g` and `g+` are the gradients at `w` and at `w + rho g / ||g||`, and `r` is the part of
    `g` that is orthogonal to `g+`. To first order the step leaves the loss at the ascent to SAM, and makes the
    surrogate gap `L(w + e) - L(w)` smaller.

    Args:
        rho: Radius of the neighbourhood, as in `sam`: a non-negative number, a tensor of shape `()`, a schedule, or a
            prefix tree of these. `0` gives back the base optimizer. The default is that of `sam`. The authors let it
            follow the learning rate, from 0.6 to 0.1 for vision transformers on ImageNet; with
            `lr = cosine(lr, steps)` that is `cosine(0.6, steps, end=0.1)`.
        alpha: Weight of the orthogonal part. A non-negative number, a tensor of shape `()` or a schedule. `0` gives
            back SAM. The default is that of the example of the author's PyTorch code; 0.6 for vision transformers.

    Returns:
        A `Transform` that evaluates `grads_fn` twice a step; its `aux` is that of the params.

    Raises:
        ValueError: If `rho` or `alpha` is negative or not finite.

    Of `g = (1, 1)` the part orthogonal to `g+ = (1, 0)` is `(0, 1)`:

    >>> import torch
    >>> answers = iter([torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])])
    >>> tx, w = gsam(rho=0.1, alpha=0.5), torch.zeros(2)
    >>> tx.update(w, lambda w: next(answers), tx.init(w))[0]
    tensor([ 1.0000, -0.5000])

    References:
        Zhuang et al., 2022, algorithm 1. arXiv 2203.08065.
    """
    checks.nonnegative("gsam", rho=rho, alpha=alpha)

    def combine(grads: P, probe: P, step: Tensor) -> P:
        return tree.add_scaled(probe, -schedules.at(alpha, step), tree.reject(grads, probe))

    return sharpness_aware(plain_ascent(rho), combine)
