"""Defense-GAN (Samangouei et al. 2018): an image becomes the nearest one that a generator can draw."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from ..autograd import StraightThrough
from ..batching import progress
from ..contracts import as_generator, check_at_least, check_images, check_known, check_whole, frozen
from ..training.loop import Batches, Recipe, step_seed
from ..training.state import keep_training, restore_training, whose

Backward = Literal["none", "identity"]


class Generator(nn.Module):
    """Defense-GAN's generator: latents (n, 128) to grey images (n, 1, 28, 28) in [0, 1]; `width` 64 is the original."""

    latent, shape = 128, (1, 28, 28)

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        check_whole(1, width=width)
        self.architecture, self.width = {"name": "generator", "width": width}, width
        self.first = nn.Linear(self.latent, 4 * 4 * 4 * width)
        sizes = zip((4 * width, 2 * width, width), (2 * width, width, 1), strict=True)
        self.deconvolutions = nn.ModuleList(nn.ConvTranspose2d(a, b, 5, 2, 2, output_padding=1) for a, b in sizes)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.first(z)).view(-1, 4 * self.width, 4, 4)
        h = F.relu(self.deconvolutions[0](h))[..., :7, :7]
        return self.deconvolutions[2](F.relu(self.deconvolutions[1](h))).sigmoid()


class Critic(nn.Sequential):
    """The generator's opponent in training: images (n, 1, 28, 28) to scores (n, 1), high for real ones."""

    def __init__(self, width: int = 64) -> None:
        check_whole(1, width=width)
        sizes = zip((1, width, 2 * width), (width, 2 * width, 4 * width), strict=True)
        layers = [part for a, b in sizes for part in (nn.Conv2d(a, b, 5, 2, 2), nn.LeakyReLU(0.2))]
        super().__init__(*layers, nn.Flatten(), nn.Linear(4 * 4 * 4 * width, 1))


def train_gan(
    generator: Generator,
    critic: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    critic_steps: int = 5,
    penalty: float = 10.0,
    run_dir: Path | None = None,
    device: str | torch.device = "cpu",
    save_every: int = 200,
) -> list[dict[str, float]]:
    """Train a WGAN-GP (Gulrajani et al. 2017): the critic in each of the recipe's steps, the generator in every fifth.

    So `recipe.steps` is `critic_steps` times what Defense-GAN calls iterations (200,000 in the original, batches of 50,
    learning rate 1e-4, constant). Resumable as `train.fit`, and a recipe with more steps goes on from one with fewer.
    Returns the curve: step and, as loss, the mean distance critic(real) − critic(generated) since the last point.
    """
    check_whole(1, critic_steps=critic_steps)
    check_at_least(0, penalty=penalty)
    both = nn.ModuleDict({"generator": generator, "critic": critic}).to(device).train()
    # one optimiser for both: a weight without gradient keeps still, and so do its moments
    optimizer = torch.optim.Adam(both.parameters(), lr=recipe.learning_rate, betas=(0.5, 0.9))
    about = {"critic_steps": critic_steps, "penalty": penalty, "model": generator.architecture}
    identity = whose(dataset, both, **asdict(recipe) | about | {"steps": None})
    state = None if run_dir is None else Path(run_dir) / "state.safetensors"
    start, curve = restore_training(state, both, optimizer, identity)
    if start > recipe.steps:
        raise ValueError(f"{state} has {start} steps of training already; needed: a recipe of at least as many")
    batches = DataLoader(dataset, batch_sampler=Batches(len(dataset), recipe, start), collate_fn=default_collate)
    total = torch.zeros((), device=device)
    for step, (x, _) in enumerate(progress(batches, initial=start, total=recipe.steps), start=start):
        draws = torch.Generator(device).manual_seed(step_seed(recipe.seed, 1, step))
        x = x.to(device)
        z, again = (torch.randn(len(x), generator.latent, generator=draws, device=device) for _ in range(2))
        with torch.no_grad():
            made = generator(z)
        distance = critic(x).mean() - critic(made).mean()
        _update(optimizer, critic, penalty * gradient_penalty(critic, x, made, draws) - distance)
        if (step + 1) % critic_steps == 0:
            _update(optimizer, generator, -critic(generator(again)).mean())
        total += distance.detach()
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            since = step + 1 - (curve[-1]["step"] if curve else 0)
            curve.append({"step": step + 1, "loss": total.item() / since})
            total.zero_()
            keep_training(state, both, optimizer, identity, curve)
    both.eval()
    return curve


