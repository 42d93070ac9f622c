"""Name the nearest valid name when a user mistypes one. Needs no torch: the command line starts fast."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnknownNameError(ValueError):
    """A name that does not exist: `kind` says of what ("pass"), `nearest` is the valid name closest to it."""

    def __init__(self, kind: str, name: str, valid: Iterable[str], place: str = "") -> None:
        self.kind, self.name = kind, name
        self.nearest = nearest(name, valid)
        where = f"{place}: " if place else ""
        super().__init__(where + _sentence(kind, name, self.nearest))


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like `name`, however far it is; None only if there is no valid name.

    Letters in common decide, as difflib counts them, without regard to case and to - against _.
    """
    plain = {candidate.lower().replace("-", "_"): candidate for candidate in sorted(valid)}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1, cutoff=0.0)
    return plain[found[0]] if found else None


def check_name(kind: str, name: str, valid: Iterable[str], place: str = "") -> str:
    """`name` itself if it is valid, else UnknownNameError with the nearest valid one."""
    names = tuple(valid)
    if name not in names:
        raise UnknownNameError(kind, name, names, place)
    return name


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """The sentence that says so, for errors that are raised by others."""
    return _sentence(kind, name, nearest(name, valid))


def _sentence(kind: str, name: str, candidate: str | None) -> str:
    advice = f"the nearest valid one is {candidate!r}" if candidate else f"there is no valid {kind} here"
    return f"unknown {kind} {name!r}; {advice}"
