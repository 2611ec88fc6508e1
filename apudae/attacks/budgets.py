"""How much each attack may do: its parameters by one word, "bim" at the data set's ε or "bim@5/255" at another."""

import math
from collections.abc import Iterable
from typing import Any

from ..contracts import check_known
from ..datasets import look_up

# paper: parameters of CW and DeepFool not said; here: DeepRobust's, which the paper used, but for CW's learning rate
# (`cw`); AutoAttack and Square are not in the paper and have their authors' own
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
    """The parameters of each of `specs` on a data set, "clean" none; of all that stand for it in tables by default.

    ε is the data set's own, `epsilon` where that is not 0, or the one that a name ends in: "bim@5/255", "cw@inf".
    ValueError for an attack that is unknown, and for a data set that has no ε of its own where none is given.
    """
    budget = look_up(dataset).budget
    if budget is None and not epsilon:
        raise ValueError(f"{dataset} has no ε of its own; give epsilon, in [0, 1] pixels, such as 0.0314 (8/255)")
    further = [spec_of("bim", size) for size in (budget.further if budget else ())]
    found: dict[str, dict[str, Any]] = {}
    for spec in specs or [*PARAMETERS, *UNBOUNDED, *further]:
        attack, own = parse_spec(spec)
        if attack == "clean":
            found[spec] = {}
            continue
        check_known("attack", attack, ["clean", *PARAMETERS])
        size = own if own is not None else epsilon or budget.epsilon
        step = {"step_size": budget.step_size if budget else size / 8} if attack in STEPPING else {}
        found[spec] = {"epsilon": size} | step | PARAMETERS[attack]
    return found


def parse_spec(spec: str) -> tuple[str, float | None]:
    """The attack and the ε that `spec` names, None where it names none: ("bim", 5/255) of "bim@5/255"."""
    attack, mark, text = spec.partition("@")
    if not mark:
        return attack, None
    numerator, _, denominator = text.partition("/")
    try:
        return attack, float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{spec!r} names no ε; needed: such as bim@5/255, bim@0.02 or cw@inf") from error


def spec_of(attack: str, epsilon: float) -> str:
    """How that attack at that ε is called: in 255ths where it is a whole number of them."""
    levels = 255 * epsilon
    if math.isfinite(levels) and abs(levels - round(levels)) < 1e-4 and round(levels) % 51:  # .2, .4, … read better so
        return f"{attack}@{round(levels)}/255"
    return f"{attack}@{epsilon:g}"
