"""Parts of a purification step: randomness for each image, G's transform, Adam's moments, an attacker's gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Draws:
    """Random numbers with a generator for each image, so that an image's noise does not depend on its batch."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        seeds = torch.randint(2**62, (n,), generator=generator).tolist()
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(self, x: Tensor) -> Tensor:
        """N(0, 1) in the shape of `x`."""
        return torch.stack([torch.randn(x.shape[1:], generator=each) for each in self.generators]).to(x)

    def uniform(self, x: Tensor) -> Tensor:
        """U[0, 1] in the shape of `x`."""
        return torch.stack([torch.rand(x.shape[1:], generator=each) for each in self.generators]).to(x)


def affine_matrices(x: Tensor, resize: float, rotation: float, draws: Draws | None) -> Tensor:
    """Matrices (n, 2, 2), in pixels, that resize by the factor and rotate by the degrees given.

    With `draws`, each image's are drawn uniformly between no change and so much either way.
    """
    share = torch.ones(len(x), 2)
    if draws is not None:
        share = 2 * torch.stack([torch.rand(2, generator=each) for each in draws.generators]) - 1
    factor = 1 + share[:, 0] * (resize - 1)
    angle = torch.deg2rad(share[:, 1] * rotation)
    cosine, sine = angle.cos() / factor, angle.sin() / factor  # the grid looks up where a pixel comes from
    return torch.stack([cosine, -sine, sine, cosine], 1).view(-1, 2, 2).to(x)


def resampled(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` looked up bilinearly through `matrix` about the centre; zeros come in from outside."""
    height, width = x.shape[2:]
    aspect = matrix.new_tensor([[1.0, height / width], [width / height, 1.0]])  # pixels to [−1, 1] coordinates
    theta = torch.cat([matrix * aspect, matrix.new_zeros(len(x), 2, 1)], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp(0, 1)


class Moments:
    """Adam's two moments and step counts of every image; an image at rest keeps its own."""

    def __init__(self, x: Tensor, betas: tuple[float, float]) -> None:
        self.betas = betas
        self.first, self.second = torch.zeros_like(x), torch.zeros_like(x)
        self.counts = torch.zeros_like(x[:, :1, :1, :1])

    def updated(self, gradients: Tensor, moving: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        first = beta1 * self.first[moving] + (1 - beta1) * gradients
        second = beta2 * self.second[moving] + (1 - beta2) * gradients.square()
        counts = self.counts[moving] + 1
        self.first = self.first.index_put((moving,), first)
        self.second = self.second.index_put((moving,), second)
        self.counts = self.counts.index_put((moving,), counts)
        smallest = torch.finfo(gradients.dtype).tiny  # keeps the root differentiable where a gradient is 0
        spread = (second / (1 - beta2**counts)).clamp_min(smallest).sqrt()
        return first / (1 - beta1**counts) / (spread + 1e-12)  # so small that betas of 0 give the sign step


def per_image(values: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1), to be multiplied with images."""
    return values.view(-1, 1, 1, 1)


class StraightThrough(torch.autograd.Function):
    """The value of `purified`, the gradient of `seen` (BPDA)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, seen: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, above: Tensor) -> tuple[Tensor, None]:
        return above, None


class SmoothSign(torch.autograd.Function):
    """sign(g) forward; the derivative of tanh(g / s), s the mean of |g| over an image, backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return gradient.sign()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, above: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        return above * (1 - torch.tanh(gradient / scale).square()) / scale
