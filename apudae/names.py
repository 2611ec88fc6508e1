"""A name checked against what there is; without torch, so that a command line answers at once."""

from collections.abc import Container


def check_known(kind: str, name: str, known: Container) -> None:
    """Raise ValueError, listing what there is, unless `name` is among `known`."""
    if name not in known:
        raise ValueError(f"{kind} {name!r} is unknown; there is: {', '.join(map(str, known))}")
