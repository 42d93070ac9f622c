"""Two ways to compute the same thing, timed fairly: in turns, so that both meet the same machine.

A shared machine changes its speed by half within seconds. Timing one after the other measures that; taking
turns and comparing within each round does not. Reported are medians, and the median of the ratios per round.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torchweld.optimizer.report_tables import Column, Table


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, and the tenth and ninetieth percentile."""

    name: str
    median_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class BenchResult:
    """`ratio`: median over rounds of baseline time / our time, so 2.0 means twice as fast."""

    ours: Timing
    baseline: Timing
    ratio: float
    rounds: int

    def to_json(self) -> str:
        """Indented JSON of the fields."""
        return json.dumps(asdict(self), indent=2)

    def table(self, title: str) -> Table:
        """One line per competitor."""
        columns = (Column("", "left"), *(Column(name) for name in ("median ms", "10 %", "90 %", "speed")))
        rows = tuple(
            (t.name, f"{t.median_ms:.3f}", f"{t.low_ms:.3f}", f"{t.high_ms:.3f}", f"{speed:.2f} x")
            for t, speed in ((self.ours, self.ratio), (self.baseline, 1.0))
        )
        return Table(title, columns, rows)


def interleave(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    names: tuple[str, str] = ("torchweld", "torch eager"),
    rounds: int = 20,
    warmup: int = 2,
) -> BenchResult:
    """Call both in turns `rounds` times after `warmup` untimed calls each; who goes first alternates.

    Raises ValueError for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    for _ in range(warmup):
        ours()
        baseline()
    pairs = [_time_pair(ours, baseline, swapped=i % 2 == 1) for i in range(rounds)]
    return BenchResult(
        ours=_timing(names[0], [mine for mine, _ in pairs]),
        baseline=_timing(names[1], [other for _, other in pairs]),
        ratio=statistics.median(other / mine for mine, other in pairs),
        rounds=rounds,
    )


def _time_pair(
    ours: Callable[[], object], baseline: Callable[[], object], *, swapped: bool
) -> tuple[float, float]:
    if swapped:
        other = _seconds(baseline)
        return _seconds(ours), other
    return _seconds(ours), _seconds(baseline)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    # never 0: a clock with coarse ticks must not divide by it
    return max(time.perf_counter() - start, 1e-9)


def _timing(name: str, seconds: list[float]) -> Timing:
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    low, high = ordered[tenth], ordered[len(ordered) - 1 - tenth]
    return Timing(name, statistics.median(ordered) * 1e3, low * 1e3, high * 1e3)
