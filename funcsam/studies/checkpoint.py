"""Files that are whole or absent: a killed process, a full disk or a power cut leaves the earlier ones as they were."""

import contextlib
import hashlib
import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from funcsam.studies.errors import StudyError

FORMAT = 3


def write(path: Path, content: bytes) -> None:
    """Replaces a file atomically: a temporary file in the same folder, fsync, rename.

    Raises:
        StudyError: If it cannot be written; what was at the path is still there then.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise StudyError(
                f"funcsam: `{path.parent}` must be a folder that can be written to, got {error.strerror}."
            ) from None
        raise


def probe(folder: Path) -> None:
    """Finds out before the work, not after it, whether a folder can be written to.

    Raises:
        StudyError: If it cannot.
    """
    path = folder / ".probe"
    write(path, b"probe")
    path.unlink()


def path(out: Path, spec: str) -> Path:
    """Returns where the checkpoint of an optimizer lies: a name that any system takes, and of this spec alone.

    What is no plain word gets a part of its SHA-256: names may be cut, may not differ by case alone, and `1e-1` and
    `1e+1` would be one without signs.

    >>> path(Path("run"), "sgd").as_posix(), path(Path("run"), "sam:rho=0.5").as_posix()
    ('run/checkpoints/sgd.pt', 'run/checkpoints/sam-rho-0.5-4e5df4f39c33.pt')
    """
    name = spec
    if not re.fullmatch("[a-z0-9_]{1,40}", spec):
        name = f"{re.sub('[^a-z0-9._]+', '-', spec.lower())[:40]}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"
    return out / "checkpoints" / f"{name}.pt"


def save(path: Path, settings: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes a checkpoint that `torch.load(weights_only=True)` reads; `content` holds tensors, trees and numbers."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "settings": settings, **content}, buffer)
    write(path, buffer.getvalue())


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint back, on the CPU.

    Args:
        path: Where `save` wrote it.
        settings: What it must have been saved with.

    Raises:
        StudyError: If the file is damaged or of other settings.
    """
    hint = "Delete the file to train that optimizer from the start."
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums that it writes
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["settings"]
        known = content["format"] == FORMAT
    except OSError as error:
        raise StudyError(f"checkpoint: `{path}` must be readable, got {error.strerror}.") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise StudyError(
            f"checkpoint: `{path}` must be a whole checkpoint, got a damaged file ({reason}). {hint}"
        ) from None
    if not known:
        raise StudyError(f"checkpoint: `{path}` must have format {FORMAT}, got {content['format']}. {hint}")
    for name, value in settings.items():
        if found.get(name) != value:
            raise StudyError(
                f"checkpoint: `{path}` must have the settings of this run, "
                f"got {name} {found.get(name)} for {value}. Choose another --out."
            )
    return dict(content)
