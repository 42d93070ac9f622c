"""The memory of an AttentionPart in C++: scratch of each thread, and what its threads share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import sympy

from torchweld.codegen.cpp_attention_rows import AttentionRows
from torchweld.codegen.cpp_operand import padded
from torchweld.graph.index import FloorDiv
from torchweld.graph.terms import Expr

KEYS, SPLIT = 64, 128  # tw_keys, tw_split
_PASS: Final = 64  # tw_pass
_MOST_UNITS: Final = 128  # tw_most_units


@dataclass(frozen=True)
class SharedRoom:
    """Memory that all threads see, needed where tiles are fewer than twice the threads.

    It begins with 8 KiB of counters, which are zero at first and after every run; then come the results of the splits
    of every tile.  units: the number of tiles.  unit_bytes: the room for the results of one.
    """

    units: Expr
    unit_bytes: Expr

    def nbytes(self, value: Callable[[Expr], int], threads: int) -> int:
        """Bytes for the sizes that `value` knows; 0 where every thread has tiles of its own."""
        units = value(self.units)
        few = 0 < units <= _MOST_UNITS and units < 2 * threads
        return 64 * _MOST_UNITS + units * value(self.unit_bytes) if few and threads > 1 else 0


class AttentionRoom(AttentionRows):
    """What the printer of a part allocates."""

    def _room(self) -> None:
        depth, width = padded(self.attend.d.extent, self.real), padded(self.part.feature.extent, self.real)
        self.lines.append(f"const int64_t d_stride = {self._text(depth)};")
        self.lines.append(f"const int64_t f_stride = {self._text(width)};")
        self._allocate("q_rows", depth * self.rows)
        self._allocate("scores", sympy.Integer(self.rows * KEYS))
        self._allocate("turned", sympy.Integer(_PASS * KEYS))
        self._allocate("joined", width * self.rows)
        self._allocate("outputs", width * self.rows)
        if self.keys_stored is None:
            self._allocate("k_rows", depth * KEYS)
        if self.values_stored is None:
            self._allocate("v_rows", width * KEYS)

    def _most_splits(self) -> Expr:
        """Splits that the rows of a tile see at most: they see no more than all keys, and start in different places."""
        return FloorDiv(self.attend.s.extent + self.attend.t_extent, sympy.Integer(SPLIT)) + 2

    def _units(self) -> Expr:
        tiles = FloorDiv(self.part.t.extent + self.queries - 1, sympy.Integer(self.queries))
        for axis in self.part.batch[:-1]:
            tiles = tiles * axis.extent
        return (
            tiles * FloorDiv(self.part.batch[-1].extent, sympy.Integer(self.share))
            if self.part.batch
            else tiles
        )

    def _shared(self) -> SharedRoom:
        state = padded(self.part.feature.extent, self.real) * self.real.itemsize + 64
        return SharedRoom(self._units(), state * self.rows * self._most_splits())