def _update(optimizer: torch.optim.Optimizer, network: nn.Module, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward(inputs=list(network.parameters()))
    optimizer.step()


def gradient_penalty(critic: nn.Module, real: Tensor, made: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of (‖∇critic(x̂)‖₂ − 1)², x̂ at a random place between each real image and a generated one."""
    share = torch.rand(len(real), 1, 1, 1, generator=generator, device=real.device)
    between = (share * real + (1 - share) * made).requires_grad_()
    (slopes,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    # original: the norm of each column of pixels; here: of the image, as Gulrajani et al. write it
    return (slopes.flatten(1).norm(dim=1) - 1).square().mean()


@dataclass(frozen=True)
class ProjectionConfig:
    """How Defense-GAN looks for the generator's nearest image: gradient descent from `restarts` latents at once."""

    restarts: int = 10
    steps: int = 200
    learning_rate: float = 10.0
    momentum: float = 0.7

    def __post_init__(self) -> None:
        check_whole(1, restarts=self.restarts, steps=self.steps)
        check_at_least(0, learning_rate=self.learning_rate, momentum=self.momentum)


class DefenseGAN(nn.Module):
    """Defense-GAN: each image becomes the generator's image that is nearest to it, argmin_z ‖G(z) − x‖².

    `backward` says what an attacker's gradient sees: "none" nothing, "identity" no defense (BPDA). `seed` fixes the
    latents that every image starts from. Raises ValueError for images of another size than the generator's.
    """

    def __init__(
        self,
        gan: Generator,
        config: ProjectionConfig | None = None,
        backward: Backward = "none",
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__()
        check_known("backward", backward, get_args(Backward))
        self.gan, self.config, self.backward = gan, config or ProjectionConfig(), backward
        # original: other latents for each image; here: the same for all, so that a result depends on the image alone
        noise = torch.randn(self.config.restarts, gan.latent, generator=as_generator(seed), device="cpu")
        # original: latents of variance 1 in training, 1/128 here; kept: the search starts near the mean image
        self.register_buffer("starts", noise / math.sqrt(gan.latent), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.config}, backward={self.backward!r}, starts={self.starts.sum():.6g}"  # tells kept batches apart

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        if x.shape[1:] != self.gan.shape:
            raise ValueError(f"images have shape {tuple(x.shape)}; this generator makes (n, 1, 28, 28)")
        with frozen(self.gan), torch.inference_mode(False):
            projected = self._projected(x.detach().clone())
            return projected if self.backward == "none" else StraightThrough.apply(x, projected)

    def _projected(self, x: Tensor) -> Tensor:
        wanted = x.repeat_interleave(len(self.starts), 0)
        z = self.starts.to(x).repeat(len(x), 1)
        velocity = torch.zeros_like(z)
        # original: a decay of the learning rate that its code never reaches, so that it is constant; here: constant
        for _ in range(self.config.steps):
            with torch.enable_grad():
                z.requires_grad_()
                error = (self.gan(z) - wanted).square().flatten(1).mean(1).sum()  # of a sum: each latent its own
                (gradient,) = torch.autograd.grad(error, z)
            velocity = self.config.momentum * velocity + gradient
            z = z.detach() - self.config.learning_rate * velocity
        # original: takes the images before the last step; here: after it
        with torch.no_grad():
            made = self.gan(z)
            nearest = (made - wanted).square().flatten(1).mean(1).view(len(x), -1).argmin(1)
            return made.view(len(x), -1, *x.shape[1:])[torch.arange(len(x), device=x.device), nearest]
