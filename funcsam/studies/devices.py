"""Devices by name."""

import torch

from funcsam.studies.errors import StudyError


def named(name: str, where: str = "compare") -> torch.device:
    """Returns a device that works here.

    Raises:
        StudyError: If there is none of that name.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise StudyError(f"{where}: `--device` must be one that torch finds here, e.g. cpu, got {name}.") from None
    return device
