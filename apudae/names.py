"""Names: checked against what there is, and with a number after an @; without torch, for a command line's sake."""

from collections.abc import Container


def check_known(kind: str, name: str, known: Container) -> None:
    """Raise ValueError, listing what there is, unless `name` is among `known`."""
    if name not in known:
        raise ValueError(f"{kind} {name!r} is unknown; there is: {', '.join(map(str, known))}")


def split_number(spec: str, what: str, example: str) -> tuple[str, float | None]:
    """The name and the number that `spec` gives after an @, None where it gives none: ("bim", 5/255) of "bim@5/255"."""
    if not isinstance(spec, str):
        raise ValueError(f"{spec!r} is no text; needed: such as {example}")
    name, mark, text = spec.partition("@")
    if not mark:
        return name, None
    numerator, _, denominator = text.partition("/")
    try:
        return name, float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{spec!r} names no {what}; needed: such as {example}") from error
