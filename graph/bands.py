"""Functions of one integer that are constant on finitely many intervals: what a positional mask is.

The integer is the distance d = query position - key position; a causal mask is False for d < 0 and True for
d >= 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Number = bool | int | float
Interval = tuple[float, float]
"""Both ends inside; the outer ends are -inf and inf."""


@dataclass(frozen=True)
class Bands:
    """Values on consecutive intervals: `starts[0]` is -inf, band i ends just before `starts[i + 1]`."""

    starts: tuple[float, ...]
    values: tuple[Number, ...]

    @staticmethod
    def constant(value: Number) -> Bands:
        """The same value everywhere."""
        return Bands((-math.inf,), (value,))

    @staticmethod
    def step(start: int, before: Number, after: Number) -> Bands:
        """`before` for d < start, `after` from there on."""
        return Bands((-math.inf, start), (before, after))

    @property
    def single(self) -> Number | None:
        """The value, if it is the same everywhere."""
        return self.values[0] if len(self.values) == 1 else None

    def at(self, distance: float) -> Number:
        """The value at one distance."""
        inside = [value for start, value in zip(self.starts, self.values, strict=True) if start <= distance]
        return inside[-1]

    def intervals(self, wanted: Callable[[Number], bool]) -> tuple[Interval, ...]:
        """Where the value is wanted, as maximal intervals."""
        found: list[Interval] = []
        ends = [start - 1 for start in self.starts[1:]] + [math.inf]
        for start, end, value in zip(self.starts, ends, self.values, strict=True):
            if not wanted(value):
                continue
            if found and found[-1][1] + 1 == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        return tuple(found)


def combine(function: Callable[..., Number], parts: Sequence[Bands]) -> Bands:
    """`function` of the values of all parts, distance by distance."""
    starts = sorted({start for part in parts for start in part.starts})
    merged_starts: list[float] = []
    values: list[Number] = []
    for start in starts:
        value = function(*(part.at(start) for part in parts))
        if values and type(value) is type(values[-1]) and value == values[-1]:
            continue
        merged_starts.append(start)
        values.append(value)
    return Bands(tuple(merged_starts), tuple(values))
