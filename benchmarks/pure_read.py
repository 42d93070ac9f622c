"""How long a pure read of so many bytes takes, again and again: the limit of a step that reads as many.

    with PureRead(nbytes, threads=2) as read:
        read.passes(5)          # seconds of each of 5 passes, after one that is not counted

A buffer that fits into the last-level cache is read from there, as the weights and the cache of a short text are in
decoding. One speed for all sizes would be a limit that small working sets beat and large ones never reach. The buffer
lies on huge pages, and every thread, pinned to a core, reads its own part in the better of two patterns.
"""

from __future__ import annotations

import ctypes
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final

from torchweld.codegen.cache import Cache
from torchweld.codegen.packing import huge_pages
from torchweld.codegen.probe import describe_machine
from torchweld.codegen.probe_source import PROBE_SOURCE
from torchweld.codegen.toolchain import compile_shared, load

_HUGE_PAGE: Final = 2 << 20
_PATTERNS: Final = (1, 4)
"""Streams that a thread reads side by side."""


class PureRead:
    """A buffer of `nbytes` and the threads that read it. ToolchainError without a C++ compiler."""

    def __init__(self, nbytes: int, threads: int) -> None:
        if nbytes < 1 or threads < 1:
            raise ValueError(f"a read of {nbytes} bytes by {threads} threads: expected at least one of each")
        self._cpus = describe_machine().cpus[:threads]
        source = compile_shared(PROBE_SOURCE, cache=Cache(), flags=("-ffp-contract=fast",), name="probe")
        self._library = load(source, ("probe_read",))
        self._nbytes = nbytes
        self._share = -(-nbytes // len(self._cpus) // _HUGE_PAGE) * _HUGE_PAGE
        self._buffer = huge_pages(self._share * len(self._cpus)).fill_(1)
        self._pool = ThreadPoolExecutor(len(self._cpus))
        self._team = ctypes.create_string_buffer(4 * 64)
        self._pattern = min(_PATTERNS, key=lambda streams: statistics.median(self._read(streams, 3)))

    def __enter__(self) -> PureRead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def passes(self, count: int) -> list[float]:
        """Seconds of so many passes behind one that brings back what fits into the caches.

        Every thread reads whole huge pages; the time is that of the part that was asked for.
        """
        part = self._nbytes / (self._share * len(self._cpus))
        return [part * seconds for seconds in self._read(self._pattern, count + 1)[1:]]

    def _read(self, streams: int, count: int) -> list[float]:
        base = self._buffer.data_ptr()
        team = ctypes.c_void_p(-(-ctypes.addressof(self._team) // 64) * 64)
        ctypes.c_int.from_address((team.value or 0) + 128).value = len(self._cpus)

        def run(index: int) -> Sequence[int]:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {self._cpus[index]})  # of this thread of the pool only
            nanoseconds = (ctypes.c_long * count)()
            data = ctypes.c_void_p(base + index * self._share)
            self._library.probe_read(team, data, ctypes.c_long(self._share), streams, count, nanoseconds)
            return list(nanoseconds)

        slowest = map(max, zip(*self._pool.map(run, range(len(self._cpus))), strict=True))
        return [1e-9 * nanoseconds for nanoseconds in slowest]
