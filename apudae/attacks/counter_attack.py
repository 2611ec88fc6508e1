"""Counter-attack B of Appendix A, and its strong form: fool the classifier and keep the reconstruction error small."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contracts import as_generator, check_at_least, check_whole, frozen
from ..models.autoencoders import squared_distance
from .common import check_attack, check_start, default_steps, gradient_of, lengths, project, uniform
from .losses import LOSSES

MOMENTUM, PATIENCE = 0.75, 1.15  # share of the former step in the next; how the multiplier grows and shrinks


class ClassifierWithReconstructionError(nn.Module):
    """`classifier`, and beside it the reconstruction error of an image, `errors(x)`: what counter-attack B attacks."""

    def __init__(self, classifier: nn.Module, dae: nn.Module) -> None:
        super().__init__()
        self.classifier, self.dae = classifier, dae

    def errors(self, x: Tensor) -> Tensor:
        """dist of each image (n,), differentiable."""
        return squared_distance(x, self.dae(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


def counter_attack_b(
    model: ClassifierWithReconstructionError,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    beta: float,
    step_size: float = 0.01,
    steps: int | None = None,
) -> Tensor:
    """BIM on J(classifier(x), y) − beta·dist(x) (Eq. 4): fool the classifier and leave the purifier little to see.

    `model` holds the classifier and the autoencoder. ⌊2ε/α + 2⌋ `steps` by default, as of BIM.
    """
    x = check_attack(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps)
    check_at_least(0, beta=beta)
    moved = x
    with frozen(model):
        for _ in range(default_steps(epsilon, step_size, steps)):
            moved = moved.detach().requires_grad_()
            with torch.enable_grad():
                # paper: prints + β and forgets the classifier; here: − β, because the text wants the error small
                loss = F.cross_entropy(model(moved), y, reduction="sum") - beta * model.errors(moved).sum()
            moved = project(moved.detach() + step_size * gradient_of(loss, moved).sign(), x, epsilon)
    return moved


def joint(
    model: ClassifierWithReconstructionError,
    x: Tensor,
    y: Tensor,
    start: Tensor | None = None,
    *,
    epsilon: float,
    low: float | None = None,
    high: float = 0.0,
    steps: int = 80,
    restarts: int = 3,
    loss: str = "margin",
    target: Tensor | None = None,
    seed: int | torch.Generator = 0,
) -> Tensor:
    """The strong form of counter-attack B: the highest loss whose reconstruction error a purifier takes for clean.

    Raises `losses.LOSSES[loss]` of the classifier, towards the class `target` (n,) if given, subject to
    μ + `low`·σ ≤ dist(x) ≤ μ + `high`·σ (`low` None: no lower bound): sign steps with momentum, the error's gradient
    times a multiplier of each image that grows while the bound is broken and shrinks while it holds. An image that
    never keeps the bound comes back where it broke it least. No purifier is in the loop: E and its like leave an image
    within the bound as it is. Not in the paper, whose B has one β for all images.
    """
    x = check_attack(model, x, y, epsilon=epsilon, steps=steps, loss=loss, target=target)
    check_whole(1, restarts=restarts)
    if not -math.inf < (high - 1 if low is None else low) < high < math.inf:
        raise ValueError(
            f"the bounds are {low} and {high} standard deviations about μ; needed: low below a finite high"
        )
    generator, dae = as_generator(seed), model.dae
    above = float(dae.recon_mu + high * dae.recon_sigma)
    below = -math.inf if low is None else float(dae.recon_mu + low * dae.recon_sigma)
    if not above > 0:
        raise ValueError(f"no reconstruction error is below μ {high:+g} σ = {above:g}, or μ and σ are unknown")
    best, least = x, torch.full_like(x[:, 0, 0, 0], torch.inf)
    highest = -least
    with frozen(model):
        for run in range(restarts):
            at = (x + uniform(x, epsilon, generator)).clamp(0, 1) if run > 0 else check_start(start, x, epsilon)
            multiplier, velocity = torch.ones_like(x[:, :1, :1, :1]), torch.zeros_like(x)
            for step in range(steps + 1):
                at = at.detach().requires_grad_()
                with torch.enable_grad():
                    losses, errors = LOSSES[loss](model(at), y, target), model.errors(at)
                with torch.no_grad():
                    broken = (errors - above).clamp_min(0) + (below - errors).clamp_min(0)
                    better = (broken < least) | (broken == least) & (losses > highest)
                    best = torch.where(better[:, None, None, None], at.detach(), best)
                    least, highest = torch.where(better, broken, least), torch.where(better, losses, highest)
                if step == steps:
                    break
                uphill, outward = (gradient_of(each.sum(), at) for each in (losses, errors))
                # towards the middle of a band; down where only the upper bound is there
                side = torch.ones_like(errors) if low is None else (errors.detach() - (below + above) / 2).sign()
                ahead = uphill - multiplier * side[:, None, None, None] * outward
                velocity = MOMENTUM * velocity + ahead / lengths(ahead)
                multiplier = multiplier * torch.where(broken > 0, PATIENCE, 1 / PATIENCE)[:, None, None, None]
                size = epsilon / 4 * (1 + math.cos(math.pi * step / steps)) / 2 + epsilon / 100
                at = project(at.detach() + size * velocity.sign(), x, epsilon)
    return best
