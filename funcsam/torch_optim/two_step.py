"""Two passes and a step of a base optimizer: SAM, ASAM and their relatives."""

import weakref
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from funcsam.core import checks, tree
from funcsam.core.evaluations import given
from funcsam.core.transform import Transform
from funcsam.core.types import State, Tree
from funcsam.family.sam import adaptive_ascent, plain_ascent
from funcsam.family.sharpness_aware import Combine, SharpnessAwareState, check_ascent, check_combine
from funcsam.torch_optim.base import KEY, Closure, Groups, TreeOptimizer, add, clones, copy

FirstPass = Literal["auto", "closure", "gradients"]


class _SavedStep(NamedTuple):
    """What must come back after the second pass.

    Attributes:
        params: Params as they were, by group.
        grads: Gradients of the first pass by group, if they are needed again; `None` where there was none.
        state: Number of steps before this one, and the state of the ascent after it.
        buffers: Buffers as the first pass left them.
        finite: Whether the first pass was, if that was asked.
    """

    params: list[list[Tensor]]
    grads: list[list[Tensor | None]] | None
    state: SharpnessAwareState
    buffers: list[Tensor]
    finite: Tensor | None


def _share_state(optimizer: "SharpnessAware | None") -> None:
    if optimizer is not None:
        optimizer._share_state()


class _SecondStep:
    """The second half of a step, as a `GradScaler` sees an optimizer."""

    def __init__(self, optimizer: "SharpnessAware") -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Tree]]:
        return self._optimizer.param_groups

    def step(self) -> None:
        self._optimizer.second_step()


