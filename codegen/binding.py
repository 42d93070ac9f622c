"""What follows from the sizes of a call: where intermediate values lie, the records of its launches, how it is cut.

What the caller gets is never in the arena; nor is what an eager step reads, since such a step may return a view of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from torchweld.codegen.batches import BatchSplitter, Pieces, PiecesRun, has_batch
from torchweld.codegen.cpp import PrintedKernel
from torchweld.codegen.ir import Kernel
from torchweld.codegen.library_runs import LibraryLaunch, LibraryRuns, Segment
from torchweld.codegen.plan import EagerStep, Launch, Plan, SizeTable, ValueSpec, Work
from torchweld.codegen.plan_memory import ALIGNMENT, Lifetime, MemoryPlan, plan_memory
from torchweld.codegen.runtime.team import LaunchRecord

# Element operations, about 3 us: less than a barrier and a cold cache on a second core.
_SOLO_WORK: Final = 16384


@dataclass(frozen=True)
class Binding:
    """What follows from the sizes: places, launch records, and the arrays that the records point to."""

    table: SizeTable
    memory: MemoryPlan
    segments: tuple[ctypes.Array[LaunchRecord] | EagerStep | LibraryLaunch, ...]
    launches: tuple[tuple[Launch, ...], ...]
    scratch_stride: int
    shared_bytes: tuple[int, ...]
    fresh_shapes: tuple[tuple[int, ...], ...]
    arena_bytes: int
    pieces: PiecesRun | None
    kept: tuple[object, ...]


@dataclass(frozen=True)
class PreparedLaunch:
    """A launch as far as it does not depend on sizes."""

    kernel: Kernel
    function: int
    slots: ctypes.Array[ctypes.c_int32]
    arguments: int
    work: tuple[Work, ...]

    def fill(self, record: LaunchRecord, sizes: ctypes.Array[ctypes.c_int64], solo: int) -> None:
        """Make `record` one launch at these sizes; solo: by one thread."""
        record.kernel, record.slots = self.function, ctypes.addressof(self.slots)
        record.sizes, record.arguments = ctypes.addressof(sizes), self.arguments
        record.solo = solo


class Binder:
    """Binds a compiled plan to sizes.

    slots: the place of every value in the table of pointers; behind them come `shared` places of memory that all
    threads see.
    functions, prepared: of every launch.  few: rows of a product up to which it has an arithmetic of its own.
    """

    def __init__(
        self, plan: Plan, slots: Mapping[str, int], shared: int, functions: Sequence[PrintedKernel],
        prepared: Sequence[PreparedLaunch], library: LibraryRuns, threads: int, few: int,
    ) -> None:  # fmt: skip
        self._plan, self._slots, self._shared, self._functions = plan, slots, shared, functions
        self._prepared, self._library, self._threads = prepared, library, threads
        self.fresh = _fresh_values(plan)
        self._arena_values = _arena_values(plan, self.fresh)
        self._splitter = BatchSplitter(plan, threads, few)

    def bind(self, table: SizeTable, in_pieces: bool = True) -> Binding:
        """What follows from the sizes; in_pieces: a batch may go through the launches piece by piece."""
        idle = {id(launch) for launch in self._plan.launches() if self._writes_nothing(launch, table)}
        prepared = [
            p
            for p, launch in zip(self._prepared, self._plan.launches(), strict=True)
            if id(launch) not in idle
        ]
        groups = tuple(_without(self._library.segments(table), idle))
        own = not any(isinstance(group, LibraryLaunch) for group in groups)
        cut = None
        if in_pieces and own:
            cut = self._splitter.split(table, lambda sizes: self._memory(sizes).arena_bytes)
        at_once = table if cut is None else cut.table
        memory = self._memory(at_once)
        sizes: dict[int, ctypes.Array[ctypes.c_int64]] = {}
        segments: list[ctypes.Array[LaunchRecord] | EagerStep | LibraryLaunch] = []
        following = iter(prepared)
        for group in groups:
            if isinstance(group, tuple):
                segments.append(self._records([next(following) for _ in group], at_once, sizes))
                continue
            if isinstance(group, LibraryLaunch):
                next(following)  # its record is not needed
            segments.append(group)
        arena_bytes = memory.arena_bytes
        pieces: PiecesRun | None = None
        last_sizes: dict[int, ctypes.Array[ctypes.c_int64]] = {}
        if cut is not None:
            stride = -(-arena_bytes // 4096) * 4096 + ALIGNMENT
            pieces = self._pieces(cut, stride, self._records(prepared, cut.last, last_sizes))
            arena_bytes = stride * self._threads
        room = max((at_once(expr) for f in self._functions for expr in f.scratch), default=0)
        # Whole pages and one line more: the threads' pieces must not fall on the same cache sets.
        stride = -(-room // 4096) * 4096 + ALIGNMENT
        rooms = [0] * self._shared
        for function in self._functions:
            for number, need in enumerate(function.shared):
                rooms[number] = max(rooms[number], need.nbytes(at_once, self._threads))
        launches = tuple(group if isinstance(group, tuple) else () for group in groups)
        fresh, kept = tuple(map(table.shape, self.fresh)), (*sizes.values(), *last_sizes.values())
        return Binding(
            table, memory, tuple(segments), launches, stride, tuple(rooms), fresh, arena_bytes, pieces, kept
        )

    def _writes_nothing(self, launch: Launch, table: SizeTable) -> bool:
        """Whether all that it writes is empty at these sizes, as the end of a step that nobody asked for."""
        return all(0 in table.shape(self._plan.values[name]) for name in launch.written())

    def _memory(self, table: SizeTable) -> MemoryPlan:
        """The places of intermediate values."""
        values = [
            Lifetime(s.name, prod(table.shape(s)) * s.dtype.itemsize, a, b) for s, a, b in self._arena_values
        ]
        return plan_memory(values)

    def _records(
        self,
        prepared: Sequence[PreparedLaunch],
        table: SizeTable,
        sizes: dict[int, ctypes.Array[ctypes.c_int64]],
    ) -> ctypes.Array[LaunchRecord]:
        """The launches for some sizes; the arrays of sizes that they point to are added to `sizes`, by kernel."""
        records = (LaunchRecord * len(prepared))()
        solo: dict[int, int] = {}
        for record, launch in zip(records, prepared, strict=True):
            key = id(launch.kernel)
            if key not in sizes:
                names = launch.kernel.sizes
                sizes[key] = (ctypes.c_int64 * max(1, len(names)))(*(table.sizes[n] for n in names))
            if key not in solo:
                solo[key] = self._threads == 1 or sum(w(table) for w in launch.work) < _SOLO_WORK
            launch.fill(record, sizes[key], solo[key])
        return records

    def _pieces(self, cut: Pieces, arena_stride: int, last: ctypes.Array[LaunchRecord]) -> PiecesRun:
        """How the threads run a batch in pieces."""
        specs = (*self._plan.inputs, *self.fresh)
        strides = {
            self._slots[spec.name]: prod(cut.table.shape(spec)) * spec.dtype.itemsize
            for spec in specs if has_batch(spec.shape, cut.name)
        }  # fmt: skip
        arena = [self._slots[spec.name] for spec, _, _ in self._arena_values]
        slots = len(self._slots) + self._shared
        return PiecesRun(cut.count, last, slots, self._threads, strides, arena, arena_stride)


def _without(groups: Iterable[Segment], idle: Collection[int]) -> Iterator[Segment]:
    """The segments without these launches (by identity)."""
    for group in groups:
        if isinstance(group, LibraryLaunch):
            if id(group.launch) not in idle:
                yield group
        elif isinstance(group, EagerStep):
            yield group
        elif kept := tuple(launch for launch in group if id(launch) not in idle):
            yield kept


def _fresh_values(plan: Plan) -> tuple[ValueSpec, ...]:
    """What launches compute and somebody else than a launch sees: outputs and what eager steps read."""
    seen = set(plan.outputs)
    for step in plan.steps:
        if isinstance(step, EagerStep):
            seen |= set(step.arguments)
    written = [name for launch in plan.launches() for name in launch.written()]
    return tuple(plan.values[name] for name in written if name in seen and name not in plan.in_place)


def _arena_values(plan: Plan, fresh: Sequence[ValueSpec]) -> tuple[tuple[ValueSpec, int, int], ...]:
    """The other values of launches with the first and the last step that needs them."""
    outside = {spec.name for spec in fresh} | set(plan.in_place)
    spans: dict[str, tuple[int, int]] = {}
    for number, step in enumerate(plan.steps):
        if not isinstance(step, Launch):
            continue
        for name in step.written():
            if name not in outside:
                spans[name] = (number, number)
        for name in step.read():
            if name in spans:
                spans[name] = (spans[name][0], number)
    return tuple((plan.values[name], first, last) for name, (first, last) in spans.items())
