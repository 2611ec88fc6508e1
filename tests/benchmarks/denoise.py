"""PSNR of autoencoders beside scikit-image's denoisers, on photographs of bsds500/test with Gaussian noise.

    python tests/benchmarks/denoise.py [images] [checkpoint ...]

The classical denoisers are told how strong the noise is, the autoencoder is not, unless its name ends in @, as
"pretrained:ffdnet@" does, or it was trained on that noise. Prints a table and writes rows to
data/results/benchmarks.csv: the mean over the images, in dB, with its 95 % interval (normal approximation).
"""

import math
import sys
from collections.abc import Callable
from functools import partial

import torch
from rows import keep
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torch import Tensor, nn

import apudae
from apudae import files
from apudae.datasets import take
from apudae.evaluation.results import Stopwatch


def denoisers(checkpoints: tuple[str, ...], size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of one image (1, 3, height, width), by library and name."""
    patch = {"patch_size": 5, "patch_distance": 6, "fast_mode": True}  # scikit-image's own example
    noise_std = size / 255
    # h and weight: of five values each the best in the mean on three photographs of bsds500/val
    nl_means = partial(denoise_nl_means, h=0.6 * noise_std, sigma=noise_std, channel_axis=2, **patch)
    total_variation = partial(denoise_tv_chambolle, weight=noise_std, channel_axis=2)
    found = {"none": nn.Identity()}
    found |= {name: apudae.load_model(f"{name}{size}/255" if name.endswith("@") else name) for name in checkpoints}
    for name, function in {"nl_means": nl_means, "tv_chambolle": total_variation}.items():
        found[f"scikit-image {name}"] = partial(_on_array, function)
    return found


def _on_array(function: Callable, x: Tensor) -> Tensor:
    return torch.from_numpy(function(x[0].movedim(0, 2).numpy())).movedim(2, 0)[None]


def main(n: int = 30, *checkpoints: str) -> None:
    x, _ = take(apudae.load_dataset("bsds500", "test"), n)
    rows = []
    for size in (15, 25, 50):
        noisy = x + size / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(size))
        for name, denoise in denoisers(checkpoints or ("imagenet/unet",), size).items():
            with torch.no_grad(), Stopwatch() as watch:
                clean = torch.cat([denoise(image[None]).clamp(0, 1) for image in noisy])
            psnr = -10 * (clean - x).square().flatten(1).mean(1).log10()
            half = 1.96 * psnr.std().item() / math.sqrt(n)
            figures = {"psnr": psnr.mean().item(), "ci_low": psnr.mean().item() - half}
            figures["ci_high"] = psnr.mean().item() + half
            about = {"benchmark": "denoise test", "name": f"σ = {size}/255", "library": name, "dataset": "bsds500"}
            about |= {"n": n, "ms_per_image": round(1000 * watch.seconds / n, 1), "device": "cpu"}
            figures = {key: round(value, 3) for key, value in figures.items()}
            rows.append(about | figures | {"seed": size, "threads": torch.get_num_threads(), **files.provenance()})
            print(f"σ = {size}/255 {name:26s} {psnr.mean():6.2f} ± {half:.2f} dB", flush=True)
    keep(rows)


if __name__ == "__main__":
    main(*(int(word) if word.isdigit() else word for word in sys.argv[1:]))