class SharpnessAware(TreeOptimizer):
    """Any sharpness-aware method around any optimizer of `torch.optim`.

    Args:
        params: Parameters or parameter groups, as `torch.optim` takes them. Groups may have numbers of their own.
        base_optimizer: The optimizer class for the descent, e.g. `torch.optim.SGD`.
        ascent: A chain from gradient to perturbation, as in `sharpness_aware`. Its trees are lists of groups, and a
            group is the list of its params, so that a prefix such as `rho=[0.05, 0.1]` is one number per group.
        combine: `combine(grads, probe, step)` from the gradients of both passes, and the number of steps so far (int64,
            shape ()), to the gradient of the step; `None` takes the second.
        model: The module whose buffers (running statistics) the second pass must leave as the first pass left them, or
            its buffers, if it writes to them and does not replace them.
        first_pass: Where the first gradient comes from in `step(closure)`. `"closure"`: from the closure, which is
            called twice. `"gradients"`: from the backward pass that was done before. `"auto"`: from gradients if there
            are any, which is ambiguous where gradients are accumulated.
        **kwargs: Arguments of `base_optimizer`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        params: Groups,
        base_optimizer: type[torch.optim.Optimizer],
        ascent: Transform,
        combine: Combine | None = None,
        *,
        model: nn.Module | Iterable[Tensor] | None = None,
        first_pass: FirstPass = "auto",
        **kwargs: Tree,
    ) -> None:
        check_ascent("SharpnessAware", ascent)
        check_combine("SharpnessAware", combine)
        self._ascent, self._combine = ascent, combine
        self._start(params, base_optimizer, {}, model, first_pass, kwargs)

    def _start(
        self,
        params: Groups,
        base_optimizer: type[torch.optim.Optimizer],
        own: dict[str, Tree],
        model: nn.Module | Iterable[Tensor] | None,
        first_pass: FirstPass,
        kwargs: dict[str, Tree],
    ) -> None:
        where = type(self).__name__
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, torch.optim.Optimizer)):
            got = base_optimizer.__name__ if isinstance(base_optimizer, type) else type(base_optimizer).__name__
            raise TypeError(f"{where}: `base_optimizer` must be a class of torch.optim, such as SGD, got {got}.")
        checks.choice(where, ("auto", "closure", "gradients"), first_pass=first_pass)
        listed: list[Tree] = list(params)
        groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
        self.base_optimizer = base_optimizer([own | group for group in groups], **kwargs)
        groups_alone = [{"params": list(group["params"])} for group in self.base_optimizer.param_groups]
        super().__init__(groups_alone, own | self.base_optimizer.defaults, model)
        self._connect()
        self.first_pass = first_pass
        self._state: SharpnessAwareState | None = None
        self._saved_step: _SavedStep | None = None

    def _connect(self) -> None:
        """Shares what the base optimizer has, also after `torch.distributed.checkpoint` has loaded that."""
        me = weakref.ref(self)
        self.base_optimizer.register_load_state_dict_post_hook(lambda base: _share_state(me()))
        self._share_state()

    def __setstate__(self, state: dict[str, Tree]) -> None:
        """Restores what was pickled; the hook on the base optimizer is not pickled with it."""
        super().__setstate__(state)
        self._put_state(self._state)
        self._connect()

    def _share_state(self) -> None:
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def _ascent_of_step(self) -> Transform:
        """Returns the ascent chain of this step."""
        return self._ascent

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climbs to `w + e`, with the gradients of the first backward pass.

        Args:
            zero_grad: Whether to clear the gradients afterwards, as the second pass needs.

        Raises:
            RuntimeError: If the second step of the last ascent is still to be done.
        """
        self._ascend(zero_grad)

    def _refuse_two(self) -> None:
        if self._saved_step is not None:
            raise RuntimeError("first_step: must be followed by `second_step`, got another `first_step`.")

    def _ascend(self, zero_grad: bool, check: bool = False) -> None:
        self._refuse_two()
        values, grads, climb = self._values(), self._grads(), self._ascent_of_step()
        state = SharpnessAwareState(tree.counter(values), climb.init(values)) if self._state is None else self._state
        offset, climbed, _ = climb.update(values, given(grads), state.ascent)
        before = [clones(group) for group in values]
        finite = tree.all_finite(grads) if check else None
        first_grads = None
        if self._combine is not None:
            first_grads = [
                [None if p.grad is None else g.clone() for p, g in zip(group["params"], of_group, strict=True)]
                for group, of_group in zip(self.param_groups, grads, strict=True)
            ]
        self._saved_step = _SavedStep(
            before, first_grads, state._replace(ascent=climbed), clones(self._buffers()), finite
        )
        add(values, offset)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Returns to `w`, bit for bit, and lets the base optimizer step with the gradients taken at `w + e`.

        Args:
            zero_grad: Whether to clear the gradients afterwards.

        Raises:
            RuntimeError: If there was no `first_step`.
        """
        if self._saved_step is None:
            raise RuntimeError("second_step: must come after `first_step`, got no ascent to return from.")
        saved = self._saved_step
        self.restore()
        if saved.finite is None or saved.finite:
            if self._combine is not None and saved.grads is not None:
                self._put_combined(self._combine, saved.grads, saved.state.step)
            self._state = saved.state._replace(step=saved.state.step + 1)
            self.base_optimizer.step()
        self._opt_called = True  # what torch's schedulers look at
        if zero_grad:
            self.zero_grad()

    def _put_combined(self, combine: Combine, first_grads: list[list[Tensor | None]], step: Tensor) -> None:
        """Sets the gradients of the step; one that only one pass has counts as zero in the other."""
        first = [
            [torch.zeros_like(p) if g is None else g for p, g in zip(group["params"], of_group, strict=True)]
            for group, of_group in zip(self.param_groups, first_grads, strict=True)
        ]
        combined = combine(first, self._grads(), step)
        for group, of_group, grads in zip(self.param_groups, first_grads, combined, strict=True):
            for p, g, new in zip(group["params"], of_group, grads, strict=True):
                if p.grad is not None or g is not None:
                    p.grad = new

    @torch.no_grad()
    def restore(self) -> None:
        """Returns to `w` without a step; does nothing if that is where the params are."""
        if self._saved_step is None:
            return
        copy(self._values(), self._saved_step.params)
        copy([self._buffers()], [self._saved_step.buffers])
        self._saved_step = None

    def step(self, closure: Closure | None = None, *, scaler: "torch.amp.GradScaler | None" = None) -> Tree:
        """Takes both passes of a step, and clears the gradients.

        Where the closure raises, params and the buffers of `model` are as they were before the call.

        Args:
            closure: Computes the loss, calls `backward` and returns the loss. Where no gradient is present it is called
                for both passes; where gradients are present, these are the first pass. See `first_pass`. Without a
                closure a step that `first_step` has begun is finished, for trainers that call `step()` themselves.
            scaler: A gradient scaler, whose `scale(loss).backward()` the closure calls. Gradients are unscaled before
                any norm, and the step is skipped as a whole if either pass is not finite. `scaler.update()` stays with
                the caller.

        Returns:
            The loss at the params if the closure has computed it, otherwise that of the second pass.

        Raises:
            TypeError: If there is neither a closure nor a step to finish.
            RuntimeError: If gradients are present or missing against what `first_pass` says.
        """
        if closure is None:
            if self._saved_step is None:
                raise TypeError(
                    "step: `closure` must be a function that computes the loss and calls `backward`, got None. "
                    "Give one, or call `first_step`, a second forward and backward pass, and `second_step`."
                )
            return self.second_step(zero_grad=True)
        self._refuse_two()
        present = self._has_grads()
        if self.first_pass == "closure" and present:
            raise RuntimeError(
                "step: gradients must be clear where the closure takes both passes, got some. Call `zero_grad` first, "
                "and accumulate inside the closure."
            )
        if self.first_pass == "gradients" and not present:
            raise RuntimeError("step: the first backward pass must be done before, got no gradients.")
        closure = torch.enable_grad()(closure)
        buffers = clones(self._buffers())
        try:
            first = None if present else closure()
            with torch.no_grad():
                if scaler is not None:
                    scaler.unscale_(self)
                self._ascend(zero_grad=True, check=scaler is not None)
            second = closure()
            if scaler is None:
                self.second_step()
            else:
                second_half: Tree = _SecondStep(self)
                scaler.step(second_half)
        except BaseException:
            self.restore()
            with torch.no_grad():
                copy([self._buffers()], [buffers])
            self.zero_grad()
            raise
        self.restore()
        self.zero_grad()
        return second if present else first

    def state_dict(self) -> dict[str, Tree]:
        """Returns the state of the base optimizer, the number of steps and the state of the ascent.

        Raises:
            RuntimeError: Between `first_step` and `second_step`, where the params are not those of the run.
        """
        if self._saved_step is not None:
            raise RuntimeError("state_dict: must be called between steps, got an ascent without its `second_step`.")
        return {**self.base_optimizer.state_dict(), KEY: self._state}

    def load_state_dict(self, state_dict: Mapping[str, Tree]) -> None:
        """Loads what `state_dict` returned; the next step is that of the run it was taken from.

        Version 0.1.0 saved the state of the ascent without the number of steps, which starts at zero then.
        """
        self.base_optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        self._put_state(state_dict.get(KEY))

    def _put_state(self, state: State) -> None:
        old = not (state is None or isinstance(state, SharpnessAwareState))
        self._state = SharpnessAwareState(tree.counter(self._values()), state) if old else state

    _pickled: ClassVar[tuple[str, ...]] = (
        "base_optimizer",
        "first_pass",
        "_ascent",
        "_combine",
        "_saved_step",
        "_state",
        "_model",
    )


class SAM(SharpnessAware):
    """SAM and ASAM with the interface of the well-known class.

    Groups may have a `rho` and an `adaptive` of their own; the norm is global, over all groups.

    Args:
        params: Parameters or parameter groups.
        base_optimizer: The optimizer class for the descent, e.g. `torch.optim.SGD`.
        rho: Radius of the neighbourhood, in the units of the params; relative to them where adaptive.
        adaptive: Whether the neighbourhood scales with the params (ASAM with `eta = 0`).
        model: The module whose buffers the second pass must leave as the first pass left them, or the buffers.
        first_pass: Where the first gradient comes from in `step(closure)`, as in `SharpnessAware`.
        **kwargs: Arguments of `base_optimizer`.

    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    >>> def closure():
    ...     loss = w**2
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item(), round(w.item(), 3)
    (1.0, 0.7)

    References:
        Foret et al., 2021, algorithm 1; Kwon et al., 2021, equation 8.
    """

    _pickled: ClassVar[tuple[str, ...]] = tuple(name for name in SharpnessAware._pickled if name != "_ascent")
    _numbers: list[tuple[float, bool]] | None = None

    def __init__(
        self,
        params: Groups,
        base_optimizer: type[torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        model: nn.Module | Iterable[Tensor] | None = None,
        first_pass: FirstPass = "auto",
        **kwargs: Tree,
    ) -> None:
        self._combine = None
        self._start(params, base_optimizer, {"rho": rho, "adaptive": adaptive}, model, first_pass, kwargs)
        self._ascent_of_step()

    def _ascent_of_step(self) -> Transform:
        numbers = [(group["rho"], bool(group["adaptive"])) for group in self.param_groups]
        if numbers != self._numbers:
            rhos, adaptive = ([number[k] for number in numbers] for k in (0, 1))
            checks.nonnegative("SAM", rho=rhos)
            rho = rhos[0] if all(each == rhos[0] for each in rhos) else rhos
            mask = None if all(adaptive) else adaptive
            self._ascent = adaptive_ascent(rho, 0.0, mask) if any(adaptive) else plain_ascent(rho)
            self._numbers = numbers
        return self._ascent
