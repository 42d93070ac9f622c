"""The way of an AttentionPart in C++ for many queries with precision bf16 and int8: AMX tiles (attention_bf16.h).

    for each (batch entry, head, 32 queries):                                 the threads take turns
        for each block of 64 keys that one of them sees:
            keys and values rounded, unless a tile before left them; scores, mask, weights, values
        stores

The heads that read one key head, and the tiles of each, come one after the other and find its keys and values rounded.
"""

from __future__ import annotations

import math
from typing import Final

import sympy
import torch

from torchweld.codegen.cpp_attention_rows import AttentionRows
from torchweld.codegen.cpp_names import converted, literal
from torchweld.codegen.cpp_operand import padded
from torchweld.codegen.cpp_packed import FEW_ROWS
from torchweld.codegen.cpp_text import KernelNames, indented
from torchweld.codegen.ir import AttentionPart, Kernel
from torchweld.graph.index import FloorDiv
from torchweld.graph.terms import Expr

LANES: Final = 32  # tw_lanes
KEYS: Final = 64  # tw_keys


class TilePrinter(AttentionRows):
    """Loops over the tiles of a part; a row is a query, and all rows of a tile are of one head."""

    greatest, total = "greatest", "total"

    def __init__(self, kernel: Kernel, names: KernelNames, part: AttentionPart, place: int) -> None:
        super().__init__(kernel, names, part, place)
        self.heads_of_key = self.share
        self.share, self.queries, self.rows = 1, LANES, LANES

    def fits(self) -> bool:
        """Whether the part is one of whole tiles: floats, widths, and a block's keys the same for all queries."""
        depth, features = self.attend.d.extent, self.part.feature.extent
        whole = depth.is_Integer and features.is_Integer and depth % 32 == 0 and features % 16 == 0
        stored = self.keys_stored is None or self.keys_stored.format in ("F32", "F16", "BF16")
        return bool(
            self.real == torch.float32
            and whole
            and depth * features > 0
            and stored
            and self.attend.path is None
        )

    def wanted(self) -> str:
        """The condition in C++ under which a call goes this way."""
        return f"tw_has_tiled_attention() && {self._text(self.part.t.extent)} > {FEW_ROWS}"

    def print(self) -> tuple[list[str], Expr]:
        """The statements, and the bytes of scratch memory per thread."""
        self._room()
        queries = self._text(self.part.t.extent)
        heads = sympy.prod([axis.extent for axis in self.part.batch])
        self.lines += [
            f"const int64_t query_blocks = tw_blocks({queries}, {LANES});",
            f"const int64_t units = {self._text(sympy.expand(heads))} * query_blocks;",
            "tw_tiles_on();",
            *self._turns(),
            *indented(self._tile()),
            "}",
            "tw_tiles_off();",
        ]
        return self.lines, self.scratch

    def _turns(self) -> list[str]:
        """Which units a thread takes: causal ones grow with the query, so the threads change places after each."""
        if self.attend.mask_kind == "none":
            last = "units * (thread + 1) / threads"
            return [f"for (int64_t unit = units * thread / threads; unit < {last}; ++unit) {{"]
        return [
            "for (int64_t n = 0; n * threads < units; ++n) {",
            "    const int64_t unit = n * threads + (n % 2 ? threads - 1 - thread : thread);",
            "    if (unit >= units) continue;",
        ]

    def _room(self) -> None:
        depth, features = self.attend.d.extent, self.part.feature.extent
        wide = -(-features // 32) * 32
        width = padded(features, self.real)
        self.lines.append(f"const int64_t d_stride = {depth};")
        self.lines.append(f"const int64_t f_stride = {self._text(width)};")
        self._allocate("q_rows", depth * LANES)
        self._allocate("joined", width * LANES)
        if self.keys_stored is None:
            self._allocate("k_rows", depth * KEYS)
        if self.values_stored is None:
            self._allocate("v_rows", width * KEYS)
        if self._works_rows():
            self._allocate("mask_rows", sympy.Integer(LANES * KEYS))
        self._allocate_as("uint8_t", 1, "query_pairs", depth * 2 * LANES)
        self._allocate_as("uint8_t", 1, "weight_pairs", sympy.Integer(KEYS * 2 * LANES))
        self._allocate("scores", sympy.Integer(KEYS * LANES))
        self._allocate("sums", wide * LANES)
        # Blocks of all keys, where there are many queries; their memory is touched as far as it is needed.
        capacity = FloorDiv(self.attend.s.extent + KEYS - 1, sympy.Integer(KEYS)) + 1
        many = sympy.Min(1, FloorDiv(self.part.t.extent, sympy.Integer(FEW_ROWS + 1)))
        self._allocate_as("uint8_t", 1, "blocks", capacity * many * (64 + (depth + wide) * 2 * KEYS))
        self.lines += [
            f"tw_tile_room tile_room = {{blocks, {self._text(capacity)}, -1, 0, 0,",
            "    query_pairs, weight_pairs, scores, sums};",
        ]

    def _tile(self) -> list[str]:
        queries = self._text(self.part.t.extent)
        keys = self._text(self.attend.s.extent)
        end = keys if self.attend.past is None or self.attend.mask_kind == "none" else f"past + {queries}"
        place = self.emitter.unflatten("unit / query_blocks", self.part.batch) if self.part.batch else []
        scale = 1.0 if self._is_worked() else self.attend.scale
        depth, features = self.attend.d.extent, self.part.feature.extent
        format_ = "F32" if self.keys_stored is None else self.keys_stored.format
        return [
            f"const int64_t first_query = unit % query_blocks * {LANES};",
            f"const int64_t rows = tw_least<int64_t>({LANES}, {queries} - first_query);",
            *place,
            *self._past(),
            f"const int64_t end_key = {end};",
            f"int64_t visible_from[{LANES}], visible_to[{LANES}], first_key = -1, last_key = 0;",
            *self._visibility(),
            *self._queries(),
            *self._callbacks(),
            f"float greatest[{LANES}], total[{LANES}];",
            "const tw_query_tile tile = {q_rows, d_stride, rows, visible_from, visible_to, first_key, last_key,",
            f"    end_key, unit / query_blocks / {self.heads_of_key}, {depth}, {features},"
            f" {literal(scale * math.log2(math.e), self.real)}}};",
            f"tw_attend_tile<tw_{format_}>(tile_room, tile, point, show, work, joined, f_stride, greatest, total);",
            *self._stores(),
        ]

    def _callbacks(self) -> list[str]:
        return [
            "const auto point = [&](int64_t key, int64_t keys, const void** k_at, const float** v_at) {",
            *indented(self._pointers(self._slot_of_position())),
            "};",
            "const auto show = [&](int64_t key, float* shown) -> int64_t {",
            *indented(self._shown()),
            "};",
            "const auto work = [&](int64_t key, float* scores, const tw_tile_view& view) {",
            *indented(self._work() if self._is_worked() else []),
            "};",
        ]

    def _shown(self) -> list[str]:
        """How many keys of the block the mask hides from everybody."""
        if not self._masks_keys():
            return ["return 0;"]
        assert self.attend.mask is not None
        emitter = self._scope()
        emitter.push((self.attend.s.name,))
        emitter.line(f"shown[j] = {emitter.value(self.attend.mask)} ? 1 : 0;")
        emitter.line("hidden -= shown[j] != 0;")
        body = [f"const int64_t {emitter.axis(self.attend.s)} = key + j;", *emitter.pop()]
        return [
            *emitter.pop(),
            f"const int64_t keys = tw_least<int64_t>({KEYS}, end_key - key);",
            f"int64_t hidden = {KEYS};",
            "for (int64_t j = 0; j < keys; ++j) {",
            *indented(body),
            "}",
            f"for (int64_t j = keys; j < {KEYS}; ++j) shown[j] = 0;",
            "return hidden;",
        ]

    def _works_rows(self) -> bool:
        return self.attend.mask is not None and not self._masks_keys()

    def _is_worked(self) -> bool:
        """Whether scores need more than one factor above 0."""
        return self.attend.soft_cap > 0 or self._works_rows() or not self.attend.scale > 0

    def _work(self) -> list[str]:
        """Scale and cap of the scores, and the mask."""
        attend = self.attend
        cap, scale = literal(attend.soft_cap, self.real), literal(attend.scale, self.real)
        score = f"scores[j * {LANES} + r] * {scale}"
        capped = f"{cap} * tw_tanh({score} / {cap})" if attend.soft_cap > 0 else score
        lines = [
            "const int64_t lanes = tw_blocks(rows, 32) * 32;",
            "for (int64_t j = view.begin; j < view.end; ++j)",
            "#pragma GCC ivdep",
            f"    for (int64_t r = 0; r < lanes; ++r) scores[j * {LANES} + r] = {capped};",
        ]
        return [*lines, *self._mask()] if self._works_rows() else lines

    def _mask(self) -> list[str]:
        attend = self.attend
        assert attend.mask is not None
        emitter = self._scope()
        self._push_row(emitter)
        emitter.push((attend.s.name,))
        mask = emitter.value(attend.mask)
        value = converted(mask, attend.mask.dtype, self.real)
        if attend.mask.dtype == torch.bool:
            value = f"{mask} ? 0 : {literal(float('-inf'), self.real)}"
        emitter.line(f"mask_rows[r * {KEYS} + j] = {value};")
        inner = [f"const int64_t {emitter.axis(attend.s)} = key + j;", *emitter.pop()]
        loop = ["#pragma GCC ivdep", "for (int64_t j = 0; j < keys; ++j) {", *indented(inner), "}"]
        body = [*self._of_row(), *emitter.pop(), *loop]
        return [
            *emitter.pop(),
            f"const int64_t keys = tw_least<int64_t>({KEYS}, end_key - key);",
            "for (int64_t r = 0; r < rows; ++r) {",
            *indented(body),
            "}",
            "tw_add_rows(scores, view, mask_rows, rows);",
        ]
