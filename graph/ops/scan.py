"""Recurrences: `Scan`, what a user's torch scan becomes, and `CachedScan`, the same continued from a cache.

A body is a small graph, so neither is an op of a schema: an instance *is* the target of a call, and two instances are
two operations.  Everything that the body closes over is an argument of the call; the body holds no tensor.

Scan(body, carries, states)(initial, rows, shared)
    formula:  carry, *results = body(*carry, *(row[t] for row in rows), *shared)   for t = 0, 1, ...
    shapes:   initial[i] and carry i alike; rows[j] [S, ...]
              -> the carries of `states` as [S, ...], then results [S, ...]
Scan without initial is associative: body(*carry, *row) gives the next carry, and the first carry is the first row.

CachedScan(body, carries)(caches, rows, initial, shared, past, path)
    shapes:   caches[i] [B, 1, C, F] with carry i after every position, as it was before the new rows; rows[j]
              [B, T, ...] -> all carries as [B, 1, T, F], then results [B, T, ...].  C >= T + 1 once they are appended.
    numerics: one row of one sequence at a time, in the dtypes of the body: a row has the same bits whatever comes with
              it.  past, path and slots are those of cached_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from torchweld.graph.ops.cached_rows import check_places, parents_of

Body = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Scan:
    """See the module docstring. carries: how many; states: those of which every value is a result, in order."""

    body: Body
    carries: int
    states: tuple[int, ...]
    __name__: ClassVar[str] = "scan"

    def __str__(self) -> str:
        return "torchweld.scan"

    def __call__(
        self, initial: Sequence[Tensor], rows: Sequence[Tensor], shared: Sequence[object]
    ) -> tuple[Tensor, ...]:
        """The results; ValueError for no rows at all."""
        length = rows[0].shape[0]
        if isinstance(rows[0], FakeTensor):
            carry, results = self.first(initial, [row.select(0, 0) for row in rows], shared)
            kept = [*(carry[state] for state in self.states), *results]
            return tuple(value.new_empty((length, *value.shape)) for value in kept)
        if length == 0:
            raise ValueError("torchweld.scan: no rows; expected at least one")
        lines: list[list[Tensor]] = []
        carry = initial
        for place in range(length):
            row = [part[place] for part in rows]
            carry, results = self.next(carry, row, shared) if place else self.first(initial, row, shared)
            lines.append([*(carry[state] for state in self.states), *results])
        return tuple(torch.stack(column) for column in zip(*lines, strict=True))

    def first(
        self, initial: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[object]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(carry, results) at the first row."""
        return self.next(initial, row, shared) if initial else (row, ())

    def next(
        self, carry: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[object]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(carry, results) at a row."""
        values = self.body(*carry, *row, *shared)
        return values[: self.carries], values[self.carries :]


@dataclass(frozen=True, eq=False)
class CachedScan:
    """See the module docstring."""

    scan: Scan
    __name__: ClassVar[str] = "cached_scan"
    PATH: ClassVar[int] = 5
    """Where its arguments have the path."""

    def __str__(self) -> str:
        return "torchweld.cached_scan"

    def __call__(
        self, caches: Sequence[Tensor], rows: Sequence[Tensor], initial: Sequence[Tensor], shared: Sequence[object],
        past: Tensor, path: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The carries and the results; ValueError for arguments that are none."""
        for cache in caches:
            check_places("torchweld.cached_scan", cache, past, path)
        if len(caches) != self.scan.carries:
            raise ValueError(f"torchweld.cached_scan: {len(caches)} caches for {self.scan.carries} carries")
        batch, count = rows[0].shape[:2]
        if isinstance(rows[0], FakeTensor):
            _, results = self.scan.first(initial, [row[0, 0] for row in rows], shared)
            held = tuple(cache.new_empty((batch, 1, count, cache.shape[3])) for cache in caches)
            return *held, *(value.new_empty((batch, count, *value.shape)) for value in results)
        lines: list[list[Tensor]] = []
        for b in range(batch):
            parents = range(-1, count - 1) if path is None else parents_of(path[b]).tolist()
            start = self._start([cache[b, 0] for cache in caches], rows, initial, int(past[b]))
            lines += self._run([row[b] for row in rows], initial, shared, start, parents)
        columns = [torch.stack(column) for column in zip(*lines, strict=True)]
        kept = [column.reshape(batch, 1, count, -1) for column in columns[: len(caches)]]
        return *kept, *(part.reshape(batch, count, *part.shape[1:]) for part in columns[len(caches) :])

    def _start(
        self, caches: Sequence[Tensor], rows: Sequence[Tensor], initial: Sequence[Tensor], past: int
    ) -> list[Tensor] | None:
        """The carry of the last position of a sequence; None where there is no position."""
        if not past:
            return None
        shapes = [like.shape for like in initial] or [row.shape[2:] for row in rows]
        held = [cache[(past - 1) % cache.shape[0]] for cache in caches]
        return [flat.reshape(shape).clone() for flat, shape in zip(held, shapes, strict=True)]

    def _run(
        self, rows: Sequence[Tensor], initial: Sequence[Tensor], shared: Sequence[object],
        start: Sequence[Tensor] | None, parents: Sequence[int],
    ) -> list[list[Tensor]]:  # fmt: skip
        """Carries and results of every new row of one sequence; a root follows `start`."""
        carries: list[Sequence[Tensor]] = []
        lines: list[list[Tensor]] = []
        for place, parent in enumerate(parents):
            above = start if parent < 0 else carries[parent]
            row = [part[place] for part in rows]
            step = (
                self.scan.first(initial, row, shared) if above is None else self.scan.next(above, row, shared)
            )
            carries.append(step[0])
            lines.append([*step[0], *step[1]])
        return lines
