"""Attacks: pure functions `attack(model, x, y, *, epsilon, …) -> x_adv`, by name in `ATTACKS`.

Every attack keeps |x_adv − x| ≤ `epsilon` per pixel and x_adv in [0, 1] (up to one rounding of the images' dtype),
leaves the model's weights, gradients and mode alone, keeps device and dtype, and raises ValueError for input that
breaks the contracts of `apudae`. Only gradients of the input are computed. `seed` is an integer or a CPU
`torch.Generator`. Another attack: a function in a module here, its line in `ATTACKS` and one in `budgets.PARAMETERS`.
"""

from collections.abc import Callable

from torch import Tensor

from .autoattack import apgd, autoattack, square
from .budgets import attack_settings, parse_spec, spec_of
from .common import project
from .counter_attack import ClassifierWithReconstructionError, counter_attack_b
from .gradient_sign import bim, fgsm, pgd, r_fgsm, random
from .minimum_norm import cw, deepfool

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "random": random,
    "fgsm": fgsm,
    "r_fgsm": r_fgsm,
    "bim": bim,
    "pgd": pgd,
    "cw": cw,
    "deepfool": deepfool,
    "autoattack": autoattack,
    "square": square,
    "apgd": apgd,
    "counter_attack_b": counter_attack_b,
}

__all__ = [
    *ATTACKS,
    "ATTACKS",
    "ClassifierWithReconstructionError",
    "attack_settings",
    "parse_spec",
    "project",
    "spec_of",
]
