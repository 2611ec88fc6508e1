"""What the attack suite costs an image, for a defense and for three numbers of images and of steps each.

    python tests/benchmarks/suite.py [images] [repeats]

The `quick` budget on MNIST digits before no purifier, *direct*, A and D; A once more with half and with twice the
images and the steps: milliseconds an image that do not change with the images, and grow at most as the steps do, are
the suite's promise. An image that is broken leaves the work, so weak defenses cost less. Prints a table and writes rows
to data/results/benchmarks.csv.
"""

import sys
from functools import partial

from rows import keep, time_row, timings

import apudae
from apudae.datasets import take
from apudae.evaluation.ladder import GRAY, attack_suite, ladder
from apudae.purification import preset


def main(n: int = 40, repeats: int = 3) -> None:
    x, y = take(apudae.load_dataset("mnist5k", "test"), 2 * n)
    classifier, dae, other = (apudae.load_model(f"mnist/{name}") for name in ("classifier", "dae", "cnn"))
    suite = attack_suite(apudae.attacks.attack_settings("mnist"), "quick", [name for name in GRAY if name != "cw"])
    sizes = [(name, n, 15) for name in ("none", "direct", "A", "D")]
    sizes += [("A", n // 2, 15), ("A", 2 * n, 15), ("A", n, 8), ("A", n, 30)]
    calls = {
        (name, images, steps): partial(
            ladder, classifier, dae, preset(name, steps, 0.15 / steps), x[:images], y[:images], suite, other=other
        )
        for name, images, steps in sizes
    }
    rows = []
    for (name, images, steps), times in timings(calls, repeats).items():
        words = f"{name}, n = {steps}, {images} images" if name in "AD" else f"{name}, {images} images"
        rows.append(time_row("suite", words, times, images, dataset="mnist5k"))
    keep(rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
