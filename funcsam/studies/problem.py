"""What the optimizers of a comparison train on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import funcsam as fs
from funcsam.studies import augment, data, networks
from funcsam.studies.errors import StudyError
from funcsam.studies.settings import Settings

JUDGED = 2000
"""Of photographs, how many training examples loss, fit and sharpness are measured on, at most."""

Tensors = dict[str, Tensor]


class Problem(NamedTuple):
    """What an optimizer of a comparison is given.

    Attributes:
        data: Features and clean labels; of the training part what is trained on.
        noisy: The labels trained on, one row per member, shape `(members, n)`.
        held_x: Features held out of the training part, for choosing a hyperparameter; often none.
        held_noisy: Their labels, as noisy as the others, shape `(members, held out)`.
        network: A module whose tensors the members' take the place of.
        seeds: What each member starts from and shuffles by.
        batch_size: Examples per step.
        hyper: Hyperparameters that differ between the members, each of shape `(members,)`.
        judged: Which training examples loss, fit and sharpness are measured on; `None` for all.
        augment: What is done to training images; see `augment`.
        fill: Colour of the hole that cutout leaves: the mean of the training images, as uint8.
        label_smoothing: In [0, 1); of the loss that is trained on, not of the one that is reported.
        looped: Whether members are trained one after the other. A small network is quicker as one ensemble; a large one
            fills the machine alone, and convolutions whose weights differ between members are slow.
        channels_last: Whether images and the weights of convolutions lie in memory channel by channel; with `looped`.
        half: Whether training computes in bfloat16 where autocast does; params and evaluation stay float32.
    """

    data: data.Data
    noisy: Tensor
    held_x: Tensor
    held_noisy: Tensor
    network: nn.Module
    seeds: Sequence[int]
    batch_size: int
    hyper: Mapping[str, Tensor] = {}
    judged: Tensor | None = None
    augment: tuple[str, ...] = ()
    fill: Tensor | None = None
    label_smoothing: float = 0.0
    looped: bool = False
    channels_last: bool = False
    half: bool = False

    def swept(self, name: str, values: Sequence[float]) -> "Problem":
        """Returns the problem in which every seed has a member for each value, one value after another."""
        copies = len(values)
        noisy, held = (rows.repeat(copies, 1) for rows in (self.noisy, self.held_noisy))
        each = torch.tensor(values, device=self.noisy.device).repeat_interleave(len(self.seeds))
        return self._replace(noisy=noisy, held_noisy=held, seeds=list(self.seeds) * copies, hyper={name: each})

    def of(self, members: Sequence[int]) -> "Problem":
        """Returns the problem of some of the members."""
        own = list(members)
        return self._replace(
            noisy=self.noisy[own],
            held_noisy=self.held_noisy[own],
            seeds=[self.seeds[k] for k in own],
            hyper={name: values[own] for name, values in self.hyper.items()},
        )

    def steps(self) -> int:
        """Returns the number of steps in an epoch; what does not fill a batch is left out."""
        return len(self.data.y) // self.batch_size

    def examined(self) -> tuple[Tensor, Tensor]:
        """Returns the training examples that are measured, and their labels for every member."""
        if self.judged is None:
            return self.data.x, self.noisy
        return self.data.x[self.judged], self.noisy[:, self.judged]

    def laid_out(self, images: Tensor) -> Tensor:
        """Returns images in the layout that the network is quickest with."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def make(settings: Settings, device: torch.device) -> tuple[Problem, Tensors, Tensors, Settings]:
    """Returns what is trained on, the stacked params and buffers of the seeds, and the settings with the copy read.

    Raises:
        StudyError: If the data cannot be read or the settings do not fit them.
    """
    parts = _parts(settings)
    seeds = range(settings.seeds)
    like = data.confused(settings.data, parts.classes) if settings.noise_kind == "asymmetric" else None
    noisy = torch.stack([data.noisy(parts.y, parts.classes, settings.noise, seed, like) for seed in seeds])
    kept, held = torch.arange(len(parts.y)), torch.arange(0)
    if settings.hyper_sweep:
        kept, held = data.held_out(len(parts.y))
    if settings.batch_size > len(kept):
        raise StudyError(
            f"compare: `--batch-size` must be at most the {len(kept)} training examples, got {settings.batch_size}."
        )
    given = parts._replace(x=parts.x[kept], y=parts.y[kept])
    inputs = parts.x[0].numel()
    build = networks.named(settings.network, inputs, parts.classes, data.SHAPES.get(settings.data))
    photographs = parts.x.dtype == torch.uint8
    special: dict[str, Any] = {"label_smoothing": settings.label_smoothing}
    if photographs:
        mean, std = _statistics(given.x)
        build = _on_photographs(build, mean, std, flat=not settings.network.startswith("wrn"))
        special["fill"] = mean.round().to(torch.uint8).to(device)
        special["augment"] = augment.parse(settings.augment)
        if len(kept) > JUDGED:
            special["judged"] = data.subset(given.y, JUDGED).to(device)
    if settings.network.startswith("wrn"):
        special |= {"looped": True, "channels_last": True, "half": device.type != "cpu"}
    params, buffers = fs.ensemble.init(build, seeds)
    moved: dict[str, Any] = {
        name: part.to(device) for name, part in given._asdict().items() if isinstance(part, Tensor)
    }
    labels = (noisy[:, kept].to(device), parts.x[held].to(device), noisy[:, held].to(device))
    problem = Problem(given._replace(**moved), *labels, build().to(device), seeds, settings.batch_size, **special)
    params, buffers = ({name: leaf.to(device) for name, leaf in each.items()} for each in (params, buffers))
    return problem, params, buffers, settings._replace(copy=parts.copy)


def _parts(settings: Settings) -> data.Data:
    parts = data.load(settings.data, settings.data_dir)
    if settings.subset is not None:
        chosen = data.subset(parts.y, settings.subset)
        parts = parts._replace(x=parts.x[chosen], y=parts.y[chosen])
    if settings.test_subset is not None:
        chosen = data.subset(parts.test_y, settings.test_subset, "--test-subset")
        parts = parts._replace(test_x=parts.test_x[chosen], test_y=parts.test_y[chosen])
    return parts


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each channel of uint8 images, from exact counts."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([images[:, c].reshape(-1).bincount(minlength=256) for c in range(images.shape[1])]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    return mean.float(), (share @ values**2 - mean**2).sqrt().float()


def _on_photographs(build: Any, mean: Tensor, std: Tensor, flat: bool) -> Any:
    between = [nn.Flatten()] if flat else []
    return lambda: nn.Sequential(networks.Standardize(mean, std), *between, build())
