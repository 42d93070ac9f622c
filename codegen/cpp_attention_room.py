"""The memory of an AttentionPart in C++: scratch of each thread, and what its threads share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import sympy
import torch

from torchweld.codegen.cpp_attention_keys import AttentionKeys
from torchweld.codegen.cpp_operand import padded
from torchweld.codegen.cpp_packed import FEW_ROWS, Precision
from torchweld.codegen.cpp_text import KernelNames
from torchweld.codegen.ir import AttentionPart, Kernel
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


class AttentionRoom(AttentionKeys):
    """What the printer of a part allocates; `paired`: with copies in bfloat16 for many rows."""

    def __init__(
        self, kernel: Kernel, names: KernelNames, part: AttentionPart, place: int, precision: Precision
    ) -> None:
        super().__init__(kernel, names, part, place)
        depth, features = self.attend.d.extent, part.feature.extent
        whole = depth.is_Integer and features.is_Integer and depth % 32 == 0 and features % 16 == 0
        stored = self.keys_stored is None or self.keys_stored.format in ("F32", "F16", "BF16")
        self.paired = bool(precision != "f32" and self.real == torch.float32 and whole and stored)

    def _allocate(self, name: str, count: Expr) -> None:
        self._allocate_as(self.kind, self.real.itemsize, name, count)

    def _allocate_as(self, kind: str, itemsize: int, name: str, count: Expr) -> None:
        self.lines.append(f"{kind}* const {name} = ({kind}*)(scratch + {self._text(self.scratch)});")
        self.scratch = sympy.expand(self.scratch + padded(count * itemsize, torch.uint8))

    def _room_for_pairs(self) -> None:
        """Copies in bfloat16, of rows in whole tiles of 32."""
        depth, features, rows = self.attend.d.extent, self.part.feature.extent, self._whole_rows()
        self._allocate_as("uint16_t", 2, "q_half", depth * rows)
        self._allocate_as("uint16_t", 2, "weights_half", sympy.Integer(KEYS * rows))
        self._allocate_as("uint8_t", 1, "key_pairs", depth * 2 * KEYS)
        self._allocate_as("uint8_t", 1, "value_pairs", features * 2 * KEYS)
        self._allocate("mixed", features * rows)
        self._allocate("half_scores", sympy.Integer(KEYS * rows))
        queries = self._text(self.part.t.extent)
        self.lines.append(f"const bool half = tw_has_paired_attention() && {queries} > {FEW_ROWS};")

    def _whole_rows(self) -> int:
        return -(-self.rows // 32) * 32

    def _room(self) -> None:
        depth, width = padded(self.attend.d.extent, self.real), padded(self.part.feature.extent, self.real)
        self.lines.append(f"const int64_t d_stride = {self._text(depth)};")
        self.lines.append(f"const int64_t f_stride = {self._text(width)};")
        self._allocate("q_rows", depth * self.rows)
        self._allocate("scores", sympy.Integer(self._whole_rows() * KEYS))
        self._allocate("turned", sympy.Integer(_PASS * KEYS))
        self._allocate("joined", width * self.rows)
        self._allocate("outputs", width * self.rows)
        if self.keys_stored is None:
            self._allocate("k_rows", depth * KEYS)
        if self.values_stored is None:
            self._allocate("v_rows", width * KEYS)
        if self.paired:
            self._room_for_pairs()

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
