"""Base optimizers: chains with the names, defaults and conventions of torch.optim."""

from typing import Any

from funcsam import checks
from funcsam.decay import add_decayed_weights
from funcsam.moments import scale_by_adam, trace
from funcsam.records import factory
from funcsam.scaling import scale_by_learning_rate
from funcsam.schedules import ScalarOrSchedule
from funcsam.transform import Transform, chain
from funcsam.tree import Mask


def _used(value: Any) -> bool:
    return not isinstance(value, float | int) or value != 0


@factory
def sgd(
    lr: Any = 1e-3,
    momentum: ScalarOrSchedule = 0.0,
    dampening: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    nesterov: bool = False,
) -> Transform:
    """Stochastic gradient descent, `torch.optim.SGD`.

    `chain(add_decayed_weights(weight_decay), trace(momentum, ...), scale_by_learning_rate(lr))`, without the parts
    whose number is zero. To maximise, put `scale(-1)` in front.

    A param that the loss does not use has a gradient of zero here: it decays, and its momentum goes on. torch.optim
    skips a param whose `grad` is None. `freeze` at the end of the chain keeps such params as they are.

    Args:
        lr: Learning rate. A non-negative number, a tensor of shape (), a schedule, or a prefix tree of these.
        momentum: In [0, 1]. A number, a tensor of shape () or a schedule.
        dampening: In [0, 1], likewise; the first gradient enters undamped.
        weight_decay: Non-negative, likewise; added to the gradient before the momentum.
        nesterov: Whether to look ahead. Needs momentum and no dampening.

    Raises:
        ValueError: If a hyperparameter is out of range.
    """
    checks.nonnegative("sgd", lr=lr, weight_decay=weight_decay)
    checks.share("sgd", momentum=momentum, dampening=dampening)
    if nesterov and (not _used(momentum) or _used(dampening)):
        got = f"momentum {momentum} and dampening {dampening}"
        raise ValueError(f"sgd: `nesterov` must come with momentum and without dampening, got {got}.")
    decay = (add_decayed_weights(weight_decay),) if _used(weight_decay) else ()
    memory = (trace(momentum, dampening=dampening, nesterov=nesterov),) if _used(momentum) else ()
    return chain(*decay, *memory, scale_by_learning_rate(lr))


@factory
def adam(
    lr: Any = 1e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    amsgrad: bool = False,
) -> Transform:
    """Adam, `torch.optim.Adam`: weight decay is L2, part of the gradient.

    `chain(add_decayed_weights(weight_decay), scale_by_adam(...), scale_by_learning_rate(lr))`. A param that the loss
    does not use decays and keeps moving, unlike in torch.optim; see `sgd`.

    Args:
        lr: Learning rate. A non-negative number, a tensor of shape (), a schedule, or a prefix tree of these.
        betas: Decays of the mean and of the mean square, in [0, 1). Numbers, tensors of shape () or schedules.
        eps: Added to the root of the mean square, non-negative, likewise.
        weight_decay: Non-negative, likewise.
        amsgrad: Whether to divide by the largest mean square so far.

    Raises:
        ValueError: If a hyperparameter is out of range.

    References:
        Kingma and Ba, 2015, algorithm 1.
    """
    checks.nonnegative("adam", lr=lr, eps=eps, weight_decay=weight_decay)
    checks.fraction("adam", betas=betas)
    decay = (add_decayed_weights(weight_decay),) if _used(weight_decay) else ()
    return chain(*decay, scale_by_adam(*betas, eps, amsgrad=amsgrad), scale_by_learning_rate(lr))


@factory
def adamw(
    lr: Any = 1e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-2,
    amsgrad: bool = False,
    mask: Mask = None,
) -> Transform:
    """AdamW, `torch.optim.AdamW`: weight decay is decoupled from the moments.

    `chain(scale_by_adam(...), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(lr))`. A param that the
    loss does not use decays and keeps moving, unlike in torch.optim; see `sgd`.

    Args:
        lr: Learning rate. A non-negative number, a tensor of shape (), a schedule, or a prefix tree of these.
        betas: Decays of the mean and of the mean square, in [0, 1). Numbers, tensors of shape () or schedules.
        eps: Added to the root of the mean square, non-negative, likewise.
        weight_decay: Non-negative, likewise. 0.01 as in torch.optim.
        amsgrad: Whether to divide by the largest mean square so far.
        mask: Which leaves decay: a prefix tree of booleans, or a function of path and leaf.

    Raises:
        ValueError: If a hyperparameter is out of range.

    References:
        Loshchilov and Hutter, 2019, algorithm 2.
    """
    checks.nonnegative("adamw", lr=lr, eps=eps, weight_decay=weight_decay)
    checks.fraction("adamw", betas=betas)
    decay = (add_decayed_weights(weight_decay, mask),) if _used(weight_decay) else ()
    return chain(scale_by_adam(*betas, eps, amsgrad=amsgrad), *decay, scale_by_learning_rate(lr))
