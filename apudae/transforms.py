"""Per-image randomness and the resizing and rotating of variant G."""

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
