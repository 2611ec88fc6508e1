"""Denoisers of other libraries as autoencoders: told the noise, any height and width; not in the paper."""

from typing import Any

from torch import Tensor, nn

from ..contracts import check_noise_std
from .autoencoders import Autoencoder, reflected


class Denoiser(Autoencoder):
    """`network(x, σ)` as an autoencoder: images (n, channels, H, W) in [0, 1] to denoised ones of the same shape.

    `noise_std`, σ of the noise that it is to take off (in [0, 1] pixels, at most 1), is fixed here, and the network is
    told it once an image, (n,). Sides that are no multiples of `multiple` are continued by reflection.
    """

    def __init__(self, network: nn.Module, noise_std: float, channels: int = 3, multiple: int = 1) -> None:
        super().__init__("denoiser", channels)
        check_noise_std(noise_std)
        self.network, self.noise_std, self.multiple = network, noise_std, multiple

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.denoised(reflected(x, self.multiple))[..., : x.shape[2], : x.shape[3]]

    def denoised(self, x: Tensor) -> Tensor:
        """What is left of images whose sides fit."""
        return self.network(x, x.new_full((len(x),), self.noise_std))


class OneStepDiffusion(Denoiser):
    """One denoising step of a diffusion model, the engine of Carlini et al. 2023 ("(Certified!!) …").

    `network(x_t, t).sample` predicts the noise ε of x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε, images x_0 in [−1, 1];
    `alphas_cumprod`, (T,), is ᾱ. An image with noise σ, scaled to [−1, 1] and by √ᾱ_t, is such an x_t at the step t
    whose √(1 − ᾱ_t)/√ᾱ_t is nearest 2σ. ValueError for a σ beyond the last step's.
    """

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor, noise_std: float) -> None:
        config: Any = network.config
        super().__init__(network, noise_std, config.in_channels, 2 ** (len(config.block_out_channels) - 1))
        alphas = alphas_cumprod.double()
        ratios = (1 / alphas - 1).sqrt()
        if 2 * noise_std > ratios.max():
            raise ValueError(f"σ is {noise_std:g}; this diffusion model knows noise up to {ratios.max() / 2:.3g}")
        self.timestep = int((ratios - 2 * noise_std).abs().argmin())
        self.signal, self.noise = alphas[self.timestep].sqrt().item(), (1 - alphas[self.timestep]).sqrt().item()

    def denoised(self, x: Tensor) -> Tensor:
        scaled = self.signal * (2 * x - 1)
        predicted = self.network(scaled, self.timestep).sample[:, : self.channels]  # some predict a variance, too
        # Carlini et al. clip this; here, as for every autoencoder, `purify` does, and the gradient does not vanish
        return ((scaled - self.noise * predicted) / self.signal + 1) / 2
