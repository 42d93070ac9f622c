"""How a cost grows: the exponent of x in t = a * x^e, found by least squares over the logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """Times at growing sizes, in seconds per step or call.

    roofline: what the machine's ceilings say.  pure: the same, with the time of a pure read of as many bytes, measured
    beside each size; empty where there is none.
    """

    sizes: tuple[float, ...]
    measured: tuple[float, ...]
    roofline: tuple[float, ...]
    pure: tuple[float, ...] = ()

    @property
    def limit(self) -> tuple[float, ...]:
        """The times that the measured ones are held against: those with a pure read where there are any."""
        return self.pure or self.roofline

    @property
    def exponent(self) -> float | None:
        """Of the measured times; None with fewer than two sizes."""
        return exponent(self.sizes, self.measured)

    @property
    def limit_exponent(self) -> float | None:
        """Of the limit."""
        return exponent(self.sizes, self.limit)

    @property
    def ratio(self) -> float | None:
        """Measured time at the largest size over that at the smallest, divided by the limit's ratio."""
        if len(self.sizes) < 2:
            return None
        return (self.measured[-1] / self.measured[0]) / (self.limit[-1] / self.limit[0])


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """e of t = a * x^e. None with fewer than two different sizes; ValueError unless all are positive and paired."""
    if len(sizes) != len(times):
        raise ValueError(f"{len(sizes)} sizes and {len(times)} times: expected one time for each size")
    if any(not value > 0 for value in (*sizes, *times)):
        raise ValueError("sizes and times must be positive: a logarithm is taken of them")
    if len(set(sizes)) < 2:
        return None
    xs, ys = [math.log(x) for x in sizes], [math.log(t) for t in times]
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - middle_x) ** 2 for x in xs)
