"""Randomized smoothing: the L2 radius around an image in which no attacker changes the label (Cohen et al. 2019)."""

import math
from collections.abc import Sequence

import pandas as pd
import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from ..batching import in_batches
from ..contracts import check_at_least, check_batch, check_whole, frozen
from ..purification.steps import Draws
from .accuracy import Accuracy

ABSTAINS = -1  # in place of a label


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    noise_std: float,
    draws: int = 1000,
    first: int = 100,
    alpha: float = 0.001,
    seed: int = 0,
) -> pd.DataFrame:
    """Label and certified L2 radius, in [0, 1] pixels, of each image under the smoothed `model` (Cohen et al. 2019).

    The smoothed model reads the label that `model` reads most often under Gaussian noise of `noise_std`; with the
    autoencoder in `model` this is denoised smoothing (Salman et al. 2020). `first` draws guess the label, `draws` more
    bound its probability from below (Clopper and Pearson 1934), wrong for a share of `alpha` of all images at most; the
    radius is noise_std·Φ⁻¹(bound). Columns: label, read (−1: the bound is not above ½, and it abstains), radius, right.
    Noise is not clipped to [0, 1], as the guarantee needs; an image's own comes from `seed` and its place in the call.
    """
    check_batch(model, x, y)
    check_at_least(1e-6, noise_std=noise_std)
    check_whole(1, draws=draws, first=first)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; needed: a probability between 0 and 1")
    lines, size = [], (first + draws, *x.shape[1:])
    with torch.no_grad(), frozen(model):
        for place, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
            generator = Draws(seed, torch.tensor([place], device="cpu")).generators[0]
            read = in_batches(
                lambda noisy: model(noisy).argmax(1),
                image + noise_std * torch.randn(size, generator=generator, device="cpu").to(image),
            )
            guess = read[:first].mode().values.item()
            hits = int((read[first:] == guess).sum())
            bound = beta.ppf(alpha, hits, draws - hits + 1) if hits else 0.0
            sure = bound > 0.5
            radius = noise_std * norm.ppf(bound) if sure else 0.0
            lines.append([label, guess if sure else ABSTAINS, radius, sure and guess == label])
    return pd.DataFrame(lines, columns=["label", "read", "radius", "right"])


def certified_accuracy(certified: pd.DataFrame, radii: Sequence[float]) -> dict[float, Accuracy]:
    """The share of images that are right, and certified to be within each of `radii`."""
    if any(not 0 <= radius < math.inf for radius in radii):
        raise ValueError(f"radii are {list(radii)}; needed: lengths of at least 0")
    return {
        radius: Accuracy(int((certified.right & (certified.radius >= radius)).sum()), len(certified))
        for radius in radii
    }
