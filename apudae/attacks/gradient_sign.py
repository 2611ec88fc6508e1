"""Attacks along the sign of the loss gradient (Appendix B): random noise, FGSM, R-FGSM, BIM, PGD."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contracts import as_generator, check_images, check_whole, frozen
from .common import check_attack, default_steps, gradient_of, normal_sign, project, uniform, warn_of_zeros


def random(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, seed: int | torch.Generator = 0) -> Tensor:
    """Uniform noise in [−epsilon, epsilon] (Eq. 5), clipped to [0, 1]."""
    x = check_attack(model, x, y, epsilon=epsilon)
    return (x + uniform(x, epsilon, seed)).clamp(0, 1)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    """Fast gradient sign method (Eq. 6): one step of `epsilon` along the sign of the loss gradient."""
    x = check_attack(model, x, y, epsilon=epsilon)
    with frozen(model):
        return _ascend(model, x, y, x, epsilon, epsilon)


def r_fgsm(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, seed: int | torch.Generator = 0) -> Tensor:
    """FGSM after a random step: x + ε/2·sign(noise), then FGSM of the other half (Tramèr et al. 2018)."""
    x = check_attack(model, x, y, epsilon=epsilon)
    # paper: not defined; here: Tramèr et al. with α = ε/2, total ε, because the authors' script leaves the ball
    start = (x + epsilon / 2 * normal_sign(x, seed)).clamp(0, 1)
    with frozen(model):
        return _ascend(model, x, y, start, epsilon / 2, epsilon)


def bim(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor | None = None,
    *,
    epsilon: float,
    step_size: float = 0.01,
    steps: int | None = None,
) -> Tensor:
    """Basic iterative method (Eq. 7): sign steps of `step_size`, projected each time; ⌊2ε/α + 2⌋ `steps` by default.

    From `x`, or from the images `start`, which another attack has found.
    """
    x = check_attack(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps)
    if start is not None:
        check_images(start)
        if start.shape != x.shape:
            raise ValueError(f"start has shape {tuple(start.shape)}, the images {tuple(x.shape)}; needed: the same")
    start = x if start is None else project(start, x, epsilon)
    with frozen(model):
        return iterate(model, x, y, start, epsilon, step_size, default_steps(epsilon, step_size, steps))


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float = 0.01,
    steps: int | None = None,
    restarts: int = 1,
    seed: int | torch.Generator = 0,
) -> Tensor:
    """BIM from a uniform random start (Madry et al. 2018); of `restarts` runs, each image keeps its highest loss."""
    x = check_attack(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps)
    check_whole(1, restarts=restarts)
    generator = as_generator(seed)
    steps = default_steps(epsilon, step_size, steps)
    best, highest = x, torch.full_like(y, -torch.inf, dtype=x.dtype)
    with frozen(model):
        for _ in range(restarts):
            start = (x + uniform(x, epsilon, generator)).clamp(0, 1)
            reached = iterate(model, x, y, start, epsilon, step_size, steps)
            with torch.no_grad():
                loss = F.cross_entropy(model(reached), y, reduction="none")
            better = loss > highest
            highest = torch.where(better, loss, highest)
            best = torch.where(better[:, None, None, None], reached, best)
    return best


def iterate(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, epsilon: float, step_size: float, steps: int
) -> Tensor:
    """The loop of BIM and PGD alone, from `start` within the ε-ball around `x`: nothing checked, `model` not frozen."""
    for step in range(steps):
        start = _ascend(model, x, y, start, step_size, epsilon, first=step == 0)
    return start


def _ascend(
    model: nn.Module, x: Tensor, y: Tensor, at: Tensor, step_size: float, epsilon: float, first: bool = True
) -> Tensor:
    """One sign step up the cross-entropy from `at`, projected to the ball around `x` and to [0, 1]."""
    at = at.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(at), y, reduction="sum")
    gradient = gradient_of(loss, at)
    if first:
        warn_of_zeros(gradient)
    return project(at.detach() + step_size * gradient.sign(), x, epsilon)
