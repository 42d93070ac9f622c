"""One source of choices for two uses: a seed (fast, reproducible) or a hypothesis `draw` (shrinks)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from hypothesis import strategies as st

_Item = TypeVar("_Item")


class Chooser(Protocol):
    """Choices that shrink towards 0, False and the first item."""

    def integer(self, low: int, high: int) -> int:
        """Return an integer with low <= it <= high."""
        ...


class RandomChooser:
    """Choices of a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


class DrawChooser:
    """Choices of hypothesis, through the `draw` of a composite strategy."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))


def pick(chooser: Chooser, items: Sequence[_Item]) -> _Item:
    """Return one of `items`, which are ordered from simple to odd."""
    return items[chooser.integer(0, len(items) - 1)]


def chance(chooser: Chooser, percent: int) -> bool:
    """Return True in `percent` of 100 cases; shrinks to False."""
    return chooser.integer(0, 99) >= 100 - percent
