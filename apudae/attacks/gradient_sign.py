"""Attacks along the sign of the loss gradient (Appendix B): random noise, FGSM, R-FGSM, BIM, PGD.

`loss` is one of `losses.LOSSES`; with `target` (n,), each image is moved towards that class.
"""

import warnings

import torch
from torch import Tensor, nn

from ..contracts import as_generator, check_whole, frozen
from .common import Norm, check_attack, check_start, default_steps, gradient_of, lengths, project, uniform
from .losses import LOSSES


def random(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, seed: int | torch.Generator = 0) -> Tensor:
    """Uniform noise in [−epsilon, epsilon] (Eq. 5), clipped to [0, 1]."""
    x = check_attack(model, x, y, epsilon=epsilon)
    return (x + uniform(x, epsilon, seed)).clamp(0, 1)


def fgsm(
    model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, loss: str = "ce", target: Tensor | None = None
) -> Tensor:
    """Fast gradient sign method (Eq. 6): one step of `epsilon` along the sign of the loss gradient."""
    x = check_attack(model, x, y, epsilon=epsilon, loss=loss, target=target)
    with frozen(model):
        return iterate(model, x, y, x, epsilon, epsilon, 1, loss, target)


def r_fgsm(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, seed: int | torch.Generator = 0) -> Tensor:
    """FGSM after a random step: x + ε/2·sign(noise), then FGSM of the other half (Tramèr et al. 2018)."""
    x = check_attack(model, x, y, epsilon=epsilon)
    # paper: not defined; here: Tramèr et al. with α = ε/2, total ε, because the authors' script leaves the ball
    start = (x + epsilon / 2 * uniform(x, 1, seed).sign()).clamp(0, 1)
    with frozen(model):
        return iterate(model, x, y, start, epsilon, epsilon / 2, 1)


def bim(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor | None = None,
    *,
    epsilon: float,
    step_size: float = 0.01,
    steps: int | None = None,
    loss: str = "ce",
    target: Tensor | None = None,
) -> Tensor:
    """Basic iterative method (Eq. 7): sign steps of `step_size`, projected each time; ⌊2ε/α + 2⌋ `steps` by default.

    From `x`, or from the images `start`, which another attack has found.
    """
    x = check_attack(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps, loss=loss, target=target)
    start = check_start(start, x, epsilon)
    with frozen(model):
        return iterate(model, x, y, start, epsilon, step_size, default_steps(epsilon, step_size, steps), loss, target)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float = 0.01,
    steps: int | None = None,
    restarts: int = 1,
    loss: str = "ce",
    target: Tensor | None = None,
    norm: Norm = "linf",
    seed: int | torch.Generator = 0,
) -> Tensor:
    """BIM from a uniform random start (Madry et al. 2018); of `restarts` runs, each image keeps its highest loss.

    With `norm` "l2", `epsilon` and `step_size` are lengths, and a step goes along the gradient itself.
    """
    x = check_attack(
        model, x, y, epsilon=epsilon, step_size=step_size, steps=steps, loss=loss, target=target, norm=norm
    )
    check_whole(1, restarts=restarts)
    generator = as_generator(seed)
    steps = default_steps(epsilon, step_size, steps)
    best, highest = x, torch.full_like(y, -torch.inf, dtype=x.dtype)
    with frozen(model):
        for _ in range(restarts):
            start = (x + uniform(x, epsilon, generator, norm)).clamp(0, 1)
            reached = iterate(model, x, y, start, epsilon, step_size, steps, loss, target, norm)
            with torch.no_grad():
                losses = LOSSES[loss](model(reached), y, target)
            better = losses > highest
            highest = torch.where(better, losses, highest)
            best = torch.where(better[:, None, None, None], reached, best)
    return best


def iterate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    at: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    loss: str = "ce",
    target: Tensor | None = None,
    norm: Norm = "linf",
) -> Tensor:
    """The loop of all of these alone, from `at` within the ε-ball around `x`: nothing checked, `model` not frozen."""
    for step in range(steps):
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            total = LOSSES[loss](model(at), y, target).sum()
        gradient = gradient_of(total, at)
        if step == 0:
            _warn_of_zeros(gradient)
        direction = gradient.sign() if norm == "linf" else gradient / lengths(gradient)
        at = project(at.detach() + step_size * direction, x, epsilon, norm)
    return at


def _warn_of_zeros(gradient: Tensor) -> None:
    """A warning, with their share, of images whose whole gradient is exactly zero: no step can move them."""
    share = (gradient.flatten(1).abs().amax(1) == 0).double().mean().item()
    if share > 0.05:
        text = f"{share:.0%} of the images have a gradient of exactly zero, so that this attack cannot move them"
        warnings.warn(f'{text}; a loss that does not vanish may: attacks.apgd(…, loss="dlr")', stacklevel=4)
