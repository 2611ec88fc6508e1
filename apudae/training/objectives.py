"""What is minimised: Eq. 1 for autoencoders, cross-entropy for classifiers, clean or under attack."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from ..attacks.gradient_sign import iterate
from ..contracts import check_at_least, check_batch, check_whole, frozen
from ..datasets.small import TensorImages
from ..files import fingerprint
from .distributed import shared_draw
from .loop import Recipe, bare, fit


def train_dae(
    dae: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    noise_std_max: float,
    noise_std_min: float = 0.0,
    shift: int = 0,
    flip: bool = False,
    shrink: int = 1,
    patch: int = 0,
    classifier: nn.Module | None = None,
    stability: float = 0.01,
    epsilon: float = 0.0,
    run_dir: Path | None = None,
    device: str | torch.device = "cpu",
) -> list[dict[str, float]]:
    """Train on Eq. 1: mse(DAE(x + σ·noise), x), σ ~ U[noise_std_min, noise_std_max] drawn for each image.

    Images are never clipped after the noise, as in the equation. An autoencoder that `reads_noise` is told each σ.
    `shift` and `flip` are those of `train_classifier`.
    With `patch`, x is a random square of so many pixels of each image, turned by 0 to 3 quarters (upright where a
    `classifier` reads it); with `shrink`, too, of the image made 2, 3, … or `shrink` times smaller (the mean of k×k
    pixels, another k for each batch), without the traces that JPEG leaves.
    With a `classifier` (not in the paper), `stability` times its cross-entropy on denoised images is added, its own
    verdict on the clean image as the label (Denoised Smoothing, Salman et al. 2020); and with an `epsilon` every other
    image, by chance, is attacked before the noise, two steps of PGD on that classifier (as Liao et al. 2018 train).
    Returns the curve: step and mean loss since the last.
    """
    check_whole(0, shift=shift, patch=patch)
    check_whole(1, shrink=shrink)
    if shrink > 1 and not patch:
        raise ValueError(f"shrink is {shrink}, without a patch; give one")
    if (side := patch * shrink) > min(sides := tuple(dataset[0][0].shape[1:])):
        named = "patch" if shrink == 1 else "patch · shrink"
        raise ValueError(f"{named} is {side}; needed: at most the images' sides, {sides}")
    check_at_least(0, noise_std_min=noise_std_min)
    check_at_least(noise_std_min, noise_std_max=noise_std_max)
    check_at_least(0, stability=stability, epsilon=epsilon)
    if classifier is not None:
        classifier.to(device)
    elif epsilon:
        raise ValueError(f"epsilon is {epsilon}, without a classifier to attack; give one")

    def loss(model: nn.Module, x: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
        x = _patches(x, patch, shrink, generator, turn=classifier is None) if patch else x
        x = _augmented(x, shift, flip, generator)
        share = shared_draw(torch.rand, (len(x), 1, 1, 1), generator)
        noise_std = noise_std_min + (noise_std_max - noise_std_min) * share
        noise = noise_std * shared_draw(torch.randn, x.shape, generator)
        told = (noise_std,) if getattr(bare(model), "reads_noise", False) else ()
        if classifier is None:
            return F.mse_loss(model(x + noise, *told), x)
        with frozen(classifier):
            with torch.no_grad():
                verdict, seen = classifier(x).argmax(1), x
            if epsilon:
                chosen = shared_draw(torch.rand, (len(x), 1, 1, 1), generator) < 0.5
                seen = torch.where(chosen, _attacked(classifier, x, verdict, epsilon, epsilon, 2, generator), x)
            denoised = model(seen + noise, *told)
            return F.mse_loss(denoised, x) + stability * F.cross_entropy(classifier(denoised), verdict)

    about = {"noise_std_max": noise_std_max, "noise_std_min": noise_std_min, "shift": shift, "flip": flip}
    about |= {"patch": patch} if patch else {}
    about |= {"shrink": shrink} if shrink > 1 else {}
    if classifier is not None:
        about |= {"stability": stability, "epsilon": epsilon, "guide": fingerprint(classifier.state_dict())}
    shown = _unconverted(dataset) if patch else dataset
    return fit(dae, loss, shown, recipe, run_dir=run_dir, device=device, about=about)


def train_classifier(
    classifier: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    shift: int = 0,
    flip: bool = False,
    run_dir: Path | None = None,
    device: str | torch.device = "cpu",
) -> list[dict[str, float]]:
    """Train on cross-entropy of images moved by up to `shift` pixels each way (zeros move in). Returns the curve.

    With `flip`, every other image, by chance, is seen in the mirror.
    """
    check_whole(0, shift=shift)
    _check_fits(classifier, dataset)

    def loss(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(model(_augmented(x, shift, flip, generator)), y)

    about = {"shift": shift, "flip": flip}
    return fit(classifier, loss, dataset, recipe, run_dir=run_dir, device=device, about=about)


def _check_fits(classifier: nn.Module, dataset: Dataset) -> None:
    """Raise ValueError, before anything is trained, unless `classifier` takes the first image and has its label."""
    weight = next(classifier.parameters())
    check_batch(classifier, dataset[0][0][None].to(weight), torch.tensor([int(dataset[0][1])], device=weight.device))


def _augmented(x: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """`x` moved by up to `shift` pixels each way, zeros moving in; with `flip`, every other image in the mirror."""
    if shift:
        x = _cut(F.pad(x, (shift,) * 4), *x.shape[2:], generator)
    if not flip:
        return x
    mirrored = shared_draw(torch.rand, (len(x), 1, 1, 1), generator) < 0.5
    return torch.where(mirrored, x.flip(3), x)


def train_adversarial(
    classifier: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    shift: int = 0,
    flip: bool = False,
    run_dir: Path | None = None,
    device: str | torch.device = "cpu",
) -> list[dict[str, float]]:
    """Train on cross-entropy of images under PGD on the classifier as it is at that step (Madry et al. 2018).

    Each image starts at a random point of its ε-ball and takes `steps` sign steps of `step_size`; one step with a
    `step_size` of 1.25 `epsilon` is the fast form of Wong et al. (2020). `shift` and `flip` are those of
    `train_classifier`, before the attack. Returns the curve.
    """
    check_at_least(0, epsilon=epsilon, step_size=step_size)
    check_whole(1, steps=steps)
    check_whole(0, shift=shift)
    _check_fits(classifier, dataset)

    def loss(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        x = _augmented(x, shift, flip, generator)
        with frozen(bare(model)):
            attacked = _attacked(bare(model), x, y, epsilon, step_size, steps, generator)
        return F.cross_entropy(model(attacked), y)

    about = {"epsilon": epsilon, "step_size": step_size, "attack_steps": steps, "shift": shift, "flip": flip}
    return fit(classifier, loss, dataset, recipe, run_dir=run_dir, device=device, about=about)


def _attacked(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, step_size: float, steps: int, generator: torch.Generator
) -> Tensor:
    """`x` under `steps` steps of PGD from a random point of the ε-ball."""
    noise = 2 * shared_draw(torch.rand, x.shape, generator) - 1
    return iterate(model, x, y, (x + epsilon * noise).clamp(0, 1), epsilon, step_size, steps)


def _unconverted(dataset: Dataset) -> Dataset:
    """`dataset`, with images that are held in memory as bytes: a square is cut out of each first, then converted."""
    if isinstance(dataset, Subset):
        return Subset(_unconverted(dataset.dataset), dataset.indices)
    return TensorDataset(dataset.pixels, dataset.labels) if type(dataset) is TensorImages else dataset


def _patches(x: Tensor, patch: int, shrink: int, generator: torch.Generator, turn: bool = True) -> Tensor:
    """A random square of each image, made up to `shrink` times smaller; with `turn`, by a random number of quarters."""
    factor = int(torch.randint(2, shrink + 1, (), generator=generator, device=x.device)) if shrink > 1 else 1
    x = _cut(x, factor * patch, factor * patch, generator)
    x = F.avg_pool2d(x if x.is_floating_point() else x.float() / 255, factor)
    if not turn:
        return x
    quarters = shared_draw(partial(torch.randint, 0, 4), (len(x),), generator)
    turned = torch.stack([x.rot90(quarter, (2, 3)) for quarter in range(4)])
    return turned[quarters, torch.arange(len(x), device=x.device)]


def _cut(x: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A random part of `height` by `width` pixels of each image."""
    spare = x.shape[2] - height, x.shape[3] - width
    down, right = (shared_draw(partial(torch.randint, 0, most + 1), (len(x), 1), generator) for most in spare)
    rows = (down + torch.arange(height, device=x.device))[:, :, None]
    columns = (right + torch.arange(width, device=x.device))[:, None, :]
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x[image, :, rows, columns].movedim(-1, 1)
