"""Take turns, count samples, say how much they spread.

A shared machine changes its speed within seconds. So competitors never run one after the other but in turns
(A B A B ...): each meets the same machine, and a slow minute hits all of them. Reported are the median, and as
spread half the distance between the quartiles, which one bad sample does not move.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Some samples of one quantity, in its unit. spread: half the distance between the quartiles."""

    median: float
    spread: float
    mean: float
    std: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Outcome:
    """What one competitor did: its samples in the order of the rounds, and why it stopped (None if it did not)."""

    samples: tuple[float, ...]
    failure: str | None = None


def summarize(samples: Sequence[float]) -> Summary:
    """Median, spread, mean and standard deviation of at least one finite sample; ValueError otherwise."""
    if not samples:
        raise ValueError("no samples to summarize: expected at least one")
    if not all(math.isfinite(sample) for sample in samples):
        raise ValueError(f"samples must be finite numbers, got {list(samples)}")
    ordered = sorted(samples)
    return Summary(
        median=statistics.median(ordered),
        spread=(_quantile(ordered, 0.75) - _quantile(ordered, 0.25)) / 2,
        mean=statistics.fmean(ordered),
        std=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        low=ordered[0],
        high=ordered[-1],
        count=len(ordered),
    )


def _quantile(ordered: Sequence[float], at: float) -> float:
    """Linear between the two nearest, as numpy does by default."""
    place = at * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def interleave(
    runs: Mapping[str, Callable[[], float]], rounds: int, pause: float = 0.0
) -> dict[str, Outcome]:
    """Call every run once per round, in the given order; each returns its own sample.

    A run that raises is out from then on, with its reason; the others go on. pause: seconds before each turn.
    Raises ValueError for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    samples: dict[str, list[float]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            if name in failures:
                continue
            time.sleep(pause)
            try:
                samples[name].append(run())
            except Exception as error:  # a competitor may fail in any way; the run must not be lost
                failures[name] = one_line(error)
    return {name: Outcome(tuple(samples[name]), failures.get(name)) for name in runs}


def seconds_per_call(call: Callable[[], object], least_seconds: float, most_calls: int = 10_000) -> float:
    """Mean seconds of a call, over as many calls as fill `least_seconds` (at least one)."""
    start = time.perf_counter()
    count = 0
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= least_seconds or count >= most_calls:
            return max(elapsed, 1e-9) / count


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of `repeats` calls: what the machine can do when nothing disturbs it."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: expected at least 1")
    return min(seconds_per_call(call, 0.0) for _ in range(repeats))


def one_line(error: BaseException, limit: int = 200) -> str:
    """The kind and the first line of a message, cut at `limit` characters."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0].strip()}".rstrip(": ")
    return text if len(text) <= limit else text[: limit - 1] + "…"
