"""Parts of a purification step: randomness for each image, G's transform, Adam's moments."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import StraightThrough


class Step(NamedTuple):
    """One line of a trajectory: images before the step, their errors (n,), and the α of the step (n,), 0 at rest."""

    images: Tensor
    errors: Tensor
    step_sizes: Tensor


class Draws:
    """Random numbers with a generator for each image, so that its noise depends on `seed` and its id alone."""

    def __init__(self, seed: int, ids: Tensor) -> None:
        """`ids` (n,): of two images with the same one the numbers are the same."""
        words = [hashlib.blake2b(f"{seed},{image}".encode(), digest_size=7) for image in ids.tolist()]
        self.generators = [torch.Generator("cpu").manual_seed(int(word.hexdigest(), 16)) for word in words]

    def drawn(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        """What `draw` (torch.rand, torch.randn) gives in that shape for each image: (n, *shape), on the CPU."""
        return torch.stack([draw(shape, generator=each, device="cpu") for each in self.generators])


def affine_matrices(x: Tensor, resize: float, rotation: float, draws: Draws | None) -> Tensor:
    """Matrices (n, 2, 2), in pixels, that resize by the factor and rotate by the degrees given.

    With `draws`, each image's are drawn uniformly between no change and so much either way.
    """
    share = torch.ones(len(x), 2, device="cpu")
    if draws is not None:
        share = 2 * draws.drawn(torch.rand, 2) - 1
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
        self.betas = betas  # the bookkeeping is float32 at least: in bfloat16 1 − β2 to the count rounds to 0
        self.first = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        self.second, self.counts = torch.zeros_like(self.first), torch.zeros_like(self.first[:, :1, :1, :1])

    def updated(self, gradients: Tensor, moving: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        gradients = gradients.to(self.first.dtype)
        first = beta1 * self.first[moving] + (1 - beta1) * gradients
        second = beta2 * self.second[moving] + (1 - beta2) * gradients.square()
        counts = self.counts[moving] + 1
        self.first = self.first.index_put((moving,), first)
        self.second = self.second.index_put((moving,), second)
        self.counts = self.counts.index_put((moving,), counts)
        smallest = torch.finfo(gradients.dtype).tiny  # keeps the root differentiable where a gradient is 0
        spread = (second / (1 - beta2**counts)).clamp_min(smallest).sqrt()
        mean = first / (1 - beta1**counts)
        direction = mean / (spread + 1e-12)  # so small that betas of 0 give the sign step
        if not gradients.requires_grad:
            return direction
        # the first step is a sign: on the way back the root counts as larger by its mean over the image
        return StraightThrough.apply(
            mean / (spread + spread.detach().mean((1, 2, 3), keepdim=True)), direction.detach()
        )


def per_image(values: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1), to be multiplied with images."""
    return values.view(-1, 1, 1, 1)
