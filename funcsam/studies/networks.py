"""Networks of the studies."""

import itertools
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from funcsam.studies.errors import StudyError

HIDDEN = (128, 128)
CHANNELS = (16, 32)


def mlp(inputs: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Builds a multilayer perceptron with ReLU between its linear layers, in torch's own initialisation.

    >>> mlp(64, (32,), 10)(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def cnn(shape: Sequence[int], channels: Sequence[int], classes: int) -> nn.Sequential:
    """Builds a small convolutional net: 3x3 convolutions, each followed by BatchNorm and ReLU, and a linear layer.

    Every convolution after the first halves the image.

    Args:
        shape: Channels, height and width of the images, which come as rows of pixels.
        channels: Channels of each convolution.
        classes: Number of outputs.

    >>> cnn((1, 8, 8), (4, 8), 10)(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """
    inputs, height, width = shape
    layers: list[nn.Module] = [nn.Unflatten(1, tuple(shape))]
    for k, outputs in enumerate(channels):
        stride = 2 if k else 1
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs, height, width = outputs, -(-height // stride), -(-width // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * height * width, classes))


class _Block(nn.Module):
    """A pre-activation residual block: BN, ReLU, conv, BN, ReLU, conv."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.norm1(x))
        out: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        skip: Tensor = x if self.shortcut is None else self.shortcut(active)
        return out + skip


def wide_resnet(depth: int, width: int, classes: int = 10) -> nn.Sequential:
    """Builds WRN-depth-width for RGB images, e.g. `wide_resnet(16, 1)` or `wide_resnet(28, 10)`.

    A 3x3 convolution, three groups of `(depth - 4) / 6` pre-activation blocks with `16 width`, `32 width` and
    `64 width` channels, the last two groups halving the image, then BN, ReLU, the average over the image, one linear
    layer. Convolutions start in He's initialisation (fan-out), as in the authors' code.

    Args:
        depth: Number of layers, `6 n + 4` with a whole `n >= 1`.
        width: Widening factor `k`, at least 1.
        classes: Number of outputs.

    Raises:
        ValueError: If there is no such network.

    >>> wide_resnet(16, 1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in wide_resnet(16, 1).parameters())
    175066

    References:
        Zagoruyko and Komodakis, 2016, table 1 and section 3. arXiv 1605.07146.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"wide_resnet: `depth` must be 6 n + 4 with n at least 1, got {depth}.")
    if width < 1 or classes < 1:
        raise ValueError(f"wide_resnet: `width` and `classes` must be at least 1, got {width} and {classes}.")
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels = 16
    for group in range(3):
        outputs = 16 * width * 2**group
        for block in range((depth - 4) // 6):
            layers.append(_Block(channels, outputs, stride=2 if group and not block else 1))
            channels = outputs
    head = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    network = nn.Sequential(*layers, *head)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return network


def named(name: str, inputs: int, classes: int, shape: Sequence[int] | None = None) -> Callable[[], nn.Module]:
    """Returns the function that builds a network by its name: `mlp` is `mlp-128-128`, `cnn` is `cnn-16-32`.

    Args:
        name: `mlp` or `cnn`, and widths of one's own, or `wrn-DEPTH-WIDTH`. The first two take rows of features, a Wide
            ResNet takes images.
        inputs: Number of features.
        classes: Number of outputs.
        shape: Channels, height and width, if the features are the pixels of an image.

    Raises:
        StudyError: If there is no network of that name, or it does not fit the data.
    """
    if not re.fullmatch(r"(mlp|cnn)(-[1-9][0-9]{0,4})*|wrn(-[1-9][0-9]{0,3}){2}", name):
        raise StudyError(
            "compare: `--network` must be mlp, cnn, or mlp-64-64 or cnn-16-32 with widths of your own, or "
            f"wrn-16-8 with depth and width, got {name}."
        )
    kind, *parts = name.split("-")
    widths = [int(width) for width in parts]
    if kind == "mlp":
        return lambda: mlp(inputs, widths or HIDDEN, classes)
    if shape is None:
        raise StudyError(f"compare: `--network` must be mlp where the data are not images, got {name}.")
    if kind == "cnn":
        return lambda: cnn(shape, widths or CHANNELS, classes)
    if shape[0] != 3:
        raise StudyError(f"compare: `--network` must be mlp or cnn where the images have no colours, got {name}.")
    depth, width = widths
    if depth < 10 or (depth - 4) % 6:
        raise StudyError(f"compare: `--network` wrn must have a depth of 10, 16, 22, 28, ..., got {depth} in {name}.")
    return lambda: wide_resnet(depth, width, classes)


class Standardize(nn.Module):
    """Turns uint8 images into floats of mean 0 and variance 1, `(x - mean) / std` in every channel.

    It is the first layer of a network on photographs, so that images may stay uint8 wherever they are kept.

    Args:
        mean: Mean of each channel, in pixel values from 0 to 255, shape `(channels,)`.
        std: Standard deviation, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None, None].clone())
        self.register_buffer("std", std[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Returns floats of the shape of `x`."""
        return (x - self.mean) / self.std
