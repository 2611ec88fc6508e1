"""Parts of a purification step: randomness for each image, G's transform, Adam's moments, what an attacker sees."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contracts import check_whole
from .dae import squared_distance


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


def in_halves(function: Callable[..., Tensor], *tensors: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`function(*tensors)`; a batch too large for the memory is halved, `generator` set back, and tried again."""
    state = None if generator is None else generator.get_state()
    size = len(tensors[0])
    try:
        return function(*tensors)
    except RuntimeError as error:  # the CPU's has no class of its own
        short = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not short or size == 1:
            raise
    warnings.warn(f"a batch of {size} images does not fit into memory: trying its halves", stacklevel=4)
    if generator is not None:
        generator.set_state(state)
    halves = zip(*(tensor.split((size + 1) // 2) for tensor in tensors), strict=True)
    return torch.cat([in_halves(function, *half, generator=generator) for half in halves])


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


class StraightThrough(torch.autograd.Function):
    """The value of `purified`, the gradient of `seen` (BPDA)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, seen: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, above: Tensor) -> tuple[Tensor, None]:
        return above, None


class Recomputed(torch.autograd.Function):
    """`function(x)`, a tuple, of which the graph keeps only `x`: the backward pass runs it again (checkpointing)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, function: Callable, x: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x.detach(), graph=False)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *above: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            outputs = ctx.function(x, graph=True)
        return None, torch.autograd.grad(outputs, x, above)[0]


def clipped(x: Tensor) -> Tensor:
    """`x` in [0, 1]; on the way back as if it were not clipped."""
    return StraightThrough.apply(x, x.detach().clamp(0, 1))


def smooth_sign(gradients: Tensor) -> Tensor:
    """sign(g); on the way back tanh(g / 8s), s the mean of |g| over an image."""
    scale = 8 * gradients.detach().abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradients.dtype).tiny)
    return StraightThrough.apply(torch.tanh(gradients / scale), gradients.detach().sign())


class BPDA(nn.Module):
    """The images of `purifier`, any module, with the gradient of `stand_in` or the identity (Athalye et al. 2018)."""

    def __init__(self, purifier: nn.Module, stand_in: nn.Module | None = None) -> None:
        super().__init__()
        self.purifier, self.stand_in = purifier, stand_in or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(self.stand_in(x), self.purifier(x).detach())


class EOT(nn.Module):
    """The mean logits of `samples` draws of a random `model`: expectation over transformation (Athalye et al. 2018)."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()
        check_whole(1, samples=samples)
        self.model, self.samples = model, samples

    def extra_repr(self) -> str:
        return f"samples={self.samples}"

    def forward(self, x: Tensor) -> Tensor:
        draws = torch.stack([self.model(x) for _ in range(self.samples)])
        return draws[0] + (draws - draws[0]).mean(0)  # so that equal draws give themselves, bit for bit


class FixedNoise(nn.Module):
    """`model`, with the random numbers of `purifier`, a part of it, the same in each call."""

    def __init__(self, model: nn.Module, purifier: nn.Module) -> None:
        super().__init__()
        self.model, self.generator, self.state = model, purifier.generator, purifier.generator.get_state()

    def forward(self, x: Tensor) -> Tensor:
        self.generator.set_state(self.state)
        return self.model(x)


class Quantised(nn.Module):
    """A defense known to be broken, to try attackers on: images in `levels` grey values; rounding has no gradient."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        check_whole(2, levels=levels)
        self.levels = levels

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def forward(self, x: Tensor) -> Tensor:
        return (x * (self.levels - 1)).round() / (self.levels - 1)


class Watched(nn.Module):
    """`classifier`, and beside it the reconstruction error of an image, `errors(x)`: what counter-attack B attacks."""

    def __init__(self, classifier: nn.Module, dae: nn.Module) -> None:
        super().__init__()
        self.classifier, self.dae = classifier, dae

    def errors(self, x: Tensor) -> Tensor:
        """dist of each image (n,), differentiable."""
        return squared_distance(x, self.dae(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)
