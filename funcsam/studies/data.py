"""Real data that scikit-learn ships, and label noise."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from funcsam.studies.errors import StudyError

LOADERS = {
    "digits": sklearn.datasets.load_digits,
    "breast-cancer": sklearn.datasets.load_breast_cancer,
    "wine": sklearn.datasets.load_wine,
}
TEST_FRACTION = 0.25
SHAPES = {"digits": (1, 8, 8)}
"""Datasets whose features are the pixels of an image: channels, height, width."""
HELD_OUT_FRACTION = 0.2
_NOISE, _SHUFFLE, _HELD_OUT = 0, 1, 2  # one stream of random numbers each


class Data(NamedTuple):
    """One dataset, split; pixels lie in [0, 1], other features have mean 0 and variance 1 on the training part.

    Attributes:
        x: Training features, shape `(n, features)`.
        y: Clean training labels, int64 of shape `(n,)`.
        test_x: Test features.
        test_y: Clean test labels.
        classes: Number of classes.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def load(name: str) -> Data:
    """Loads a dataset and splits off a quarter as test set: stratified, and the same for every seed.

    Raises:
        StudyError: If there is no dataset of that name.
    """
    if name not in LOADERS:
        raise StudyError(f"compare: `--data` must be one of {', '.join(LOADERS)}, got {name}.")
    features, labels = LOADERS[name](return_X_y=True)
    x, test_x, y, test_y = train_test_split(features, labels, test_size=TEST_FRACTION, stratify=labels, random_state=0)
    shift, scale = (0.0, 16.0) if name == "digits" else (x.mean(0), x.std(0))
    inputs = [torch.tensor((part - shift) / scale, dtype=torch.float32) for part in (x, test_x)]
    targets = [torch.tensor(part, dtype=torch.int64) for part in (y, test_y)]
    return Data(inputs[0], targets[0], inputs[1], targets[1], int(labels.max()) + 1)


def noisy(y: Tensor, classes: int, noise: float, seed: int) -> Tensor:
    """Replaces a fraction of the labels by a class drawn uniformly from all, the right one among them.

    The number of labels drawn is exact; of `classes` classes, one draw in `classes` gives the right label back.

    >>> y = torch.full((1000,), 9)
    >>> bool((noisy(y, 10, 0.4, seed=0) != y).sum() in range(340, 380))
    True
    """
    stream = np.random.default_rng((_NOISE, seed))
    chosen = stream.permutation(len(y))[: round(noise * len(y))]
    wrong = y.clone()
    wrong[chosen] = torch.from_numpy(stream.integers(0, classes, len(chosen)))
    return wrong


def held_out(size: int) -> tuple[Tensor, Tensor]:
    """Splits the training examples into those trained on and those held out: the same for every seed and optimizer.

    Returns:
        Indices of the two parts, int64; a fifth is held out.
    """
    mixed = torch.from_numpy(np.random.default_rng(_HELD_OUT).permutation(size))
    count = round(HELD_OUT_FRACTION * size)
    return mixed[count:].sort().values, mixed[:count].sort().values


def order(size: int, batch_size: int, seeds: Sequence[int], epoch: int) -> Tensor:
    """Shuffles one epoch for every seed; the same seed and epoch give the same order, whatever ran before.

    Args:
        size: Number of training examples.
        batch_size: Examples per step. What does not fill a batch at the end of an epoch is left out of that epoch.
        seeds: One order each.
        epoch: From 0.

    Returns:
        Indices, int64 of shape `(steps, len(seeds), batch_size)`.
    """
    steps = size // batch_size
    orders = [np.random.default_rng((_SHUFFLE, seed, epoch)).permutation(size)[: steps * batch_size] for seed in seeds]
    return torch.from_numpy(np.stack(orders)).view(len(seeds), steps, batch_size).transpose(0, 1).contiguous()
