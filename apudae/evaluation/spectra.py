"""Where in frequency images, perturbations and what a purifier leaves of them lie."""

import pandas as pd
import torch
from torch import Tensor

from ..contracts import check_at_least, check_images, check_whole


def spectrum(images: Tensor, rings: int = 12) -> pd.DataFrame:
    """Mean energy of `images` (n, C, H, W) in rings of equal width around frequency 0: columns frequency, energy.

    `frequency` is a ring's middle, in cycles a pixel along the diagonal's length: up to √½, a chequerboard. The
    energies of all rings add up to the mean squared length of an image (Parseval). ValueError for what are no images.
    """
    check_images(images, bounded=False)
    check_whole(1, rings=rings)
    radius = _radius(images)
    width = 0.5**0.5 / rings
    ring = (radius / width).long().clamp_max(rings - 1)
    power = _power(images).mean(0).flatten()
    energy = torch.bincount(ring.flatten(), power, rings)
    middle = [(index + 0.5) * width for index in range(rings)]
    return pd.DataFrame({"frequency": middle, "energy": energy.cpu()})


def share_above(images: Tensor, frequency: float) -> Tensor:
    """The share of each image's energy at more than `frequency` cycles a pixel (n,); NaN of an image that is 0.

    `frequency` is at least 0. Raises ValueError for anything else, and for what are no images.
    """
    check_images(images, bounded=False)
    check_at_least(0, frequency=frequency)
    power = _power(images).flatten(1)
    return power[:, (_radius(images) > frequency).flatten()].sum(1) / power.sum(1)


def _power(images: Tensor) -> Tensor:
    return torch.fft.fft2(images.detach().double(), norm="ortho").abs().square().sum(1)


def _radius(images: Tensor) -> Tensor:
    down, across = (torch.fft.fftfreq(size, device=images.device) for size in images.shape[2:])
    return (down[:, None].square() + across.square()).sqrt()
