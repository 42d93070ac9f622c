"""The thread team of the CPU executables, from Python: one team per process and size, rebuilt after a fork."""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from torchweld.codegen.cache import Cache
from torchweld.codegen.toolchain import compile_shared, load

MOST_ARGUMENTS: Final = 512
"""The greatest number of buffers of one launch (team.cpp)."""


class LaunchRecord(ctypes.Structure):
    """`tw_launch` of team.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("arguments", ctypes.c_int32),
        ("solo", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class PiecesRecord(ctypes.Structure):
    """tw_pieces of team.cpp: a batch in `count` pieces."""

    _fields_ = (
        ("last", ctypes.c_void_p), ("tables", ctypes.c_void_p), ("of_piece", ctypes.c_void_p),
        ("of_thread", ctypes.c_void_p), ("slots", ctypes.c_int64), ("count", ctypes.c_int64), ("next", ctypes.c_int64),
    )  # fmt: skip


@dataclass
class Team:
    """`threads` threads, the caller among them. One run at a time; callers wait for each other."""

    threads: int
    cache: Cache
    _library: ctypes.CDLL = field(init=False)
    _handle: int | None = field(init=False, default=None)
    _owner: int = field(init=False, default=-1)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Compile and load the runtime. Raises ToolchainError."""
        source = (Path(__file__).parent / "team.cpp").read_text(encoding="utf-8")
        flags = ("-fno-exceptions", "-fno-rtti", "-pthread")
        path = compile_shared(source, cache=self.cache, flags=flags, name="team")
        library = load(path, ("tw_team_new", "tw_run", "tw_run_pieces"))
        library.tw_team_new.restype = ctypes.c_void_p
        library.tw_team_new.argtypes = (ctypes.c_int64,)
        library.tw_run.restype = ctypes.c_int64
        library.tw_run.argtypes = (
            *[ctypes.c_void_p] * 2,
            ctypes.c_int64,
            *[ctypes.c_void_p] * 2,
            ctypes.c_int64,
        )
        library.tw_run_pieces.restype = ctypes.c_int64
        library.tw_run_pieces.argtypes = (*library.tw_run.argtypes, ctypes.c_void_p)
        self._library = library

    def run(
        self,
        launches: ctypes.Array[LaunchRecord],
        values: int,
        scratch: int,
        scratch_stride: int,
        pieces: PiecesRecord | None = None,
    ) -> int:
        """Run the launches in order; the number of the first that met an illegal index, or -1.

        values: address of the pointer table. scratch: address of `threads` pieces of `scratch_stride` bytes.
        pieces: of a batch; the threads run each of them alone.
        """
        with self._lock:
            if self._owner != os.getpid():
                # The threads of a forked process stayed behind; what they left in memory is not touched.
                self._owner = os.getpid()
                self._handle = self._library.tw_team_new(self.threads) if self.threads > 1 else None
            args = (ctypes.addressof(launches), len(launches), values, scratch, scratch_stride)
            if pieces is None:
                return int(self._library.tw_run(self._handle, *args))
            return int(self._library.tw_run_pieces(self._handle, *args, ctypes.addressof(pieces)))

    def forget_lock(self) -> None:
        """In a child process: a lock that another thread of the parent held would never be released."""
        self._lock = threading.Lock()


_teams: dict[int, Team] = {}
_teams_lock = threading.Lock()


def shared_team(threads: int, cache: Cache) -> Team:
    """The process's team of that size; executables share it, so that no two teams compete for the cores."""
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    with _teams_lock:
        if threads not in _teams:
            _teams[threads] = Team(threads, cache)
        return _teams[threads]


def _after_fork() -> None:
    global _teams_lock
    _teams_lock = threading.Lock()
    for team in _teams.values():
        team.forget_lock()


os.register_at_fork(after_in_child=_after_fork)
