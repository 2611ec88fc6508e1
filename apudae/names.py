"""Names: checked against what there is, and with a number after an @; without torch, for a command line's sake."""

from collections.abc import Iterable
from difflib import get_close_matches

FOLDER = "folder:"  # and the path of your images, in place of a data set's name
MANY = 100  # names that a sentence may list


def check_known(kind: str, name: str, known: Iterable) -> None:
    """Raise ValueError, listing what there is (of very many the nearest), unless `name` is among `known`."""
    every = [*known]
    if name not in every:
        nearest = every if len(every) <= MANY else get_close_matches(str(name), every, 5, 0)
        beside = "" if len(every) <= MANY else f", and {len(every) - len(nearest):,} others"
        raise ValueError(f"{kind} {name!r} is unknown; there is: {', '.join(map(str, nearest))}{beside}")


def split_number(spec: str, what: str, example: str) -> tuple[str, float | None]:
    """The name and the number that `spec` gives after an @, None where it gives none: ("bim", 5/255) of "bim@5/255"."""
    if not isinstance(spec, str):
        raise ValueError(f"{spec!r} is no text; needed: such as {example}")
    name, mark, text = spec.partition("@")
    if not mark:
        return name, None
    numerator, slash, denominator = text.partition("/")
    try:
        return name, float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{spec!r} names no {what}; needed: such as {example}") from error
