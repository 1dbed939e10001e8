"""Stochastic gradient descent."""

from funcsam.core import checks, schedules
from funcsam.core.records import factory
from funcsam.core.transform import Transform, chain
from funcsam.core.types import Hyper, ScalarOrSchedule
from funcsam.transforms.decay import add_decayed_weights
from funcsam.transforms.moments import trace
from funcsam.transforms.scaling import scale_by_learning_rate


@factory
def sgd(
    lr: Hyper = 1e-3,
    momentum: ScalarOrSchedule = 0.0,
    dampening: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    nesterov: bool = False,
) -> Transform:
    """Stochastic gradient descent, `torch.optim.SGD`.

    `chain(add_decayed_weights(weight_decay), trace(momentum, ...), scale_by_learning_rate(lr))`, without the parts
    whose number is zero. To maximise, put `scale(-1)` in front.

    A param that the loss does not use has gradient zero here: weight decay and past momentum still update it, while
    torch.optim skips a param whose `grad` is None. Use `freeze` at the end of the chain to keep such params fixed.

    Args:
        lr: Learning rate. A non-negative number, a tensor of shape (), a schedule, or a prefix tree of these.
        momentum: In [0, 1]. A number, a tensor of shape () or a schedule.
        dampening: In [0, 1]; the first gradient is not damped. A number, a tensor of shape () or a schedule.
        weight_decay: Factor of the params that is added to the gradient before the momentum. A non-negative number, a
            tensor of shape () or a schedule.
        nesterov: Whether to use Nesterov's momentum, which needs `momentum` and no `dampening`.

    Raises:
        ValueError: If a hyperparameter is out of range.
    """
    checks.nonnegative("sgd", lr=lr, weight_decay=weight_decay)
    checks.share("sgd", momentum=momentum, dampening=dampening)
    if nesterov and (not schedules.nonzero(momentum) or schedules.nonzero(dampening)):
        got = f"momentum {momentum} and dampening {dampening}"
        raise ValueError(f"sgd: `nesterov` must come with momentum and without dampening, got {got}.")
    decay = (add_decayed_weights(weight_decay),) if schedules.nonzero(weight_decay) else ()
    memory = (trace(momentum, dampening=dampening, nesterov=nesterov),) if schedules.nonzero(momentum) else ()
    return chain(*decay, *memory, scale_by_learning_rate(lr))
