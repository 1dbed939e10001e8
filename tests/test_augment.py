"""Augmentation in batches is what a loop over images does, one by one."""

import numpy as np
import pytest
import torch

from funcsam.studies import augment
from funcsam.studies.errors import StudyError

FILL = torch.tensor([126, 123, 114], dtype=torch.uint8)


def images(count=40):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


def one_by_one(image, numbers, names):
    """The slow way: slices of one image."""
    top, left, flip, hole, hole_top, hole_left = numbers.tolist()
    if "crop" in names:
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = image
        image = padded[:, top : top + 32, left : left + 32]
    if "flip" in names and flip:
        image = image.flip(-1)
    if "cutout" in names and hole:
        image = image.clone()
        for row in range(max(hole_top, 0), min(hole_top + 16, 32)):
            for column in range(max(hole_left, 0), min(hole_left + 16, 32)):
                image[:, row, column] = FILL
    return image


CHOICES = ["none", "crop", "flip", "cutout", "crop,flip", "crop,cutout", "flip,cutout", "standard"]


@pytest.mark.parametrize("text", CHOICES)
def test_a_batch_is_a_loop_over_images(text):
    names, x = augment.parse(text), images()
    before = x.clone()
    numbers = augment.draw(1, len(x), [3], 5)[0, 0]
    slow = torch.stack([one_by_one(*each, names) for each in zip(x, numbers, strict=True)])
    assert torch.equal(augment.apply(x, numbers, names, FILL), slow)
    assert torch.equal(x, before)


def test_the_corners_of_every_range():
    x = images(6)
    rows = [[0, 8, 0, 1, -8, -8], [8, 0, 1, 1, 23, 23], [4, 4, 0, 0, 0, 0], [4, 4, 1, 0, 0, 0]]
    rows += [[8, 8, 0, 1, -8, 23], [0, 0, 1, 1, 23, -8]]
    numbers = torch.tensor(rows, dtype=torch.int16)
    found = augment.apply(x, numbers, augment.NAMES, FILL)
    slow = torch.stack([one_by_one(*each, augment.NAMES) for each in zip(x, numbers, strict=True)])
    assert torch.equal(found, slow)
    assert torch.equal(found[2], x[2])
    assert torch.equal(found[3], x[3].flip(-1))
    assert (found[0][:, 8:, :8] == x[0][:, 4:28, 4:12]).all()


def test_numbers_have_their_ranges_and_are_uniform():
    numbers = augment.draw(200, 50, [0], 0)[:, 0].reshape(-1, 6)
    for column, (low, high) in enumerate([(0, 8), (0, 8), (0, 1), (0, 1), (-8, 23), (-8, 23)]):
        counts = torch.bincount(numbers[:, column].long() - low)
        expected = 10_000 / (high - low + 1)
        assert len(counts) == high - low + 1
        assert (((counts - expected) ** 2 / expected).sum() / len(counts)).item() < 2.5  # chi squared over its freedom


def test_numbers_depend_on_seed_epoch_step_and_place_only():
    whole = augment.draw(6, 8, [0, 1, 2], 4)
    assert torch.equal(augment.draw(6, 8, [1], 4)[:, 0], whole[:, 1])
    assert torch.equal(augment.draw(2, 8, [0, 1, 2], 4), whole[:2])  # a shorter epoch starts in the same way
    for other in (augment.draw(6, 8, [0, 1, 2], 5), augment.draw(6, 8, [7, 8, 9], 4)):
        assert (whole != other).any(-1).float().mean() > 0.99
    assert (whole[0] != whole[1]).any()
    assert (whole[:, :, 0] != whole[:, :, 1]).any()


@pytest.mark.compile
def test_augmentation_compiles_as_one_graph():
    x, numbers = images(), augment.draw(1, 40, [0], 0)[0, 0]
    torch._dynamo.reset()
    fast = torch.compile(augment.apply, fullgraph=True, backend="eager")
    assert torch.equal(fast(x, numbers, augment.NAMES, FILL), augment.apply(x, numbers, augment.NAMES, FILL))


@pytest.mark.parametrize("text", ["", "blur", "crop,crop", "crop,none", "crop,"])
def test_names_that_do_not_exist_are_refused(text):
    message = f"compare: `--augment` must be none, standard or some of crop,flip,cutout, got {text or 'nothing'}."
    with pytest.raises(StudyError) as error:
        augment.parse(text)
    assert str(error.value) == message
