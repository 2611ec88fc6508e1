"""Denoising autoencoders (section 2.1) and the reconstruction error that purification lowers (section 2.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batching import in_batches
from ..contracts import check_images, check_modules, check_noise_std, check_whole, frozen


class Autoencoder(nn.Module):
    """What the autoencoders share: images (n, channels, H, W) in [0, 1] to denoised images of the same shape.

    The buffers `recon_mu` and `recon_sigma` hold mean and standard deviation of the reconstruction error of clean
    images (Eq. 2), NaN until `calibrate` measures them. `output`, the last layer, starts at zero. A network that
    `reads_noise` has channels for its σ (in [0, 1] pixels): `noise_std`, where `forward` is given no other.
    """

    recon_mu: Tensor
    recon_sigma: Tensor
    reads_noise = False
    noise_std: float

    def __init__(self, name: str, channels: int, **sizes: int) -> None:
        super().__init__()
        check_whole(1, channels=channels, **sizes)
        self.architecture = {"name": name, "channels": channels, **sizes}
        self.channels = channels
        self.register_buffer("recon_mu", torch.tensor(torch.nan))
        self.register_buffer("recon_sigma", torch.tensor(torch.nan))

    def end_with(self, output: nn.Conv2d | nn.ConvTranspose2d) -> None:
        """Make `output` the last layer."""
        # paper: initial weights not said; here: the last layer starts at zero, so that training starts at the identity
        self.output = output
        output.weight.data.zero_()
        output.bias.data.zero_()

    def told(self, noise_std: float) -> None:
        """Tell the network another σ, to which μ and σ of the error no longer belong. ValueError unless it reads it."""
        if not self.reads_noise:
            raise ValueError(
                f"this {self.architecture['name']} has no channels for the noise: it cannot be told {noise_std!r}"
            )
        check_noise_std(noise_std)
        self.architecture["noise_std"] = self.noise_std = float(noise_std)
        self.recon_mu.fill_(torch.nan)
        self.recon_sigma.fill_(torch.nan)

    def with_noise(self, blocks: Tensor, noise_std: Tensor | None) -> Tensor:
        """`blocks` (n, …, h, w) behind channels that hold `noise_std` (n, 1, 1, 1), or where it is None the fixed one.

        As they are for a network that does not read it. ValueError for a `noise_std` that it does not read, or of
        another shape.
        """
        if noise_std is not None and (not self.reads_noise or noise_std.shape != (len(blocks), 1, 1, 1)):
            needed = f"({len(blocks)}, 1, 1, 1)" if self.reads_noise else "none, as this network does not read it"
            raise ValueError(f"noise_std has shape {tuple(noise_std.shape)}; needed: {needed}")
        if not self.reads_noise:
            return blocks
        told = blocks.new_full((), self.noise_std) if noise_std is None else noise_std.to(blocks)
        return torch.cat([told.expand(len(blocks), self.channels, *blocks.shape[2:]), blocks], 1)

    def check(self, x: Tensor) -> None:
        """Raise ValueError for images that do not fit this network."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"images have shape {tuple(x.shape)}; this autoencoder needs (n, {self.channels}, height, width)"
            )
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype:
            raise ValueError(f"images are {x.dtype}, this autoencoder is {dtype}; needed: the same")


class DAE(Autoencoder):
    """The autoencoder of Fig. 1; its output is ≥ 0.

    `depth` (the figure's N: 5 for MNIST, 15 for CIFAR-10) convolutions and as many deconvolutions, all 3×3 with `width`
    features, the first and the last with stride 2; every second encoder output is added to its mirror in the decoder.
    """

    def __init__(self, channels: int = 1, depth: int = 5, width: int = 64) -> None:
        super().__init__("dae", channels, depth=depth, width=width)
        features = [channels] + [width] * depth
        self.encoder = nn.ModuleList(
            _block(nn.Conv2d(before, width, 3, 2 if i == 0 else 1, 1), width) for i, before in enumerate(features[:-1])
        )
        self.decoder = nn.ModuleList(_block(nn.ConvTranspose2d(width, width, 3, 1, 1), width) for _ in range(depth - 1))
        self.end_with(nn.ConvTranspose2d(width, channels, 3, 2, 1, output_padding=1))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        height, width = x.shape[2:]
        odd = width % 2 or height % 2  # stride 2 needs even sides
        padded = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate") if odd else x
        h, skips = padded, []
        for i, block in enumerate(self.encoder, start=1):
            h = block(h)
            if i % 2 == 0 and i < len(self.encoder):
                skips.append(h)
        for i, block in enumerate(self.decoder, start=1):
            h = block(h)
            if (len(self.encoder) - i) % 2 == 0 and skips:
                h = F.relu(h + skips.pop())
        return F.relu(self.output(h) + padded)[..., :height, :width]


