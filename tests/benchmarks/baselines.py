"""What the defenses cost: milliseconds an image of APuDAE's A, MagNet's reformer and Defense-GAN, as ratios in one run.

    python tests/benchmarks/baselines.py [images] [repeats]

Defense-GAN has the paper's parameters (10 restarts, 200 steps) and is timed at the shipped width and at the original
one, 64, with random weights, which cost the same. Prints a table and writes rows to data/results/benchmarks.csv.
"""

import sys
from functools import partial

import torch
from rows import keep, time_row, timings

import apudae
from apudae.baselines import DefenseGAN, Generator
from apudae.datasets import take


def main(n: int = 50, repeats: int = 3) -> None:
    x, y = take(apudae.load_dataset("mnist5k", "test"), n)
    x = apudae.attacks.pgd(apudae.load_model("mnist/classifier"), x, y, epsilon=0.1)
    defenses = {name: apudae.Purifier(apudae.load_model("mnist/dae"), name) for name in ("A", "direct")}
    defenses["magnet"] = torch.no_grad()(apudae.load_model("mnist/magnet"))
    shipped = apudae.load_model("mnist/generator")
    generators = {f"defense_gan, width {shipped.width}": shipped, "defense_gan, width 64": Generator()}
    defenses |= {name: DefenseGAN(generator) for name, generator in generators.items()}
    found = timings({name: partial(defense, x) for name, defense in defenses.items()}, repeats)
    keep([time_row("baselines", name, times, n, dataset="mnist5k") for name, times in found.items()])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
