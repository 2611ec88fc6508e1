"""MagNet (Meng and Chen 2017): a small autoencoder as reformer, and detectors."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..batching import in_batches
from ..contracts import check_at_least, check_images, check_whole, frozen
from ..training.distributed import rank_and_world_size, shared_draw
from ..training.loop import Recipe, fit

TEMPERATURES = (10, 40)  # of MagNet's divergence detectors for CIFAR-10
DROP_RATES = {"error": 0.001, "error, colour": 0.005, "divergence": 0.01}  # clean images that a detector may drop


class MagNet(nn.Module):
    """MagNet: an autoencoder as reformer (`forward`, differentiable), and detectors of images far from the clean ones.

    Grey images have two autoencoders (with pooling: reformer and a detector by squared error; without: a detector by
    absolute error), colour images one, for both (absolute error). `temperatures` adds detectors by the divergence of a
    classifier's output before and after the reformer. Thresholds are NaN until `calibrate`.
    """

    def __init__(self, channels: int = 1, temperatures: Sequence[float] = ()) -> None:
        super().__init__()
        check_whole(1, channels=channels)
        self.architecture = {"name": "magnet", "channels": channels, "temperatures": list(temperatures)}
        self.channels, self.temperatures = channels, list(temperatures)
        self.powers = (2, 1) if channels == 1 else (1,)
        pooled = [_autoencoder(channels, nn.AvgPool2d(2), nn.Upsample(scale_factor=2))] if channels == 1 else []
        self.autoencoders = nn.ModuleList([*pooled, _autoencoder(channels)])
        self.register_buffer("thresholds", torch.full((len(self.powers) + len(self.temperatures),), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        """Reformed images, in [0, 1], of the shape of `x` (n, C, H, W); even sides where the reformer pools."""
        self._check(x)
        return self.autoencoders[0](x)

    @torch.no_grad()
    def scores(self, x: Tensor, classifier: nn.Module | None = None) -> Tensor:
        """What each detector sees, (n, detectors): mean reconstruction errors, then divergences of `classifier`."""
        self._check(x)
        if self.temperatures and classifier is None:
            raise ValueError("this MagNet has divergence detectors, which need the classifier; give it as `classifier`")
        with frozen(self, *([classifier] if self.temperatures else [])):
            pairs = zip(self.autoencoders, self.powers, strict=True)
            found = [(x - network(x)).abs().pow(power).flatten(1).mean(1) for network, power in pairs]
            if self.temperatures:
                before, after = classifier(x), classifier(self.autoencoders[0](x))
                found += [_divergence(before / t, after / t) for t in self.temperatures]
        return torch.stack(found, 1)

    def calibrate(
        self, images: Tensor, classifier: nn.Module | None = None, drop_rates: Sequence[float] | None = None
    ) -> None:
        """Set each threshold so that at most its share of `images`, by default MagNet's (`DROP_RATES`), is above it.

        `images` must be training images that no weight was fitted on; never test images.
        """
        if drop_rates is None:
            error = DROP_RATES["error" if self.channels == 1 else "error, colour"]
            drop_rates = [error] * len(self.powers) + [DROP_RATES["divergence"]] * len(self.temperatures)
        if len(drop_rates) != len(self.thresholds) or not all(0 <= rate < 1 for rate in drop_rates):
            raise ValueError(f"drop_rates are {drop_rates}; needed: {len(self.thresholds)} numbers in [0, 1)")
        device = self.thresholds.device
        scores = in_batches(lambda batch: self.scores(batch.to(device), classifier), images)
        # original: the ⌊n·rate⌋-th largest score, so that fewer than 1/rate images drop all; here: then none is dropped
        for column, rate in enumerate(drop_rates):
            self.thresholds[column] = scores[:, column].kthvalue(len(scores) - int(len(scores) * rate)).values

    def detected(self, x: Tensor, classifier: nn.Module | None = None) -> Tensor:
        """Whether any detector drops an image: (n,). ValueError before `calibrate`."""
        if self.thresholds.isnan().any():
            raise ValueError(
                "MagNet's detectors have no thresholds; set them with calibrate on held-out training images"
            )
        return (self.scores(x, classifier) > self.thresholds).any(1)

    def _check(self, x: Tensor) -> None:
        check_images(x)
        sides = "even height and width" if self.channels == 1 else "height, width"
        if x.shape[1] != self.channels or (self.channels == 1 and (x.shape[2] % 2 or x.shape[3] % 2)):
            raise ValueError(f"images have shape {tuple(x.shape)}; this MagNet needs (n, {self.channels}, {sides})")


def _autoencoder(channels: int, *pool_and_back: nn.Module) -> nn.Sequential:
    """Three features, 3×3, a sigmoid after every convolution; with pooling one more convolution on either side."""
    layers = [nn.Conv2d(channels, 3, 3, padding=1), nn.Sigmoid()]
    if pool_and_back:
        pool, back = pool_and_back
        layers += [pool, nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid(), nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid(), back]
    layers += [nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid(), nn.Conv2d(3, channels, 3, padding=1), nn.Sigmoid()]
    return nn.Sequential(*layers)


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen–Shannon divergence, in nats, of two rows of logits: (n,)."""
    first, second = first.log_softmax(1), second.log_softmax(1)
    middle = torch.logaddexp(first, second) - math.log(2)
    terms = [F.kl_div(middle, each, reduction="none", log_target=True).sum(1) for each in (first, second)]
    return (terms[0] + terms[1]) / 2


def train_magnet(
    magnet: MagNet,
    dataset: Dataset,
    recipe: Recipe,
    *,
    noise_std: float = 0.1,
    activity: float = 1e-9,
    run_dir: Path | None = None,
    device: str | torch.device = "cpu",
) -> list[list[dict[str, float]]]:
    """Train each autoencoder to take noise of `noise_std` off, with a penalty `activity` on all activations squared.

    MagNet's own: noise .1 for grey and .025 for colour images, batches of 256, 100 epochs. Returns a curve for each.
    """
    check_at_least(0, noise_std=noise_std, activity=activity)
    if rank_and_world_size()[1] > 1:
        raise ValueError("MagNet's 310 weights are trained in one process; its penalty is a sum over the whole batch")

    def loss(model: nn.Module, x: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
        # original: noise drawn once for the whole training; here: anew for each batch
        h = (x + noise_std * shared_draw(torch.randn, x.shape, generator)).clamp(0, 1)
        penalty = 0.0
        for part in model:
            h = part(h)
            penalty = penalty + (h.square().sum() if isinstance(part, nn.Sigmoid) else 0)
        return F.mse_loss(h, x) + activity * penalty

    curves, about = [], {"noise_std": noise_std, "activity": activity}
    for number, autoencoder in enumerate(magnet.autoencoders):
        autoencoder.architecture = magnet.architecture | {"autoencoder": number}
        folder = None if run_dir is None else Path(run_dir) / f"autoencoder-{number}"
        curves.append(fit(autoencoder, loss, dataset, recipe, run_dir=folder, device=device, about=about))
    magnet.eval()
    return curves