def _block(convolution: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(width))


class UNet(Autoencoder):
    """The U-Net of Laine et al. 2019, the paper's network for ImageNet: `depth` poolings (5) and `width` features (48).

    On the way down one 3×3 convolution a scale (two on the first); on the way up the next finer scale's features, at
    last the image itself, are concatenated and two convolutions of 2·`width` features follow; three 1×1 convolutions
    end it. LeakyReLU of slope 0.1 throughout. Sides that are no multiples of 2^`depth` are continued by reflection.
    """

    def __init__(self, channels: int = 3, depth: int = 5, width: int = 48) -> None:
        super().__init__("unet", channels, depth=depth, width=width)
        wide = 2 * width
        self.first = _leaky(channels, width)
        self.down = nn.ModuleList(_leaky(width, width) for _ in range(depth))
        self.bottom = _leaky(width, width)
        joined = [wide] + [wide + width] * (depth - 2) + [wide + channels] if depth > 1 else [width + channels]
        self.up = nn.ModuleList(nn.Sequential(_leaky(features, wide), _leaky(wide, wide)) for features in joined)
        self.head = nn.Sequential(_leaky(wide, wide, 1), _leaky(wide, wide, 1))
        self.end_with(nn.Conv2d(wide, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        height, width = x.shape[2:]
        h = padded = reflected(x, 2 ** len(self.down))
        skips, h = [padded], self.first(padded)
        for block in self.down:
            h = F.max_pool2d(block(h), 2)
            skips.append(h)
        skips.pop()
        h = self.bottom(h)
        for block in self.up:
            h = block(torch.cat([F.interpolate(h, scale_factor=2.0), skips.pop()], 1))
        # paper (Laine et al.): the last layer's output alone; here: it is added to the image and starts at zero
        # (`end_with`), because in first trials that learned about ten times faster
        return (padded + self.output(self.head(h)))[..., :height, :width]


def _leaky(before: int, after: int, size: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, size, padding=size // 2)
    nn.init.kaiming_normal_(convolution.weight, a=0.1)
    convolution.bias.data.zero_()
    return nn.Sequential(convolution, nn.LeakyReLU(0.1))


class ResidualUNet(Autoencoder):
    """A U-Net of residual blocks behind a pixel-unshuffle, made to denoise small colour images; not in the paper.

    The image's 2×2 blocks become channels (as in FFDNet, Zhang et al. 2018); then `depth` scales of `width`,
    2·`width`, … features, two blocks (x + conv(ReLU(conv(x)))) a scale on the way down and two on the way up, 2×2
    strided convolutions between the scales, skips added, no normalisation (as in DRUNet, Zhang et al. 2021). Every
    block and the network start as the identity. (3 channels, depth 3, width 64): 4,178,572 weights.
    With a `noise_std` the network is told the noise as a map, as FFDNet is.
    """

    def __init__(self, channels: int = 3, depth: int = 3, width: int = 64, noise_std: float = 0.0) -> None:
        super().__init__("residual_unet", channels, depth=depth, width=width)
        if noise_std:
            self.reads_noise = True
            self.told(noise_std)
        features = [width * 2**scale for scale in range(depth)]
        self.first = nn.Conv2d((5 if noise_std else 4) * channels, width, 3, padding=1)
        self.down = nn.ModuleList(_residual_pair(wide) for wide in features)
        self.coarser = nn.ModuleList(nn.Conv2d(wide, 2 * wide, 2, 2) for wide in features[:-1])
        self.finer = nn.ModuleList(nn.ConvTranspose2d(2 * wide, wide, 2, 2) for wide in features[:-1])
        self.up = nn.ModuleList(_residual_pair(wide) for wide in features[:-1])
        self.end_with(nn.Conv2d(width, 4 * channels, 3, padding=1))

    def forward(self, x: Tensor, noise_std: Tensor | None = None) -> Tensor:
        self.check(x)
        height, width = x.shape[2:]
        padded = reflected(x, 2 ** len(self.down))
        h, skips = self.first(self.with_noise(F.pixel_unshuffle(padded, 2), noise_std)), []
        for blocks, coarser in zip(self.down, [*self.coarser, None], strict=True):
            h = blocks(h)
            if coarser is not None:
                skips.append(h)
                h = coarser(h)
        for blocks, finer in zip(reversed(self.up), reversed(self.finer), strict=True):
            h = blocks(finer(h) + skips.pop())
        return (padded + F.pixel_shuffle(self.output(h), 2))[..., :height, :width]


class _Residual(nn.Module):
    """x + conv(ReLU(conv(x))), the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        self.second.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def _residual_pair(width: int) -> nn.Sequential:
    return nn.Sequential(_Residual(width), _Residual(width))


class FFDNet(Autoencoder):
    """FFDNet (Zhang, Zuo, Zhang 2018): a denoiser of photographs that is told the noise; not in the paper.

    The 2×2 blocks of the image become channels; `noise_std`, the noise that it is to take off (in [0, 1] pixels),
    comes as further ones; `depth` 3×3 convolutions of `width` features give the noise, which is subtracted.
    """

    reads_noise = True

    def __init__(self, noise_std: float = 0.1, channels: int = 3, depth: int = 12, width: int = 96) -> None:
        super().__init__("ffdnet", channels, depth=depth, width=width)
        check_whole(2, depth=depth)
        self.told(noise_std)
        inner = [
            layer
            for _ in range(depth - 2)
            for layer in (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        ]
        first = nn.Conv2d(5 * channels, width, 3, padding=1, bias=False)
        last = nn.Conv2d(width, 4 * channels, 3, padding=1, bias=False)
        self.layers = nn.Sequential(first, nn.ReLU(), *inner, last)

    def forward(self, x: Tensor, noise_std: Tensor | None = None) -> Tensor:
        self.check(x)
        height, width = x.shape[2:]
        padded = reflected(x, 2)
        noise = F.pixel_shuffle(self.layers(self.with_noise(F.pixel_unshuffle(padded, 2), noise_std)), 2)
        return (padded - noise)[..., :height, :width]


def reflected(x: Tensor, multiple: int) -> Tensor:
    """`x` continued below and to the right by reflection, as often as needed, to sides that are multiples."""
    for dimension in (2, 3):
        size = x.shape[dimension]
        if missing := -size % multiple:
            period = max(1, 2 * (size - 1))
            index = torch.arange(size + missing, device=x.device) % period
            x = x.index_select(dimension, torch.minimum(index, period - index))
    return x


def check_output(x: Tensor, output: Tensor) -> Tensor:
    """`output`, what an autoencoder makes of the images `x`. ValueError where it has another shape."""
    if not isinstance(output, Tensor) or output.shape != x.shape:
        given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise ValueError(f"the autoencoder's output has {given}; needed: that of the images, {tuple(x.shape)}")
    return output


def squared_distance(x: Tensor, output: Tensor) -> Tensor:
    """dist(X, Y) = (X − Y)² of Eq. 2, summed over C·H·W: (n,)."""
    # paper: sum or mean not said; here: the sum, as in the authors' script
    check_output(x, output)
    difference = (x - output).to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 has too few digits for a sum
    return difference.square().flatten(1).sum(1)


def recon_error(dae: nn.Module, x: Tensor) -> Tensor:
    """Reconstruction error Recon(X) = (X − DAE(X))² of each image (section 2.2): (n,), differentiable in `x`.

    Raises ValueError for images that break the contract or do not fit the autoencoder.
    """
    check_images(x)
    with frozen(dae):
        return squared_distance(x, dae(x))


def with_calibration(dae: nn.Module) -> nn.Module:
    """The network, with the buffers that `calibrate` fills, NaN, where it has none."""
    check_modules(dae)
    for name in ("recon_mu", "recon_sigma"):
        if not hasattr(dae, name):
            place = next(iter([*dae.parameters(), *dae.buffers()]), torch.empty(0)).device
            dae.register_buffer(name, torch.tensor(torch.nan, device=place))
    return dae


@torch.no_grad()
def calibrate(dae: nn.Module, images: Tensor, batch_size: int = 32) -> None:
    """Store mean and standard deviation of the reconstruction error of `images` in the autoencoder's buffers.

    `images` must be training images that no weight was fitted on; never test images. Any network that reconstructs
    images will do. ValueError for fewer than two images, and for images whose errors are all the same.
    """
    check_images(images)
    check_whole(1, batch_size=batch_size)
    if len(images) < 2:
        raise ValueError(f"{len(images)} images given; calibration needs at least 2")
    with_calibration(dae)
    device = dae.recon_mu.device
    errors = in_batches(lambda batch: recon_error(dae, batch.to(device)), images, batch_size=batch_size)
    if not 0 < errors.std() < torch.inf:
        raise ValueError(
            f"the errors of {len(images)} images have mean {errors.mean():g} and deviation {errors.std():g}; "
            "needed: a deviation that is finite and above 0, so images that differ"
        )
    dae.recon_mu.copy_(errors.mean())
    dae.recon_sigma.copy_(errors.std())
