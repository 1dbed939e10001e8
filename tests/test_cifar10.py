"""CIFAR-10 is read from the official layout, whole or not at all."""

import io
import pickle
import shutil
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from funcsam.studies import cifar10
from funcsam.studies.errors import StudyError

DATA = Path(__file__).parent / "data"
"""Real images, two of each class in every file."""


@pytest.fixture
def copied(tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(DATA / cifar10.FOLDER, tmp_path / cifar10.FOLDER)
    return tmp_path


@pytest.fixture
def packed(tmp_path):
    """The same as an archive."""
    path = tmp_path / cifar10.ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        archive.add(DATA / cifar10.FOLDER, cifar10.FOLDER)
    return path


def changed(folder, name, **entries):
    path = folder / cifar10.FOLDER / name
    record = pickle.loads(path.read_bytes(), encoding="bytes")
    record |= {key.encode(): value for key, value in entries.items()}
    path.write_bytes(pickle.dumps(record, protocol=2))


def complaint(folder):
    with pytest.raises(StudyError) as error:
        cifar10.load(folder)
    (line,) = str(error.value).splitlines()
    return line


def test_images_and_labels_are_those_of_the_files():
    found = cifar10.load(DATA)
    assert found.x.shape == (100, 3, 32, 32)
    assert found.x.dtype == torch.uint8
    assert found.test_x.shape == (20, 3, 32, 32)
    assert found.y.bincount().tolist() == [10] * 10
    assert found.test_y.bincount().tolist() == [2] * 10
    record = pickle.loads((DATA / cifar10.FOLDER / "data_batch_2").read_bytes(), encoding="bytes")
    for channel in range(3):  # red, green, blue; row 5, column 7 of the fourth image
        assert found.x[23, channel, 5, 7] == record[b"data"][3, 1024 * channel + 32 * 5 + 7]
    assert found.y[23] == record[b"labels"][3]
    assert found.copy != "official"


def test_the_folder_its_parent_and_the_archive_are_the_same(packed):
    whole = cifar10.load(DATA)
    for place in (DATA / cifar10.FOLDER, packed.parent):
        for ours, theirs in zip(whole[:-1], cifar10.load(place)[:-1], strict=True):
            assert torch.equal(ours, theirs)
        assert cifar10.load(place).copy == whole.copy


def test_another_pixel_is_another_copy(copied):
    path = copied / cifar10.FOLDER / "data_batch_1"
    data = pickle.loads(path.read_bytes(), encoding="bytes")[b"data"].copy()
    changed(copied, "data_batch_1", data=data)
    assert cifar10.load(copied).copy == cifar10.load(DATA).copy  # written differently, the same images
    data[0, 0] ^= 1
    changed(copied, "data_batch_1", data=data)
    assert cifar10.load(copied).copy != cifar10.load(DATA).copy


def test_the_official_files_are_known_by_their_checksums(monkeypatch):
    import hashlib

    sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in (DATA / cifar10.FOLDER).iterdir()}
    monkeypatch.setattr(cifar10, "OFFICIAL", sums)
    assert cifar10.load(DATA).copy == "official"


def test_what_python_2_wrote_is_read(copied):
    """The official files are pickles of protocol 2 that name numpy.core, as does a record written by hand here."""
    path = copied / cifar10.FOLDER / "data_batch_1"
    content = pickle.dumps(pickle.loads(path.read_bytes(), encoding="bytes"), protocol=2)
    old = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"numpy.core.multiarray" in old
    path.write_bytes(old)
    assert torch.equal(cifar10.load(copied).x, cifar10.load(DATA).x)


@pytest.mark.parametrize("name", [cifar10.META, "data_batch_3", "test_batch"])
def test_a_truncated_file_is_named(copied, name):
    path = copied / cifar10.FOLDER / name
    path.write_bytes(path.read_bytes()[:-20])
    assert complaint(copied).startswith(f"cifar10: `{name}` must be a whole file of CIFAR-10, got a damaged one (")


def test_a_missing_file_is_named(copied):
    (copied / cifar10.FOLDER / "data_batch_4").unlink()
    assert complaint(copied) == "cifar10: `data_batch_4` must be beside the other files, got none."


