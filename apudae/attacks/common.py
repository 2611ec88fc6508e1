"""What attacks share: their checks, the projection to the ε-ball, gradients of the input alone."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..contracts import as_generator, check_at_least, check_batch, check_images, check_known, check_whole
from .losses import check_loss

Norm = Literal["linf", "l2"]


def check_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int | None = None,
    unclipped: bool = False,
    loss: str = "ce",
    target: Tensor | None = None,
    norm: str = "linf",
    **positive: float,
) -> Tensor:
    """The images, detached, once all arguments of an attack are found sound."""
    check_known("norm", norm, get_args(Norm))
    if not (unclipped and epsilon == math.inf):
        check_at_least(0, epsilon=epsilon)
        if epsilon > 1 and norm == "linf":
            raise ValueError(f"epsilon is {epsilon:g}; needed: at most 1, in [0, 1] pixels (8/255 = 0.0314)")
    check_loss(loss, check_batch(model, x, y), y, target)
    if steps is not None:
        check_whole(1, steps=steps)
    check_positive(**positive)
    return x.detach()


def check_positive(**values: float) -> None:
    """Raise ValueError for the first named value that is no finite number or is not above 0."""
    for name, value in values.items():
        check_at_least(0, **{name: value})
        if value == 0:
            raise ValueError(f"{name} is 0; needed: a positive number")


def check_start(start: Tensor | None, x: Tensor, epsilon: float, norm: str = "linf") -> Tensor:
    """Where an attack begins: at `x`, or at the images `start`, which another attack has found."""
    if start is None:
        return x
    check_images(start)
    if start.shape != x.shape:
        raise ValueError(f"start has shape {tuple(start.shape)}, the images {tuple(x.shape)}; needed: the same")
    return project(start.detach(), x, epsilon, norm)


def project(moved: Tensor, x: Tensor, epsilon: float, norm: str = "linf") -> Tensor:
    """`moved` clipped to the ε-ball around `x` and to [0, 1]: Π of Eq. 7, clip of Eq. 8."""
    if norm == "linf":
        return torch.clamp(moved, x - epsilon, x + epsilon).clamp(0, 1)
    away = moved - x
    return (x + away * (epsilon / lengths(away)).clamp_max(1)).clamp(0, 1)  # x is in [0, 1]: that only shortens


def lengths(x: Tensor) -> Tensor:
    """The L2 norm of each image (n, 1, 1, 1), never quite 0."""
    return x.square().sum((1, 2, 3), keepdim=True).sqrt().clamp_min(torch.finfo(x.dtype).tiny)


def default_steps(epsilon: float, step_size: float, steps: int | None) -> int:
    """`steps`, or BIM's ⌊2ε/α + 2⌋ for None. ValueError for more than anybody waits for."""
    if steps is None and not 2 * epsilon / step_size < 100_000:
        raise ValueError(f"step_size is {step_size:g}, which makes {2 * epsilon / step_size:.0f} steps; give steps")
    return int(2 * epsilon / step_size + 2 + 1e-9) if steps is None else int(steps)


def uniform(x: Tensor, epsilon: float, seed: int | torch.Generator, norm: str = "linf") -> Tensor:
    """Uniform in the ε-ball, in the shape of `x`."""
    generator = as_generator(seed)
    if norm == "linf":
        return ((2 * torch.rand(x.shape, generator=generator, device="cpu") - 1) * epsilon).to(x)
    direction = torch.randn(x.shape, generator=generator, device="cpu")
    radius = torch.rand(len(x), 1, 1, 1, generator=generator, device="cpu") ** (1 / x[0].numel())
    return (epsilon * radius * direction / lengths(direction)).to(x)


def gradient_of(loss: Tensor, x: Tensor, *, retain_graph: bool = False) -> Tensor:
    """The gradient of `loss`, 0 where it is no finite number, so that no image becomes NaN."""
    require_gradient(loss)
    return finite(torch.autograd.grad(loss, x, retain_graph=retain_graph)[0])


def finite(gradient: Tensor) -> Tensor:
    """`gradient`, 0 where it is no finite number."""
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def require_gradient(output: Tensor) -> None:
    """ValueError unless `output` can be differentiated."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "torch.inference_mode is on and records no gradient; needed for this attack: a call outside of it"
        )
    if not output.requires_grad:
        raise ValueError(
            "the model gives no gradient with respect to its input; needed for this attack: a differentiable model "
            '(a Purifier hides its gradient unless backward is "identity", "dae" or "exact")'
        )
