"""Momentum-SAM: the gradient at a point that the momentum perturbs, for the price of one."""

from funcsam.core import checks, schedules, tree
from funcsam.core.evaluations import given
from funcsam.core.records import factory
from funcsam.core.transform import Transform
from funcsam.core.types import Aux, Hyper, P, PairedGradsFn, ScalarOrSchedule, State
from funcsam.transforms.moments import TraceState, trace


@factory
def msam(rho: Hyper = 0.3, momentum: ScalarOrSchedule = 0.9) -> Transform:
    """Takes the only gradient of a step at `w - rho v / ||v||`, where `v` is the momentum, and adds it to `v`.

    `g = grads_fn(w - rho v / ||v||)`, `v = momentum v + g`, `u = v`. As the momentum is inside, what follows needs
    none: `chain(msam(rho, momentum), sgd(lr))`. The first step, where `v` is zero, is taken at the params.

    Args:
        rho: Length of the perturbation, in the units of the params: a non-negative number, a tensor of shape `()`, a
            schedule, or a prefix tree of these. `0` gives back momentum SGD. The default is that of the authors' class;
            for Wide ResNets and vision transformers they use 3.
        momentum: In [0, 1]. A number, a tensor of shape `()` or a schedule.

    Returns:
        A `Transform` that evaluates `grads_fn` once a step, and not at the params: its `aux`, such as the loss, and the
        states upstream are those of the perturbed point. Inside `partition` and `masked`, which evaluate at the params
        and return the aux from there, it costs one evaluation more.

    Raises:
        ValueError: If `rho` is negative or not finite, or `momentum` is out of range.

    On `L = w^2` at `w = 1` the first step takes the gradient 2; the second that at `1 - 0.5`, which is 1:

    >>> import torch
    >>> tx, w = msam(rho=0.5, momentum=0.5), torch.tensor(1.0)
    >>> grads_fn = torch.func.grad(lambda w: w**2)
    >>> updates, state, _ = tx.update(w, grads_fn, tx.init(w))
    >>> updates, tx.update(w, grads_fn, state)[0]
    (tensor(2.), tensor(2.))

    References:
        Becker et al., 2024, algorithm 1. arXiv 2401.12033.
    """
    checks.nonnegative("msam", rho=rho)
    checks.share("msam", momentum=momentum)
    memory = trace(momentum)

    def update(params: P, grads_fn: PairedGradsFn, state: TraceState, *batch: object) -> tuple[P, State, Aux]:
        checks.same("step", "state", state.trace, params)
        length = schedules.at(rho, state.step)
        grads, aux = grads_fn(tree.add_scaled(params, -1, tree.scale(length, tree.unit(state.trace))), *batch)
        updates, state, _ = memory.update_unchecked(params, given(grads), state)
        return updates, state, aux

    return Transform(memory.init_unchecked, update, TraceState, probes=True)