DAMAGED = [
    ("data_batch_1", {"data": np.zeros((20, 3071), np.uint8)}, "data: uint8 (20, 3071) for uint8 (20, 3072)"),
    ("data_batch_1", {"data": np.zeros((19, 3072), np.uint8)}, "data: uint8 (19, 3072) for uint8 (20, 3072)"),
    ("data_batch_1", {"data": np.zeros((20, 3072))}, "data: float64 (20, 3072) for uint8 (20, 3072)"),
    ("test_batch", {"data": [0]}, "data: list for uint8 (20, 3072)"),
    ("test_batch", {"labels": [0] * 19}, "labels: 19 for 20"),
    ("test_batch", {"labels": None}, "labels: none for 20"),
    ("data_batch_5", {"labels": [0] * 19 + [10]}, "labels: not all in 0 to 9"),
    ("data_batch_5", {"labels": [0] * 19 + [-1]}, "labels: not all in 0 to 9"),
    ("data_batch_5", {"labels": [0] * 19 + [0.5]}, "labels: not all in 0 to 9"),
    ("batches.meta", {"label_names": [b"apple"] * 10}, "label_names are not those of CIFAR-10"),
    ("batches.meta", {"num_cases_per_batch": 0}, "num_cases_per_batch is 0"),
    ("batches.meta", {"num_cases_per_batch": 21}, None),
]


@pytest.mark.parametrize(("name", "entries", "reason"), DAMAGED)
def test_wrong_contents_are_named(copied, name, entries, reason):
    changed(copied, name, **entries)
    if reason is None:
        assert "`data_batch_1` must be a whole file of CIFAR-10, got a damaged one (data: uint8 (20" in complaint(
            copied
        )
    else:
        expected = f"cifar10: `{name}` must be a whole file of CIFAR-10, got a damaged one ({reason})."
        assert complaint(copied) == expected


def test_a_record_of_another_type_is_refused(copied):
    (copied / cifar10.FOLDER / "test_batch").write_bytes(pickle.dumps([1]))
    assert "`test_batch` must be a whole file of CIFAR-10, got a damaged one (a list for a dict)." in complaint(copied)


def test_a_pickle_cannot_run_code(copied, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "boom",)

    (copied / cifar10.FOLDER / "data_batch_1").write_bytes(pickle.dumps({b"data": Bomb()}))
    assert "`data_batch_1` must be a whole file of CIFAR-10, got a damaged one (it asks for " in complaint(copied)
    assert not (tmp_path / "boom").exists()


def test_a_damaged_archive_is_named(packed):
    whole = packed.read_bytes()
    for bad in (b"", b"no archive", whole[: len(whole) // 2]):
        packed.write_bytes(bad)
        start = f"cifar10: `{cifar10.ARCHIVE}` must be a whole file of CIFAR-10, got a damaged one ("
        assert complaint(packed.parent).startswith(start)


def test_an_archive_without_a_file(packed):
    with tarfile.open(packed, "w:gz") as archive:
        for name in (cifar10.META, "data_batch_1"):
            archive.add(DATA / cifar10.FOLDER / name, f"{cifar10.FOLDER}/{name}")
        entry = tarfile.TarInfo("elsewhere/data_batch_2")
        archive.addfile(entry, io.BytesIO())
    assert complaint(packed.parent) == "cifar10: `data_batch_2` must be beside the other files, got none."


def test_a_wrong_folder_gets_one_line(tmp_path):
    expected = f"compare: `--data-dir` must hold {cifar10.FOLDER} or {cifar10.ARCHIVE}, got {tmp_path}. "
    assert complaint(tmp_path) == expected + "Without --data-dir they are downloaded."


@pytest.fixture
def pooch(monkeypatch, tmp_path):
    """A stand-in for pooch, whose cache is a folder of the test and which has no network."""

    def retrieve(url, known_hash, fname, path):
        fake.asked.append((url, known_hash, fname, path))
        if not (path / fname).exists():
            raise ConnectionError("no network")
        return str(path / fname)

    fake = types.ModuleType("pooch")
    fake.os_cache = lambda name: tmp_path
    fake.asked, fake.retrieve = [], retrieve
    monkeypatch.setitem(sys.modules, "pooch", fake)
    return fake


def test_without_a_network_one_line_says_what_to_do(pooch, tmp_path):
    expected = (
        f"cifar10: {cifar10.URL} must be within reach, got ConnectionError. Put {cifar10.ARCHIVE} or {cifar10.FOLDER} "
        f"into {tmp_path}, or into a folder that --data-dir names."
    )
    assert complaint(None) == expected
    assert pooch.asked == [(cifar10.URL, "md5:c58f30108f718f92721af3b95e74349a", cifar10.ARCHIVE, tmp_path)]


def test_what_was_downloaded_is_read(pooch, packed):
    assert torch.equal(cifar10.load().x, cifar10.load(DATA).x)


def test_a_folder_in_the_cache_is_read(pooch, copied):
    assert torch.equal(cifar10.load().x, cifar10.load(DATA).x)
    assert pooch.asked == []


def test_without_pooch_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert complaint(None) == (
        'cifar10: pooch must be installed to download the data, try: pip install "funcsam[compare]". Or put '
        f"{cifar10.FOLDER} or {cifar10.ARCHIVE} into a folder and name it with --data-dir."
    )
