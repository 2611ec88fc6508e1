"""Attacks of Appendix B: pure functions `attack(model, x, y, *, epsilon, …) -> x_adv`.

Every attack keeps |x_adv − x| ≤ `epsilon` per pixel and x_adv in [0, 1] (up to one rounding of the images' dtype), leaves
the model's weights, gradients and mode alone, keeps device and dtype, and raises ValueError for input that breaks the
contracts of `apudae`. Only gradients of the input are computed. `seed` is an integer or a CPU `torch.Generator`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contracts import as_generator, check_at_least, check_batch, frozen


def random(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, seed: int | torch.Generator = 0) -> Tensor:
    """Uniform noise in [−epsilon, epsilon] (Eq. 5), clipped to [0, 1]."""
    _check(model, x, y, epsilon=epsilon)
    return (x + _uniform(x, epsilon, seed)).clamp(0, 1)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    """Fast gradient sign method (Eq. 6): one step of `epsilon` along the sign of the loss gradient."""
    _check(model, x, y, epsilon=epsilon)
    with frozen(model):
        return _ascend(model, x, y, x, epsilon, epsilon)


def r_fgsm(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, seed: int | torch.Generator = 0) -> Tensor:
    """FGSM after a random step: x + ε/2·sign(noise), then FGSM of the other half (Tramèr et al. 2018)."""
    _check(model, x, y, epsilon=epsilon)
    # paper: not defined; here: Tramèr et al. with α = ε/2, total ε, because the authors' script leaves the ball
    start = (x + epsilon / 2 * _normal_sign(x, seed)).clamp(0, 1)
    with frozen(model):
        return _ascend(model, x, y, start, epsilon / 2, epsilon)


def bim(
    model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, step_size: float = 0.01, steps: int | None = None
) -> Tensor:
    """Basic iterative method (Eq. 7): sign steps of `step_size`, projected each time; ⌊2ε/α + 2⌋ `steps` by default."""
    _check(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps)
    with frozen(model):
        return _iterate(model, x, y, x, epsilon, step_size, _default_steps(epsilon, step_size, steps))


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
    _check(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps)
    check_at_least(1, restarts=restarts)
    generator = as_generator(seed)
    steps = _default_steps(epsilon, step_size, steps)
    best, highest = x, torch.full_like(y, -torch.inf, dtype=x.dtype)
    with frozen(model):
        for _ in range(restarts):
            start = (x + _uniform(x, epsilon, generator)).clamp(0, 1)
            reached = _iterate(model, x, y, start, epsilon, step_size, steps)
            with torch.no_grad():
                loss = F.cross_entropy(model(reached), y, reduction="none")
            better = loss > highest
            highest = torch.where(better, loss, highest)
            best = torch.where(better[:, None, None, None], reached, best)
    return best


def _check(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, steps: int | None = None, **sizes: float) -> None:
    check_at_least(0, epsilon=epsilon)
    check_batch(model, x, y)
    if steps is not None:
        check_at_least(1, steps=steps)
    for name, value in sizes.items():
        check_at_least(0, **{name: value})
        if value == 0:
            raise ValueError(f"{name} is 0; needed: a positive number")


def _default_steps(epsilon: float, step_size: float, steps: int | None) -> int:
    return int(2 * epsilon / step_size + 2 + 1e-9) if steps is None else steps


def _uniform(x: Tensor, epsilon: float, seed: int | torch.Generator) -> Tensor:
    return ((2 * torch.rand(x.shape, generator=as_generator(seed)) - 1) * epsilon).to(x)


def _normal_sign(x: Tensor, seed: int | torch.Generator) -> Tensor:
    return (torch.rand(x.shape, generator=as_generator(seed)) - 0.5).sign().to(x)  # the sign of N(0, 1) noise


def _iterate(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, epsilon: float, step_size: float, steps: int
) -> Tensor:
    for _ in range(steps):
        start = _ascend(model, x, y, start, step_size, epsilon)
    return start


def _ascend(model: nn.Module, x: Tensor, y: Tensor, at: Tensor, step_size: float, epsilon: float) -> Tensor:
    """One sign step up the cross-entropy from `at`, projected to the ball around `x` and to [0, 1]."""
    at = at.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(at), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, at)
    moved = at.detach() + step_size * gradient.sign()
    return torch.clamp(moved, x - epsilon, x + epsilon).clamp(0, 1)
