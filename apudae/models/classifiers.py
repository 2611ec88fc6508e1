"""Target networks. Each takes images in [0, 1], normalises inside, and returns logits."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contracts import check_whole

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Normalize(nn.Module):
    """(x − mean) / std with one value a channel, as a layer, so that attacks and purifiers see [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        channels = len(self.mean)
        if x.ndim != 4 or x.shape[1] != channels:  # broadcasting would make colour of grey, and three greys of colour
            raise ValueError(f"images have shape {tuple(x.shape)}; this network needs (n, {channels}, height, width)")
        return (x - self.mean) / self.std


def _perceptron(*features: int) -> list[nn.Module]:
    """Linear layers of so many features, ReLU between them, on what is flattened first."""
    layers = [part for sizes in pairwise(features) for part in (nn.Linear(*sizes), nn.ReLU())]
    return [nn.Flatten(), *layers[:-1]]


class MLP(nn.Sequential):
    """784–300–100–10 perceptron for 28×28 grey digits: the target network, about as easy to attack as the paper's."""

    def __init__(self) -> None:
        super().__init__(Normalize((MNIST_MEAN,), (MNIST_STD,)), *_perceptron(784, 300, 100, 10))
        self.architecture = {"name": "mlp"}


class CNN(nn.Sequential):
    """Convolutional network with pooling for 28×28 grey digits: the other classifier, for transfer attacks."""

    def __init__(self) -> None:
        super().__init__(
            Normalize((MNIST_MEAN,), (MNIST_STD,)),
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            *_perceptron(32 * 7 * 7, 100, 10),
        )
        self.architecture = {"name": "cnn"}


class StridedCNN(nn.Sequential):
    """Convolutional network with strides for 28×28 grey digits (Wong et al. 2020, twice as wide by default).

    Half the time of `CNN`, so that adversarial training ends on a CPU.
    """

    def __init__(self, width: int = 32) -> None:
        check_whole(1, width=width)
        super().__init__(
            Normalize((MNIST_MEAN,), (MNIST_STD,)),
            nn.Conv2d(1, width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.ReLU(),
            *_perceptron(2 * width * 7 * 7, 100, 10),
        )
        self.architecture = {"name": "strided_cnn", "width": width}


class ResNet(nn.Sequential):
    """Wide residual network for 32×32 colour images (Zagoruyko and Komodakis 2016, table 1), ten classes.

    `depth` 6k + 4 convolutions in three groups of k blocks, of 16, 32 and 64 times `width` features; each group but the
    first halves the sides. WRN-28-4 has 5.8 million weights, 12 MB in half precision; WRN-16-1 has 0.2 million.
    """

    def __init__(self, depth: int = 16, width: int = 1) -> None:
        check_whole(1, width=width)
        check_whole(10, depth=depth)
        if depth % 6 != 4:
            raise ValueError(f"depth is {depth}; needed: 6k + 4, for k blocks in each of three groups (10, 16, 22, 28)")
        blocks, before = [], 16
        for group in range(3):
            for block in range((depth - 4) // 6):
                after, stride = 16 * width * 2**group, 2 if group and not block else 1
                blocks.append(_Residual(before, after, stride))
                before = after
        super().__init__(
            Normalize(CIFAR10_MEAN, CIFAR10_STD),
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            *blocks,
            nn.BatchNorm2d(before),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(before, 10),
        )
        self.architecture = {"name": "resnet", "depth": depth, "width": width}


class _Residual(nn.Module):
    """x + convolutions of relu(norm(x)), or, where the shape changes, a 1×1 convolution of that in place of x."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(before), nn.BatchNorm2d(after)])
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.Conv2d(after, after, 3, 1, 1, bias=False)]
        )
        self.shortcut = None if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](x))
        carried = x if self.shortcut is None else self.shortcut(h)
        h = F.relu(self.norms[1](self.convolutions[0](h)))
        return carried + self.convolutions[1](h)


class ResNet8(nn.Sequential):
    """Residual network for small images of any size from 8×8 on, made to be trained in minutes; by default CIFAR-10's.

    A convolution, three groups of a convolution, a maximum over 2×2 pixels and a residual convolution, and a linear
    layer: the ResNet-9 of Page (2018) with the early pooling of Jordan (2024, arXiv:2404.00498). `width` features in
    the first group, twice as many in each next one. Width 64 has 1.2 million weights, 2.3 MB in half precision.
    """

    def __init__(self, width: int = 64, channels: int = 3, classes: int = 10) -> None:
        check_whole(1, width=width, channels=channels)
        check_whole(2, classes=classes)
        features = [24, width, 2 * width, 4 * width]
        super().__init__(
            Normalize(CIFAR10_MEAN, CIFAR10_STD) if channels == 3 else Normalize((0.5,) * channels, (0.25,) * channels),
            *_convolution(channels, features[0]),
            *[
                layer
                for before, after in pairwise(features)
                for layer in [*_convolution(before, after, nn.MaxPool2d(2)), _Added(*_convolution(after, after))]
            ],
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(features[-1], classes),
        )
        self.architecture = {"name": "resnet8", "width": width, "channels": channels, "classes": classes}


def _convolution(before: int, after: int, *pooling: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), *pooling, nn.BatchNorm2d(after), nn.ReLU()]


class _Added(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y minus the largest other logit (n,): negative where the image is misclassified."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).amax(1)
