"""CIFAR-10, from the files of its "python version": a folder, the official tar.gz, or a download."""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funcsam.studies.errors import StudyError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CHECKSUM = "md5:c58f30108f718f92721af3b95e74349a"
FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
META, TRAINING, TEST = "batches.meta", tuple(f"data_batch_{k}" for k in range(1, 6)), "test_batch"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
OFFICIAL = {
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""MD5 of the official files, by which other copies are told from them."""
_READABLE = (OSError, EOFError, tarfile.TarError)


class Cifar10(NamedTuple):
    """The images, rows of pixels from the top, and their labels.

    Attributes:
        x: Training images, uint8 of shape `(n, 3, 32, 32)`.
        y: Training labels, int64 of shape `(n,)`.
        test_x: Test images.
        test_y: Test labels.
        copy: `official` for the official files, a hash of images and labels for any others.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    copy: str


def load(folder: Path | None = None) -> Cifar10:
    """Reads the data.

    Args:
        folder: Where they are: `cifar-10-batches-py`, the folder around it, or the folder of `cifar-10-python.tar.gz`.
            `None` takes the cache of this user, and downloads the archive (170 MB) where it is not there yet.

    Raises:
        StudyError: If they are not there, cannot be had, or a file is damaged.
    """
    files = _found(folder) if folder is not None else _cached()
    contents = {name: files(name) for name in (META, *TRAINING, TEST)}
    rows = _rows(contents[META])
    batches = [_batch(name, contents[name], rows) for name in (*TRAINING, TEST)]
    images = [torch.from_numpy(data.reshape(-1, *SHAPE)) for data, _ in batches]
    labels = [torch.tensor(each, dtype=torch.int64) for _, each in batches]
    return Cifar10(torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1], labels[-1], _copy(contents, batches))


def _found(folder: Path) -> Callable[[str], bytes]:
    """Returns the function that reads one of the files."""
    place = folder if (folder / META).is_file() else folder / FOLDER
    if (place / META).is_file():
        return lambda name: _read(name, lambda: (place / name).read_bytes())
    if (folder / ARCHIVE).is_file():
        return _unpacked(folder / ARCHIVE)
    raise StudyError(
        f"compare: `--data-dir` must hold {FOLDER} or {ARCHIVE}, got {folder}. Without --data-dir they are downloaded."
    )


def _unpacked(archive: Path) -> Callable[[str], bytes]:
    """Reads the files of an archive; nothing of it is written to the disk."""
    contents: dict[str, bytes] = {}

    def read() -> bytes:
        with tarfile.open(archive) as packed:
            for entry in packed:
                stored = packed.extractfile(entry)
                if stored is not None and entry.name.startswith(f"{FOLDER}/"):
                    contents[entry.name.removeprefix(f"{FOLDER}/")] = stored.read()
        return b""

    _read(archive.name, read)
    return lambda name: _read(name, lambda: contents[name])


def _read(name: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (FileNotFoundError, KeyError):
        raise StudyError(f"cifar10: `{name}` must be beside the other files, got none.") from None
    except _READABLE as error:
        raise _damaged(name, getattr(error, "strerror", None) or str(error)) from None


def _cached() -> Callable[[str], bytes]:
    try:
        import pooch
    except ImportError:
        raise StudyError(
            f'cifar10: pooch must be installed to download the data, try: pip install "funcsam[compare]". Or put '
            f"{FOLDER} or {ARCHIVE} into a folder and name it with --data-dir."
        ) from None
    cache = Path(pooch.os_cache("funcsam"))
    if (cache / FOLDER / META).is_file():
        return _found(cache)
    try:
        path = pooch.retrieve(URL, known_hash=CHECKSUM, fname=ARCHIVE, path=cache)
    except Exception as error:  # whatever a network can do
        raise StudyError(
            f"cifar10: {URL} must be within reach, got {type(error).__name__}. "
            f"Put {ARCHIVE} or {FOLDER} into {cache}, or into a folder that --data-dir names."
        ) from None
    return _unpacked(Path(path))


class _Arrays(pickle.Unpickler):
    """Reads pickles of numbers, strings, lists, dicts and NumPy arrays, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("_codecs", "encode"): _encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes into pickles of protocol 2 in the place of bytes."""
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _damaged(name: str, reason: str) -> StudyError:
    short = " ".join(reason.split())[:80]
    return StudyError(f"cifar10: `{name}` must be a whole file of CIFAR-10, got a damaged one ({short}).")


def _record(name: str, content: bytes) -> dict[Any, Any]:
    try:
        record = _Arrays(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise _damaged(name, str(error) or type(error).__name__) from None
    if not isinstance(record, dict):
        raise _damaged(name, f"a {type(record).__name__} for a dict")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in record.items()}


def _rows(content: bytes) -> int:
    """Returns the number of images in each file; official: 10,000."""
    record = _record(META, content)
    names, rows = record.get("label_names"), record.get("num_cases_per_batch")
    if not isinstance(names, list) or [n.decode() if isinstance(n, bytes) else n for n in names] != list(CLASSES):
        raise _damaged(META, "label_names are not those of CIFAR-10")
    if not isinstance(rows, int) or rows < 1:
        raise _damaged(META, f"num_cases_per_batch is {rows}")
    return rows


def _batch(name: str, content: bytes, rows: int) -> tuple[Any, list[int]]:
    record = _record(name, content)
    data, labels = record.get("data"), record.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (rows, 3 * 32 * 32):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise _damaged(name, f"data: {got} for uint8 {(rows, 3 * 32 * 32)}")
    if not isinstance(labels, list) or len(labels) != rows:
        raise _damaged(name, f"labels: {len(labels) if isinstance(labels, list) else 'none'} for {rows}")
    if not all(isinstance(label, int) and 0 <= label < len(CLASSES) for label in labels):
        raise _damaged(name, f"labels: not all in 0 to {len(CLASSES) - 1}")
    return data, labels


def _copy(contents: dict[str, bytes], batches: list[tuple[Any, list[int]]]) -> str:
    """Names the copy of the data."""
    if all(hashlib.md5(contents[name], usedforsecurity=False).hexdigest() == OFFICIAL[name] for name in OFFICIAL):
        return "official"
    content = hashlib.blake2b(digest_size=8)
    for data, labels in batches:
        content.update(data.tobytes())
        content.update(bytes(labels))
    return content.hexdigest()
