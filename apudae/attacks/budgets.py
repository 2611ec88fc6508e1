"""How an attack and its size are called: "bim" at the data set's ε, "bim@5/255" or "cw@inf" at another."""

import math

from ..names import split_number


def parse_spec(spec: str) -> tuple[str, float | None]:
    """The attack and the ε that `spec` names, None where it names none: ("bim", 5/255) of "bim@5/255"."""
    return split_number(spec, "ε", "bim@5/255, bim@0.02 or cw@inf")


def name_among(attack: str, epsilon: float, usual: float) -> str:
    """How that attack at that ε is called where `usual` is the ε of all: by its name alone if they agree."""
    return attack if math.isnan(epsilon) or abs(epsilon - usual) < 1e-6 else spec_of(attack, epsilon)


def spec_of(attack: str, epsilon: float) -> str:
    """How that attack at that ε is called: in 255ths where it is a whole number of them."""
    levels = 255 * epsilon
    if math.isfinite(levels) and abs(levels - round(levels)) < 1e-4 and round(levels) % 51:  # .2, .4, … read better so
        return f"{attack}@{round(levels)}/255"
    return f"{attack}@{epsilon:g}"
