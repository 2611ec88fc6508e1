"""Images per second of every variant against a plain reference and against the floor, as ratios in one run.

    python tests/benchmarks/purify.py [images] [repeats]

- reference: what the authors' script does: torch.optim.Adam on an additive perturbation, autograd through the
  autoencoder with weight gradients on, every image in every step.
- floor: the autoencoder's convolutions alone, forward and for the gradient of the image, as often as there are steps.

Prints a table and writes rows to data/results/benchmarks.csv. `times_reference` above 1: faster than the reference;
`times_floor`: how many times the floor's time.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from attacks import keep
from torch import Tensor, nn

import apudae
from apudae import data, evaluate, files
from apudae.dae import DAE, calibrate


def reference(dae: nn.Module, x: Tensor, steps: int = 15, step_size: float = 0.01) -> Tensor:
    delta = torch.zeros_like(x, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=step_size)
    for _ in range(steps):
        optimizer.zero_grad()
        dae.zero_grad()
        (x + delta - dae(x + delta)).square().sum().backward()
        optimizer.step()
    return (x + delta).detach().clamp(0, 1)


def floor(dae: DAE, x: Tensor, steps: int = 15) -> None:
    convolutions = nn.Sequential(*(block[0] for block in [*dae.encoder, *dae.decoder]), dae.output)
    convolutions.requires_grad_(False)
    for _ in range(steps):
        at = x.detach().requires_grad_()
        torch.autograd.grad(convolutions(at).sum(), at)
    convolutions.requires_grad_(True)


def scenes(n: int) -> dict[str, tuple[DAE, Tensor, Tensor]]:
    """Autoencoder, images under PGD, and a stream that is nine tenths clean."""
    x, y = data.take(apudae.load_dataset("mnist5k", "test"), n)
    attacked = apudae.attacks.pgd(apudae.load_model("mnist/classifier"), x, y, epsilon=0.1)
    stream = torch.where((torch.arange(n) % 10 == 0)[:, None, None, None], attacked, x)
    torch.manual_seed(0)
    colour, pictures = DAE(3, 15, 64).eval(), torch.rand(max(n // 8, 2), 3, 32, 32)
    nn.init.normal_(colour.output.weight, std=0.02)
    calibrate(colour, pictures)
    colour.recon_mu *= 0.5  # all of these pictures are "attacked"
    return {"mnist": (apudae.load_model("mnist/dae"), attacked, stream), "3x32x32": (colour, pictures, pictures)}


def seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each call; in turn, so that a drift of the machine's speed meets all alike."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            with evaluate.Stopwatch() as watch:
                call()
            times[name].append(watch.seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def main(n: int = 200, repeats: int = 5) -> None:
    rows = []
    for scene, (dae, attacked, stream) in scenes(n).items():
        calls = {"reference": partial(reference, dae, attacked), "floor": partial(floor, dae, attacked)}
        calls |= {name: partial(apudae.purify, dae, attacked, name) for name in apudae.PRESETS}
        if scene == "mnist":
            calls["E, nine tenths clean"] = partial(apudae.purify, dae, stream, "E")
        found = seconds(calls, repeats)
        for name, taken in found.items():
            rows.append(
                {"benchmark": "purify", "name": name, "library": "ours", "dataset": scene, "n": len(attacked)}
                | {"repeats": repeats, "ms_per_image": round(1000 * taken / len(attacked), 4)}
                | {"times_reference": round(found["reference"] / taken, 2)}
                | {"times_floor": round(taken / found["floor"], 2), "device": "cpu"}
                | {"threads": torch.get_num_threads(), **files.provenance()}
            )
            ratios = f"{rows[-1]['times_reference']:6.2f} × reference {rows[-1]['times_floor']:6.2f} × floor's time"
            print(f"{scene:8s} {name:22s} {len(attacked) / taken:9.1f} images/s {ratios}", flush=True)
    keep(rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
