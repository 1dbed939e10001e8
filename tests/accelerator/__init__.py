"""A device `standin` beside the CPU: a stand-in for an accelerator, built from `standin.cpp`."""

import types
from pathlib import Path

import torch

NAME = "standin"
SOURCE = Path(__file__).with_name("standin.cpp")


def register(folder: Path) -> types.ModuleType:
    """Compiles the device in a folder and makes it known to torch, for the whole process.

    `waits()` of the module that is returned counts what had to be waited for since its last call.
    """
    from torch.utils import cpp_extension

    made = cpp_extension.load(NAME, [str(SOURCE)], build_directory=str(folder), extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(NAME)
    backend = types.ModuleType(NAME)
    backend.is_available = lambda: True
    backend.current_device = lambda: 0
    backend.device_count = lambda: 1
    backend._is_in_bad_fork = lambda: False
    backend.manual_seed_all = lambda seed: None
    backend.get_amp_supported_dtype = lambda: [torch.bfloat16]
    backend.get_rng_state = lambda device=None: made.get_rng_state()
    backend.set_rng_state = lambda state, device=None: made.set_rng_state(state)
    torch._register_device_module(NAME, backend)
    return made
