"""The purifier on one device: CIFAR-10 and photographs, float32 and bfloat16, compiled or not, with CUDA graphs or not.

    python tests/benchmarks/gpu.py [device] [data set] [images] [photographs] [repeats]

A (n = 15) and *direct* after noise, with the shipped networks. Where a data set has fewer images, they come again and
again, which costs A the same: it never rests. The floor is the operations of A's convolutions, counted, at the rate at
which this device multiplies large matrices of the same type: a floor on a GPU; on a CPU the library of convolutions can
be the faster one. Prints a table and writes rows to data/results/benchmarks.csv; `labels_agree`: the share of images
whose label is that of float32, not compiled. On a CPU: `gpu.py cpu cifar10-20 20 1 1`; no photographs: 0.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from rows import keep, time_row, timings
from torch import Tensor, nn

import apudae
from apudae.datasets import take
from apudae.evaluation.accuracy import predict
from apudae.files import ROOT

sys.path.append(str(ROOT / "workflow"))

from costs import forward_operations

STEPS, GOAL = 15, 5  # n of Eq. 2; seconds of 10,000 images of CIFAR-10 on an H100
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILED = {"": None, "compiled": "default", "compiled, CUDA graphs": "reduce-overhead"}


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the product of two large matrices; float32 as convolutions multiply (TF32 on a GPU)."""
    size = 8192 if device == "cuda" else 1024
    left, right = torch.rand(2, size, size, device=device, dtype=dtype)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    fastest = min(timings({"product": lambda: left @ right}, 10)["product"])
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / fastest


def modes(dae: nn.Module, device: str) -> Iterator[tuple[str, str, nn.Module]]:
    """Name, type and network of every way to run it."""
    for precision in TYPES:
        for how, mode in COMPILED.items():
            if device == "cuda" or "CUDA" not in how:
                network = dae if mode is None else torch.compile(dae, mode=mode)
                yield ", ".join(filter(None, [precision, how])), precision, network


def purified(dae: nn.Module, x: Tensor, config: apudae.PurifyConfig, device: str, precision: str) -> Tensor:
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        return apudae.Purifier(dae, config)(x)


def repeated(dataset: str, n: int, device: str) -> Tensor:
    source = apudae.load_dataset(dataset, "test")
    x, _ = take(source, min(n, len(source)))
    return x.repeat(-(-n // len(x)), 1, 1, 1)[:n].to(device)


def scene(dataset: str, networks: tuple[str, str], n: int, device: str, repeats: int) -> list[dict]:
    """Rows of one data set: A in every mode, and noise then direct."""
    classifier, dae = (apudae.load_model(name, device) for name in networks)
    x, rows, labels = repeated(dataset, n, device), [], None
    about = {"n": n, "device": device, "dataset": dataset}
    operations = 2 * STEPS * forward_operations(apudae.load_model(networks[1]), x.shape[1:])
    preset_a = replace(apudae.PRESETS["A"], steps=STEPS, step_size=1 / 255)
    noisy = replace(apudae.PRESETS["direct"], noise_std=0.05)
    for name, precision, network in modes(dae, device):
        run = partial(purified, network, x, preset_a, device, precision)
        read = predict(classifier, run()).cpu()  # the first call compiles, and is not timed
        labels = read if labels is None else labels
        agree = round((read == labels).float().mean().item(), 4)
        rows.append(time_row("gpu", f"A, {name}", timings({name: run}, repeats)[name], **about, labels_agree=agree))
        said = f"{dataset}: A, {name}: {rows[-1]['ms_per_image'] * n / 1000:.2f} s of {n}, {agree:.4f} of labels agree"
        print(said, flush=True)
    for precision, dtype in TYPES.items():
        run = partial(purified, dae, x, noisy, device, precision)
        rows.append(time_row("gpu", f"noise, then direct, {precision}", timings({"": run}, repeats)[""], **about))
        floor = [operations * n / matrix_rate(device, dtype)]
        rows += [
            time_row("gpu", row["name"], floor, **about, library="floor")
            for row in rows
            if row["name"].startswith(f"A, {precision}")
        ]
    return rows


def main(
    device: str = "cuda",
    dataset: str = "cifar10",
    n: int = 10_000,
    photographs: int = 100,
    repeats: int = 5,
    keep: Callable[[list[dict]], None] = keep,
) -> None:
    rows = scene(dataset, ("cifar10/resnet18", "cifar10-jpeg/residual_unet_05"), n, device, repeats)
    best = min(row["ms_per_image"] for row in rows if row["name"].startswith("A") and row["library"] == "ours")
    print(f"10,000 images of CIFAR-10, A, n = {STEPS}: {10 * best:.2f} s (goal on an H100: {GOAL})")
    if photographs:
        rows += scene("photographs", ("imagenet/efficientnet_lite0", "imagenet/unet"), photographs, device, repeats)
    keep(rows)


if __name__ == "__main__":
    main(*(int(word) if word.isdigit() else word for word in sys.argv[1:]))
