"""A device `standin` beside the CPU: a stand-in for an accelerator, built from `standin.cpp`.

It is registered with torch for the whole process, so tests start processes of their own.
"""

import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
import types
from pathlib import Path

import torch

NAME = "standin"
SOURCE = Path(__file__).with_name("standin.cpp")


def build(folder: Path) -> Path:
    """Compiles it, as one file."""
    from torch.utils import cpp_extension

    made = folder / f"{NAME}.so"
    include = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = ["-std=c++20", "-O1", "-DNDEBUG", "-fPIC", "-shared", f"-DTORCH_EXTENSION_NAME={NAME}"]
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    compiler = shutil.which("g++") or shutil.which("c++")
    command = [compiler, *flags, *(f"-isystem{path}" for path in include), str(SOURCE), "-o", str(made), *libraries]
    subprocess.run([*command, "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"], check=True)
    return made


def register(library: Path) -> types.ModuleType:
    """Makes the device known to torch.

    `waits()` of the module that is returned counts what had to be waited for since its last call.
    """
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    made = importlib.util.module_from_spec(importlib.util.spec_from_loader(NAME, loader))
    loader.exec_module(made)
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
