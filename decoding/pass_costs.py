"""v(M): what a pass of M rows costs, against a pass of one row. Measured once per model and machine.

A pass of few rows reads the weights once, as a pass of one row does, so it costs hardly more; how many rows are "few"
depends on the model, the machine and the threads. That number decides whether speculation pays, so it is measured.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from torchweld.codegen.cache import Cache, CacheError, JsonValue, make_key
from torchweld.codegen.probe import measured_target
from torchweld.decoding.step_model import DecodingError, Fingerprinted, StepModel

ROWS: Final = (1, 2, 4, 5, 8, 9, 12, 13, 16, 32)
"""Rows that are measured; between them the cost is taken as linear. Kernels work on tiles of 4 rows: 8 cost what 5
cost, and 9 a step more."""
PAST: Final = 32
"""Positions behind which they are measured."""
MOST_SECONDS: Final = 2.0
"""After this long a measurement ends with the rounds it has, at least two."""
ROUNDS: Final = 8


@dataclass(frozen=True)
class PassCosts:
    """seconds[i] is what a pass of rows[i] rows takes; rows ascend from 1."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        whole = len(self.rows) == len(self.seconds) and self.rows[:1] == (1,)
        if not ascending or not whole or not all(seconds > 0.0 for seconds in self.seconds):
            raise DecodingError(
                f"costs of {self.rows} rows are {self.seconds}; expected rows ascending from 1 and a time above 0 each"
            )

    def ratio(self, rows: int) -> float:
        """v(rows): cost of a pass of so many rows against one row, linear between and beyond what was measured."""
        return self._at(rows) / self.seconds[0]

    def _at(self, rows: int) -> float:
        if len(self.rows) == 1:
            return self.seconds[0] * rows
        right = next((i for i, known in enumerate(self.rows) if known >= rows), len(self.rows) - 1)
        right = max(1, right)
        left = right - 1
        slope = (self.seconds[right] - self.seconds[left]) / (self.rows[right] - self.rows[left])
        if rows > self.rows[-1]:
            slope = max(slope, 0.0)
        return self.seconds[left] + slope * (rows - self.rows[left])


def measure_costs(
    model: StepModel, rows: Sequence[int] = ROWS, clock: Callable[[], float] = time.perf_counter
) -> PassCosts:
    """Time passes of so many rows behind a short text; the model is left with an empty text.

    The rounds are interleaved and the least time of each counts, so that a busy machine disturbs little.
    """
    past = PAST if model.max_length is None else max(1, min(PAST, model.max_length - max(rows)))
    rows = [count for count in rows if model.max_length is None or past + count <= model.max_length]
    if not rows:
        raise DecodingError(
            f"the model holds {model.max_length} positions; measuring its passes needs at least 2"
        )
    model.prefill([[i % model.vocab_size for i in range(past)]])
    for count in rows:  # kernels for that many rows are built at their first use
        _seconds(model, count, past, clock)
    least = dict.fromkeys(rows, float("inf"))
    begin = clock()
    for number in range(ROUNDS):
        for count in rows:
            least[count] = min(least[count], _seconds(model, count, past, clock))
        if number >= 1 and clock() - begin > MOST_SECONDS:
            break
    model.truncate(0)
    # More rows never cost less: what says so is noise.
    seconds: list[float] = []
    for count in rows:
        seconds.append(max([least[count], *seconds[-1:]]))
    return PassCosts(tuple(rows), tuple(max(value, 1e-9) for value in seconds))


def _seconds(model: StepModel, rows: int, past: int, clock: Callable[[], float]) -> float:
    ids = torch.tensor([[i % model.vocab_size for i in range(rows)]])
    begin = clock()
    model.step(ids, logits_for="all")
    seconds = clock() - begin
    model.truncate(past)
    return seconds


# Costs belong to a model object; a model that cannot be recognized in another process is still measured only once.
_MEASURED: weakref.WeakKeyDictionary[StepModel, PassCosts] = weakref.WeakKeyDictionary()


def costs_of(model: StepModel, cache: Cache | None = None) -> PassCosts:
    """The costs of this model on this machine: remembered, read from the cache folder, or measured and kept.

    Measuring starts the model over. cache: the folder; None means the user's.
    """
    if (known := _MEASURED.get(model)) is not None:
        return known
    digest = model.fingerprint if isinstance(model, Fingerprinted) else None
    if digest is None:
        costs = measure_costs(model)
    else:
        folder = Cache() if cache is None else cache
        target = measured_target(folder)
        machine = f"{target.name} {target.cores} {torch.get_num_threads()}"
        key = make_key("pass costs", digest, machine)
        costs = _from_json(folder.get_json(key)) or _measure_and_store(model, folder, key)
    _MEASURED[model] = costs
    return costs


def _measure_and_store(model: StepModel, folder: Cache, key: str) -> PassCosts:
    costs = measure_costs(model)
    try:
        folder.put_json(
            key, {"rows": list(costs.rows), "seconds": list(costs.seconds)}, {"kind": "pass costs"}
        )
    except CacheError:
        pass  # then they are measured again in the next process
    return costs


def _from_json(value: JsonValue) -> PassCosts | None:
    """Costs as they were stored; None where there are none or they are damaged."""
    if not isinstance(value, dict):
        return None
    rows, seconds = value.get("rows"), value.get("seconds")
    if not isinstance(rows, list) or not isinstance(seconds, list):
        return None
    whole = [count for count in rows if isinstance(count, int)]
    times = [float(second) for second in seconds if isinstance(second, int | float)]
    if len(whole) != len(rows) or len(times) != len(seconds):
        return None
    try:
        return PassCosts(tuple(whole), tuple(times))
    except DecodingError:
        return None
