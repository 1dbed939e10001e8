"""Real data, split into training and test part; subsets, label noise and the order of examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from funcsam.studies import cifar10
from funcsam.studies.errors import StudyError

LOADERS = {
    "digits": sklearn.datasets.load_digits,
    "breast-cancer": sklearn.datasets.load_breast_cancer,
    "wine": sklearn.datasets.load_wine,
}
TEST_FRACTION = 0.25
NAMES = (*LOADERS, "cifar10")
SHAPES = {"digits": (1, 8, 8), "cifar10": cifar10.SHAPE}
"""Datasets whose features are the pixels of an image: channels, height, width."""
HELD_OUT_FRACTION = 0.2
NOISE_KINDS = ("symmetric", "asymmetric")
CONFUSED = {"cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}}
"""What asymmetric noise makes of a class: truck to automobile, bird to airplane, deer to horse, cat to dog and back."""
_NOISE, _SHUFFLE, _HELD_OUT, _SUBSET = 0, 1, 2, 3  # one stream of random numbers each; 4 is that of `augment`


class Data(NamedTuple):
    """One dataset, split.

    Photographs are uint8 images; of the others pixels lie in [0, 1], and other features have mean 0 and variance 1 on
    the training part.

    Attributes:
        x: Training features, shape `(n, features)`, or uint8 images of shape `(n, channels, height, width)`.
        y: Clean training labels, int64 of shape `(n,)`.
        test_x: Test features.
        test_y: Clean test labels.
        classes: Number of classes.
        copy: Which copy of the data this is, where there are several.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    copy: str | None = None


def load(name: str, folder: Path | None = None) -> Data:
    """Loads a dataset; of those without a test set a quarter becomes one: stratified, and the same for every seed.

    Args:
        name: One of `NAMES`.
        folder: Where the files are, for `cifar10`; `None` takes the cache and downloads what is not there.

    Raises:
        StudyError: If there is no dataset of that name, or it cannot be read.
    """
    if name not in NAMES:
        raise StudyError(f"compare: `--data` must be one of {', '.join(NAMES)}, got {name}.")
    if name == "cifar10":
        found = cifar10.load(folder)
        return Data(found.x, found.y, found.test_x, found.test_y, len(cifar10.CLASSES), found.copy)
    features, labels = LOADERS[name](return_X_y=True)
    x, test_x, y, test_y = train_test_split(features, labels, test_size=TEST_FRACTION, stratify=labels, random_state=0)
    shift, scale = (0.0, 16.0) if name == "digits" else (x.mean(0), x.std(0))
    inputs = [torch.tensor((part - shift) / scale, dtype=torch.float32) for part in (x, test_x)]
    targets = [torch.tensor(part, dtype=torch.int64) for part in (y, test_y)]
    return Data(inputs[0], targets[0], inputs[1], targets[1], int(labels.max()) + 1)


def subset(y: Tensor, size: int, option: str = "--subset") -> Tensor:
    """Chooses examples, as many of each class as can be: the same for every seed; a larger subset holds a smaller one.

    Args:
        y: Labels, int64 of shape `(n,)`.
        size: Number of examples.
        option: What to name if there are not so many.

    Returns:
        Indices in ascending order, int64 of shape `(size,)`.

    Raises:
        StudyError: If there are fewer examples than that.

    >>> y = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> y[subset(y, 4)]
    tensor([0, 0, 1, 1])
    """
    if size > len(y):
        raise StudyError(f"compare: `{option}` must be at most the {len(y)} examples that there are, got {size}.")
    mixed = np.random.default_rng(_SUBSET).permutation(len(y))
    labels = y.numpy()[mixed]
    turn = np.empty(len(y), dtype=np.int64)  # how many of its class come before an example
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        turn[places] = np.arange(len(places))
    return torch.from_numpy(np.sort(mixed[np.argsort(turn, kind="stable")[:size]]))


def noisy(y: Tensor, classes: int, noise: float, seed: int, like: dict[int, int] | None = None) -> Tensor:
    """Replaces the labels of a fraction of the examples.

    Symmetric noise draws a class uniformly from all, the right one among them; asymmetric noise takes the class that
    looks like it. The number of examples chosen is exact; of `classes` classes, one symmetric draw in `classes` gives
    the right label back, and asymmetric noise leaves classes alone that look like no other.

    Args:
        y: Labels, int64 of shape `(n,)`.
        classes: Number of classes.
        noise: Fraction of the examples, in [0, 1].
        seed: Same seed, same noise.
        like: For asymmetric noise, the class that each class becomes; those not in it stay.

    >>> y = torch.full((1000,), 9)
    >>> bool((noisy(y, 10, 0.4, seed=0) != y).sum() in range(340, 380))
    True
    >>> noisy(y, 10, 0.4, seed=0, like={9: 1}).unique(return_counts=True)
    (tensor([1, 9]), tensor([400, 600]))

    References:
        Patrini et al., 2017, section 5 (asymmetric noise). arXiv 1609.03683.
    """
    stream = np.random.default_rng((_NOISE, seed))
    chosen = stream.permutation(len(y))[: round(noise * len(y))]
    wrong = y.clone()
    if like is None:
        wrong[chosen] = torch.from_numpy(stream.integers(0, classes, len(chosen)))
    else:
        wrong[chosen] = torch.tensor([like.get(k, k) for k in range(classes)])[y[chosen]]
    return wrong


def confused(name: str, classes: int) -> dict[int, int]:
    """Returns what asymmetric noise makes of each class; the next one, where nobody has said which look alike."""
    return CONFUSED.get(name, {k: (k + 1) % classes for k in range(classes)})


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
