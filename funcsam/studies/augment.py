"""Augmentation of images, a whole batch at a time, on the device that they are on.

All random numbers of an epoch are drawn before it starts, by NumPy on the CPU, and depend on seed, epoch, step and
place in the batch only. So they are the same under every optimizer and in a resumed run, and nothing waits inside an
epoch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from funcsam.studies.errors import StudyError

NAMES = ("crop", "flip", "cutout")
PAD = 4
"""Pixels of black around an image that is cropped."""
HOLE = 16
"""Side of the square that cutout paints over, in pixels."""
_AUGMENT = 4  # a stream of random numbers of its own, beside those of `data`
_FIELDS = 6  # top and left of the crop, flip, whether there is a hole, its top and left


def parse(text: str) -> tuple[str, ...]:
    """Reads `none`, `standard` (all of them) or names with commas between them, in any order.

    Raises:
        StudyError: If it is not written so.

    >>> parse("flip,crop"), parse("standard"), parse("none")
    (('crop', 'flip'), ('crop', 'flip', 'cutout'), ())
    """
    given = {"none": (), "standard": NAMES}.get(text, tuple(text.split(",")))
    if not set(given) <= set(NAMES) or len(set(given)) < len(given):
        raise StudyError(
            f"compare: `--augment` must be none, standard or some of {','.join(NAMES)}, got {text or 'nothing'}."
        )
    return tuple(name for name in NAMES if name in given)


def draw(steps: int, batch_size: int, seeds: Sequence[int], epoch: int, size: int = 32) -> Tensor:
    """Draws the numbers of an epoch for every seed.

    All of them are drawn, whatever is used, so that with and without cutout the crops are the same.

    Args:
        steps: Steps of the epoch.
        batch_size: Examples per step.
        seeds: One stream each.
        epoch: From 0.
        size: Height and width of the images, in pixels.

    Returns:
        int16 of shape `(steps, len(seeds), batch_size, 6)`: where the crop starts in the padded image (row
        and column, uniform on 0 to 8), whether to flip (0 or 1), whether to paint (0 or 1: every other image, in the
        mean), where the hole starts (row and column, uniform on -8 to `size - 9`, so that it may lie partly outside).
    """
    low = (0, 0, 0, 0, -HOLE // 2, -HOLE // 2)
    high = (2 * PAD + 1, 2 * PAD + 1, 2, 2, size - HOLE // 2, size - HOLE // 2)
    shape = (steps, batch_size, _FIELDS)
    streams = [np.random.default_rng((_AUGMENT, seed, epoch)) for seed in seeds]
    drawn = [stream.integers(low, high, shape, dtype=np.int16) for stream in streams]
    return torch.from_numpy(np.stack(drawn, 1))


def apply(images: Tensor, numbers: Tensor, names: Sequence[str], fill: Tensor) -> Tensor:
    """Crops, flips and paints, in that order; pure.

    Args:
        images: uint8 of shape `(n, channels, size, size)`.
        numbers: One row of `draw` for each image, shape `(n, 6)`.
        names: What to do; see `NAMES`.
        fill: Colour of the hole, uint8 of shape `(channels,)`.

    Returns:
        Images like the given ones.

    References:
        He et al., 2016, section 4.2 (crop and flip); DeVries and Taylor, 2017 (cutout). arXiv 1708.04552.
    """
    if not names:
        return images
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    top, left, flip, hole, hole_top, hole_left = numbers.to(torch.int64)[:, :, None].unbind(1)
    rows = columns = place.expand(len(images), size)
    if "flip" in names:
        columns = torch.where(flip == 1, size - 1 - columns, columns)
    if "crop" in names:
        images = torch.nn.functional.pad(images, (PAD,) * 4)
        rows, columns = rows + top, columns + left
    if "crop" in names or "flip" in names:
        each = torch.arange(len(images), device=images.device)[:, None, None, None]
        channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
        images = images[each, channel, rows[:, None, :, None], columns[:, None, None, :]]
    if "cutout" in names:
        down, across = (
            (hole_top <= place) & (place < hole_top + HOLE),
            (hole_left <= place) & (place < hole_left + HOLE),
        )
        inside = (hole == 1)[:, :, None] & down[:, :, None] & across[:, None, :]
        images = torch.where(inside[:, None], fill[None, :, None, None], images)
    return images
