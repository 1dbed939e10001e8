"""Adam and AdamW."""

from funcsam.core import checks, schedules
from funcsam.core.records import factory
from funcsam.core.transform import Transform, chain
from funcsam.core.types import Hyper, Mask, ScalarOrSchedule
from funcsam.transforms.decay import add_decayed_weights
from funcsam.transforms.moments import scale_by_adam
from funcsam.transforms.scaling import scale_by_learning_rate


@factory
def adam(
    lr: Hyper = 1e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    amsgrad: bool = False,
) -> Transform:
    """Adam, `torch.optim.Adam`: weight decay is L2, part of the gradient.

    `chain(add_decayed_weights(weight_decay), scale_by_adam(...), scale_by_learning_rate(lr))`. Unlike in
    torch.optim, a param that the loss does not use is updated, too; see `sgd`.

    Args:
        lr: Learning rate. A non-negative number, a tensor of shape (), a schedule, or a prefix tree of these.
        betas: Decays of the mean and of the mean square, in [0, 1). Numbers, tensors of shape () or schedules.
        eps: Added to the root of the mean square. A non-negative number, a tensor of shape () or a schedule.
        weight_decay: Factor of the params that is added to the gradient. A non-negative number, a tensor of
            shape () or a schedule.
        amsgrad: Whether to divide by the largest mean square so far.

    Raises:
        ValueError: If a hyperparameter is out of range.

    References:
        Kingma and Ba, 2015, algorithm 1.
    """
    checks.nonnegative("adam", lr=lr, eps=eps, weight_decay=weight_decay)
    checks.fraction("adam", betas=betas)
    decay = (add_decayed_weights(weight_decay),) if schedules.nonzero(weight_decay) else ()
    return chain(*decay, scale_by_adam(*betas, eps, amsgrad=amsgrad), scale_by_learning_rate(lr))


@factory
def adamw(
    lr: Hyper = 1e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-2,
    amsgrad: bool = False,
    mask: Mask = None,
) -> Transform:
    """AdamW, `torch.optim.AdamW`: weight decay is decoupled from the moments.

    `chain(scale_by_adam(...), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(lr))`. Unlike
    in torch.optim, a param that the loss does not use is updated, too; see `sgd`.

    Args:
        lr: Learning rate. A non-negative number, a tensor of shape (), a schedule, or a prefix tree of these.
        betas: Decays of the mean and of the mean square, in [0, 1). Numbers, tensors of shape () or schedules.
        eps: Added to the root of the mean square. A non-negative number, a tensor of shape () or a schedule.
        weight_decay: Factor of the params that is added after the moments. A non-negative number, a tensor of
            shape () or a schedule. The default, 0.01, is that of torch.optim.
        amsgrad: Whether to divide by the largest mean square so far.
        mask: Which leaves decay: a prefix tree of booleans, or a function of path and leaf.

    Raises:
        ValueError: If a hyperparameter is out of range.

    References:
        Loshchilov and Hutter, 2019, algorithm 2.
    """
    checks.nonnegative("adamw", lr=lr, eps=eps, weight_decay=weight_decay)
    checks.fraction("adamw", betas=betas)
    decay = (add_decayed_weights(weight_decay, mask),) if schedules.nonzero(weight_decay) else ()
    return chain(scale_by_adam(*betas, eps, amsgrad=amsgrad), *decay, scale_by_learning_rate(lr))
