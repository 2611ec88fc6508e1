"""Attacks: pure functions `attack(model, x, y, *, epsilon, …) -> x_adv`, by name in `ATTACKS`.

Every attack keeps |x_adv − x| ≤ `epsilon` per pixel and x_adv in [0, 1] (up to one rounding of the images' dtype),
leaves the model's weights, gradients and mode alone, keeps device and dtype, and raises ValueError for input that
breaks the contracts of `apudae`. Only gradients of the input are computed. `seed` is an integer or a CPU
`torch.Generator`. Another attack: a function in a module of this folder, and its name in `ATTACKS`.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..contracts import check_known
from ..datasets import look_up
from .autoattack import apgd, autoattack, fab, square
from .budgets import name_among, parse_spec, spec_of
from .common import project
from .counter_attack import ClassifierWithReconstructionError, counter_attack_b, joint
from .gradient_sign import bim, fgsm, pgd, r_fgsm, random
from .minimum_norm import cw, deepfool

ATTACKS: dict[str, Callable[..., Tensor]] = {
    attack.__name__: attack
    for attack in (random, fgsm, r_fgsm, bim, pgd, cw, deepfool, autoattack, square, apgd, fab, counter_attack_b, joint)
}

# paper: parameters of CW and DeepFool not said; here: DeepRobust's, which the paper used, but for CW's learning rate
# (`cw`); AutoAttack and Square are not in the paper and have their authors' own. Tables show these attacks by default
PARAMETERS: dict[str, dict[str, Any]] = {
    "random": {},
    "fgsm": {},
    "r_fgsm": {},
    "bim": {},
    "pgd": {},
    "cw": {"confidence": 1e-4, "steps": 1000, "initial_c": 1e-2, "search_steps": 5, "learning_rate": 5e-3},
    "deepfool": {"steps": 50, "overshoot": 0.02, "classes": 10},
    "autoattack": {"version": "standard"},
    "square": {"queries": 5000},
}
STEPPING = ("bim", "pgd")  # whose step size is the data set's α
UNBOUNDED = ("cw@inf", "deepfool@inf")  # before they are clipped to the ε-ball


def attack_settings(dataset: str, specs: Iterable[str] = (), epsilon: float = 0.0) -> dict[str, dict[str, Any]]:
    """The parameters of each of `specs` on a data set ("clean" has none); by default of all that its tables show.

    ε is the data set's own, `epsilon` where that is not 0, or the one that a name ends in: "bim@5/255", "cw@inf". α is
    the data set's own or, where it has none, ε/8. ValueError for an attack that is unknown, and for a data set that has
    no ε of its own where none is given.
    """
    budget = look_up(dataset).budget
    if budget is None and not epsilon:
        raise ValueError(f"{dataset} has no ε of its own; give epsilon, in [0, 1] pixels, such as 0.0314 (8/255)")
    further = [spec_of("bim", size) for size in (budget.further if budget else ())]
    found: dict[str, dict[str, Any]] = {}
    for spec in specs or [*PARAMETERS, *UNBOUNDED, *further]:
        attack, own = parse_spec(spec)
        check_known("attack", attack, ["clean", *ATTACKS])
        size = own if own is not None else epsilon or budget.epsilon
        step = {"step_size": budget.step_size if budget else size / 8} if attack in STEPPING else {}
        found[spec] = {} if attack == "clean" else {"epsilon": size} | step | PARAMETERS.get(attack, {})
    return found


__all__ = [
    *ATTACKS,
    "ATTACKS",
    "PARAMETERS",
    "ClassifierWithReconstructionError",
    "attack_settings",
    "name_among",
    "parse_spec",
    "project",
    "spec_of",
]
