"""How a cost grows: the exponent of x in t = a * x^e, found by least squares over the logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """Times at growing sizes: what was measured and what the roofline says, in seconds per step or call."""

    sizes: tuple[float, ...]
    measured: tuple[float, ...]
    roofline: tuple[float, ...]

    @property
    def exponent(self) -> float | None:
        """Of the measured times; None with fewer than two sizes."""
        return exponent(self.sizes, self.measured)

    @property
    def roofline_exponent(self) -> float | None:
        """Of the roofline."""
        return exponent(self.sizes, self.roofline)

    @property
    def ratio(self) -> float | None:
        """Measured time at the largest size over that at the smallest, divided by the roofline's ratio."""
        if len(self.sizes) < 2:
            return None
        return (self.measured[-1] / self.measured[0]) / (self.roofline[-1] / self.roofline[0])


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
