"""Metrics of an ensemble, computed from the logits of its members."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from funcsam.core import checks, levels


def average(logits: Tensor) -> Tensor:
    """Returns the logarithm of the members' mean probabilities, shape `(examples, classes)`.

    `torch.nn.functional.nll_loss(average(logits), labels)` is the ensemble's negative log-likelihood. Like the other
    metrics it is computed and returned in float32, of float64 logits in float64.

    Args:
        logits: Shape `(members, examples, classes)`, of any floating-point dtype.

    Raises:
        TypeError: If `logits` is not a floating-point tensor.
        ValueError: If it has another shape, or holds nothing.

    >>> average(torch.tensor([[[0.0, 0.0]], [[100.0, 0.0]]])).exp()
    tensor([[0.7500, 0.2500]])

    References:
        Lakshminarayanan et al., 2017, section 2.4.
    """
    return _average(_checked_logits("average", logits, 3))


def _average(logits: Tensor) -> Tensor:
    return torch.logsumexp(F.log_softmax(logits, -1), 0) - math.log(len(logits))


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the negative log-likelihood of the members' mean probabilities, in nats per example, shape ().

    Args:
        logits: Shape `(members, examples, classes)`, of any floating-point dtype.
        labels: Whole numbers from 0 to `classes - 1`, shape `(examples,)`. On a device other than the CPU and under
            `torch.func` and `torch.compile` their range is left to torch: looking at it would make the device wait.

    Raises:
        TypeError: If `logits` is not a floating-point tensor, or `labels` is not one of whole numbers.
        ValueError: If a shape is another, there are no examples, or a label is out of range.

    >>> nll(torch.tensor([[[0.0, 0.0]]]), torch.tensor([0]))
    tensor(0.6931)
    """
    logits = _checked_logits("nll", logits, 3)
    _labels("nll", labels, logits)
    return -_average(logits).gather(1, labels.long()[:, None]).mean()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Returns the expected calibration error, in [0, 1], shape (): how far confidence is from accuracy.

    `sum_b |B_b| / n |accuracy(B_b) - confidence(B_b)|`, where bin `b` holds the examples whose largest probability lies
    in `((b - 1) / bins, b / bins]`.

    Args:
        logits: Shape `(examples, classes)`, of any floating-point dtype: logits or log-probabilities, such as `average`
            returns.
        labels: As in `nll`; where their range is not looked at, a label that no class has counts as a miss.
        bins: Number of bins, at least 1.

    Raises:
        TypeError: As `nll`.
        ValueError: As `nll`, or if `bins` is less than 1.

    References:
        Guo et al., 2017, equations 2, 3 and 5.
    """
    logits = _checked_logits("calibration_error", logits, 2)
    _labels("calibration_error", labels, logits)
    checks.count("calibration_error", bins=bins)
    confidence, choice = F.softmax(logits, -1).max(-1)
    gap = (choice == labels).to(confidence.dtype) - confidence
    # Divided by Python: some devices multiply by 1 / bins instead, and then 3 / 10 is another number than 0.3.
    upper = [k / bins for k in range(1, bins + 1)]
    place = torch.bucketize(confidence, torch.tensor(upper, dtype=confidence.dtype, device=confidence.device))
    inside = place.clamp(max=bins - 1)[:, None] == torch.arange(bins, device=confidence.device)
    return (inside * gap[:, None]).sum(0).abs().sum() / len(labels)


def disagreement(logits: Tensor) -> Tensor:
    """Returns how often two members predict different classes, the mean over examples and pairs, in [0, 1], shape ().

    Args:
        logits: Shape `(members, examples, classes)`, of two members at least and any floating-point dtype.

    Raises:
        TypeError: If `logits` is not a floating-point tensor.
        ValueError: If it has another shape, or holds nothing or a single member.

    >>> disagreement(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]]))
    tensor(0.6667)

    References:
        Fort et al., 2019, section 4 (disagreement of predictions).
    """
    logits = _checked_logits("disagreement", logits, 3)
    members, _, classes = logits.shape
    if members < 2:
        raise ValueError(f"disagreement: `logits` must be those of at least 2 members, got {members}.")
    votes = (logits.argmax(-1, keepdim=True) == torch.arange(classes, device=logits.device)).sum(0)
    differ = members**2 - (votes**2).sum(-1)  # ordered pairs, counted in whole numbers: none is exactly 0
    return differ.to(logits.dtype).mean() / (members * (members - 1))


def _checked_logits(where: str, logits: Tensor, ndim: int) -> Tensor:
    """Checks logits, and returns them in float32, or in float64 if they are."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{where}: `logits` must be a floating-point tensor, got {got}.")
    if logits.ndim != ndim:
        wanted = "(members, examples, classes)" if ndim == 3 else "(examples, classes)"
        raise ValueError(f"{where}: `logits` must have shape {wanted}, got {tuple(logits.shape)}.")
    if not logits.numel():
        each = "one member, example and class" if ndim == 3 else "one example and class"
        raise ValueError(f"{where}: `logits` must have at least {each}, got shape {tuple(logits.shape)}.")
    return logits if logits.dtype is torch.float64 else logits.float()


def _labels(where: str, labels: Tensor, logits: Tensor) -> None:
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype is torch.bool
    ):
        got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{where}: `labels` must be a tensor of whole numbers, got {got}.")
    *_, examples, classes = logits.shape
    if labels.shape != (examples,):
        raise ValueError(f"{where}: `labels` must have shape ({examples},), got {tuple(labels.shape)}.")
    if not levels.eager() or labels.device.type != "cpu":
        return
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(f"{where}: `labels` must be from 0 to {classes - 1}, got {outside[0].item()}.")
