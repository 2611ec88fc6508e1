"""Images per second of every variant against a plain reference and against the floor, as ratios in one run.

    python tests/benchmarks/purify.py [images] [repeats]

- authors' loop: what the authors' script does: torch.optim.Adam on an additive perturbation, autograd through the
  autoencoder with weight gradients on, every image in every step.
- floor: the autoencoder's convolutions alone, each forward and for the gradient of its input, as often as there are
  steps.
- n = 5: five steps of .03 in place of fifteen of .01, which end as near (held-out digits, LOG.md).
- channels-last: an autoencoder whose weights have that layout (`dae.to(memory_format=torch.channels_last)`).
- compiled: torch.compile, at one shape.
- bfloat16, where the processor has it: the same under torch.autocast.

`labels_agree`, of A and B in their other forms: the share of images that are read as after fifteen steps in float32.
Prints a table and writes rows to data/results/benchmarks.csv.
"""

import copy
import sys
from dataclasses import replace
from functools import partial

import torch
from rows import keep, time_row, timings
from torch import Tensor, nn

import apudae
from apudae.contracts import frozen
from apudae.datasets import take
from apudae.evaluation.accuracy import predict
from apudae.models import DAE, calibrate


def reference(dae: nn.Module, x: Tensor, steps: int = 15, step_size: float = 0.01) -> Tensor:
    delta = torch.zeros_like(x, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=step_size)
    for _ in range(steps):
        optimizer.zero_grad()
        dae.zero_grad()
        (x + delta - dae(x + delta)).square().sum().backward()
        optimizer.step()
    return (x + delta).detach().clamp(0, 1)


def convolutions(dae: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Every convolution of the autoencoder with an input as it sees one."""
    found, kinds = [], (nn.Conv2d, nn.ConvTranspose2d)
    hooks = [
        part.register_forward_hook(lambda layer, inputs, _: found.append((layer, inputs[0].detach().clone())))
        for part in dae.modules()
        if isinstance(part, kinds)
    ]
    with torch.no_grad():
        dae(x)
    for hook in hooks:
        hook.remove()
    return found


def floor(layers: list[tuple[nn.Module, Tensor]], steps: int = 15) -> None:
    with frozen(*(layer for layer, _ in layers)):
        for _ in range(steps):
            for layer, at in layers:
                torch.autograd.grad(layer(at.requires_grad_()).sum(), at)


def in_bfloat16(dae: nn.Module, x: Tensor, config: str | apudae.PurifyConfig) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return apudae.purify(dae, x, config)


def forms(dae: nn.Module, x: Tensor) -> dict[str, partial]:
    """A and B in fewer steps, in another layout, compiled, in bfloat16."""
    few = {name: replace(apudae.PRESETS[name], steps=5, step_size=0.03) for name in "AB"}
    last = copy.deepcopy(dae).to(memory_format=torch.channels_last)
    found = {f"{name}, n = 5": partial(apudae.purify, dae, x, config) for name, config in few.items()}
    found["A, channels-last"] = partial(apudae.purify, last, x, "A")
    found["A, compiled"] = partial(apudae.purify, torch.compile(dae, dynamic=False), x, "A")
    if torch.cpu.get_capabilities().get("avx512_bf16"):
        found |= {f"{name}, bfloat16": partial(in_bfloat16, dae, x, name) for name in ("direct", "A", "B")}
        found |= {f"{name}, n = 5, bfloat16": partial(in_bfloat16, dae, x, config) for name, config in few.items()}
    return found


def scenes(n: int) -> dict[str, tuple[nn.Module, Tensor, Tensor, str]]:
    """Autoencoder, images to purify, a stream that is nine tenths clean, and the classifier's checkpoint ("": none)."""
    x, y = take(apudae.load_dataset("mnist5k", "test"), n)
    attacked = apudae.attacks.pgd(apudae.load_model("mnist/classifier"), x, y, epsilon=0.1)
    stream = torch.where((torch.arange(n) % 10 == 0)[:, None, None, None], attacked, x)
    torch.manual_seed(0)
    colour, pictures = DAE(3, 15, 64).eval(), torch.rand(max(n // 8, 2), 3, 32, 32)
    nn.init.normal_(colour.output.weight, std=0.02)
    calibrate(colour, pictures)
    colour.recon_mu *= 0.5  # all of these pictures are "attacked"
    large, _ = take(apudae.load_dataset("photographs", "test"), 2)
    small = nn.functional.interpolate(large, 32, mode="area").repeat(max(n // 16, 1), 1, 1, 1)
    return {
        "mnist": (apudae.load_model("mnist/dae"), attacked, stream, "mnist/classifier"),
        "3x32x32": (colour, pictures, pictures, ""),
        "cifar10 residual U-Net": (apudae.load_model("cifar10/residual_unet_10"), small, small, "cifar10/resnet18"),
        "photographs": (apudae.load_model("imagenet/unet"), large, large, "imagenet/efficientnet_lite0"),
    }


def main(n: int = 200, repeats: int = 5) -> None:
    rows = []
    for scene, (dae, attacked, stream, classifier) in scenes(n).items():
        others = {
            "authors' loop": partial(reference, dae, attacked),
            "floor": partial(floor, convolutions(dae, attacked)),
        }
        calls = {name: partial(apudae.purify, dae, attacked, name) for name in apudae.PRESETS}
        if scene == "mnist":
            calls["E, nine tenths clean"] = partial(apudae.purify, dae, stream, "E")
        calls |= forms(dae, attacked)
        made = {name: call() for name, call in calls.items()}  # before the clock runs: the first call compiles
        compared = [name for name in made if classifier and name.split(",")[0] in ("A", "B")]
        read = {name: predict(apudae.load_model(classifier), made[name]) for name in compared}
        for name, times in timings(others | calls, repeats).items():
            about = {"name": "all variants", "library": name} if name in others else {}
            about |= {"labels_agree": (read[name] == read[name[0]]).double().mean().item()} if name in read else {}
            rows.append(time_row("purify", name, times, len(attacked), dataset=scene) | about)
    keep(rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
