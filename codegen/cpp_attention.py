"""AttentionPart as C++: tiles of query rows against blocks of 64 keys, joined over splits of 128 (attention.h).

    for each (batch entry, key head, tile of queries):        the threads take turns, or share the splits of few tiles
        for each split of 128 positions that the tile sees:
            for each block of 64: keys turned, scores, weights, values     the visible keys of each row only
        splits joined in ascending order; stores

A tile's rows are queries times the query heads that read one key head. Over a cache the keys are met by position, and
found through their slots; where rows of a tree see different keys, they go through the block one query at a time.
"""

from __future__ import annotations

import sympy
import torch

from torchweld.codegen.cpp_attention_room import KEYS, SPLIT, AttentionRoom, SharedRoom
from torchweld.codegen.cpp_attention_tiles import TilePrinter
from torchweld.codegen.cpp_names import converted, literal
from torchweld.codegen.cpp_packed import Precision
from torchweld.codegen.cpp_text import KernelNames, indented
from torchweld.codegen.ir import AttentionPart, Kernel
from torchweld.graph.index import FloorDiv
from torchweld.graph.terms import Axis, Expr


def print_attention_part(
    kernel: Kernel, names: KernelNames, part: AttentionPart, place: int, precision: Precision = "f32"
) -> tuple[list[str], Expr, SharedRoom]:
    """The statements of the part, the bytes of scratch memory per thread, and the memory that its threads share.

    place: where that memory comes among the buffers.
    precision: other than f32, more than 16 queries go through cpp_attention_tiles.py where there are AMX tiles.
    """
    printer = _AttentionPrinter(kernel, names, part, place)
    lines, scratch, shared = printer.print()
    tiles = TilePrinter(kernel, names, part, place)
    if precision == "f32" or not tiles.fits():
        return lines, scratch, shared
    tiled, more = tiles.print()
    return (
        [f"if ({tiles.wanted()}) {{", *indented(tiled), "} else {", *indented(lines), "}"],
        scratch + more,
        shared,
    )


class _AttentionPrinter(AttentionRoom):
    """Loops over tiles, splits and blocks."""

    def print(self) -> tuple[list[str], Expr, SharedRoom]:
        """The whole part."""
        self._room()
        features, queries = self._text(self.part.feature.extent), self._text(self.part.t.extent)
        self.lines += [
            f"const int64_t query_blocks = {features} ? tw_blocks({queries}, {self.queries}) : 0;",
            f"const int64_t units = {features} ? {self._text(self._units())} : 0;",
            "// With few tiles the threads share the splits of each.",
            "const bool spread = threads > 1 && units < 2 * threads && units <= tw_most_units;",
            f"const tw_splits<{self.kind}> splits = {{spread ? buffers[{self.place}] : nullptr, {self.rows},"
            f" {self._text(self._most_splits())}, f_stride}};",
            "for (int64_t unit = spread ? 0 : thread; unit < units; unit += spread ? 1 : threads) {",
            *indented(self._tile()),
            "}",
        ]
        return self.lines, self.scratch, self._shared()

    def _place(self) -> list[str]:
        """The batch axes of a unit; the head is the first one of its group."""
        if not self.part.batch:
            return []
        *outer, head = self.part.batch
        groups = Axis("group", FloorDiv(head.extent, sympy.Integer(self.share)))
        return [
            *self.emitter.unflatten("unit / query_blocks", (*outer, groups)),
            f"const int64_t first_head = {self.emitter.axis(groups)} * {self.share};",
            f"const int64_t {self.emitter.axis(head)} = first_head;",
        ]

    def _tile(self) -> list[str]:
        kind, queries = self.kind, self._text(self.part.t.extent)
        return [
            f"const int64_t first_query = unit % query_blocks * {self.queries};",
            f"const int64_t rows = tw_least<int64_t>({self.queries}, {queries} - first_query) * {self.share};",
            *self._place(),
            *self._past(),
            f"int64_t visible_from[{self.rows}], visible_to[{self.rows}], first_key = -1, last_key = 0;",
            *self._visibility(),
            f"const int64_t first_split = tw_most<int64_t>(first_key, 0) / {SPLIT};",
            f"const int64_t end_split = tw_most(tw_blocks(last_key, {SPLIT}), first_split + 1);",
            "// The splits of this thread lie beside each other; who gets the odd one changes from unit to unit.",
            "const int64_t sharers = spread ? threads : 1, turn = spread ? (thread + unit) % threads : 0;",
            "const int64_t own_split = first_split + (end_split - first_split) * turn / sharers;",
            "const int64_t other_split = first_split + (end_split - first_split) * (turn + 1) / sharers;",
            f"{kind} greatest[2][{self.rows}], total[2][{self.rows}];",
            "bool filled = false;",
            "for (int64_t split = own_split; split < other_split; ++split) {",
            *indented(self._split()),
            "}",
        ]

    # -- one split ------------------------------------------------------------------------------------------------

    def _split(self) -> list[str]:
        least = literal(float("-inf"), self.real)
        return [
            "if (!filled) {",
            "    filled = true;",
            *indented(self._queries()),
            "}",
            "// The first split makes the state that the others are joined to. Behind those of another thread each",
            "// stays alone: the order of the joins decides the bits.",
            "const int64_t state = turn || split == own_split ? 0 : 1;",
            f"{self.kind}* const sums = state ? outputs : joined;",
            "for (int64_t r = 0; r < rows; ++r) {",
            f"    greatest[state][r] = {least}, total[state][r] = 0;",
            "    for (int64_t i = 0; i < f_stride; ++i) sums[r * f_stride + i] = 0;",
            "}",
            f"const int64_t split_end = tw_least(last_key, (split + 1) * {SPLIT});",
            f"for (int64_t key = tw_most(split * {SPLIT}, first_key / {KEYS} * {KEYS}); key < split_end;"
            f" key += {KEYS}) {{",
            *indented(self._block()),
            "}",
            "for (int64_t r = 0; state && r < rows; ++r)",
            f"    tw_join<{self.kind}>(greatest[0][r], total[0][r], joined + r * f_stride, greatest[1][r],",
            "        total[1][r], sums + r * f_stride, f_stride);",
            "const int64_t own = other_split - own_split, count = end_split - first_split;",
            "const bool last_own = split + 1 == other_split, alone = own == count;",
            "if (!alone && (turn || last_own))",
            "    splits.hand_in(unit, turn ? split - first_split : 0, rows, greatest[0], total[0], joined);",
            "if (!last_own) continue;",
            "if (!alone && !splits.finish(unit, own, count / sharers, count, rows, greatest[0], total[0], joined))",
            "    continue;",
            *self._stores(),
        ]

    def _block(self) -> list[str]:
        """Pointers to the keys and values of a block, then its rows; with a tree's new rows, query by query."""
        lines = [
            f"const int64_t keys = tw_least<int64_t>({KEYS}, last_key - key);",
            f"const void* k_at[{KEYS}];",
            f"const {self.kind}* v_at[{KEYS}];",
            *self._shown(),
            "int64_t ahead = 0, value_ahead = 0;",
            "const auto attend_rows = [&](int64_t begin_row, int64_t end_row) {",
            *indented(self._rows()),
            "};",
        ]
        shared = [*self._pointers(self._slot_of_position()), *self._ahead(), "attend_rows(0, rows);"]
        if self.attend.path is None:
            return [*lines, *shared]
        tree = [
            f"for (int64_t q = 0; q < rows; q += {self.share}) {{",
            "    if (visible_from[q] >= key + keys || visible_to[q] <= key) continue;",
            *indented(self._pointers(self._slot_on_path())),
            f"    attend_rows(q, q + {self.share});",
            "}",
        ]
        return [*lines, "if (key + keys > past) {", *indented(tree), "} else {", *indented(shared), "}"]

    def _ahead(self) -> list[str]:
        """How many bytes on this thread's next block of a cache lies; what is in the L2 cache anyway needs no help."""
        stored = ((self.keys_stored, "ahead", "k_at"), (self.values_stored, "value_ahead", "v_at"))
        steps = [
            f"    {name} = {KEYS} * ((const char*){at}[1] - (const char*){at}[0]);"
            for row, name, at in stored
            if row is not None
        ]
        if self.attend.past is None or not steps:
            return []
        # Behind a block that turned back to the first slot the distance is another one.
        more = f"key + {KEYS} < tw_least(last_key, other_split * {SPLIT}) && slot >= {KEYS}"
        return [f"if ({more}) {{", *steps, "}"]

    def _shown(self) -> list[str]:
        """Which keys of the block the mask shows; a block of which it shows nothing changes nothing."""
        lines = [f"alignas(64) {self.kind} shown[{KEYS}];"]
        if not self._masks_keys():
            return [*lines, f"for (int64_t j = 0; j < {KEYS}; ++j) shown[j] = 1;"]
        assert self.attend.mask is not None
        emitter = self._scope()
        emitter.push((self.attend.s.name,))
        emitter.line(f"shown[j] = {emitter.value(self.attend.mask)} ? 1 : 0;")
        emitter.line("any |= shown[j] != 0;")
        body = [f"const int64_t {emitter.axis(self.attend.s)} = key + j;", *emitter.pop()]
        return [
            *lines,
            *emitter.pop(),
            "bool any = false;",
            "for (int64_t j = 0; j < keys; ++j) {",
            *indented(body),
            "}",
            f"for (int64_t j = keys; j < {KEYS}; ++j) shown[j] = 0;",
            "if (!any) continue;",
        ]

    def _rows(self) -> list[str]:
        """Rows [begin_row, end_row) against the block whose pointers are set."""
        attend = self.attend
        worked = attend.soft_cap > 0 or (attend.mask is not None and not self._masks_keys())
        scale = literal(1.0 if worked else attend.scale, self.real)
        format_ = "F64" if self.real == torch.float64 else "F32"
        depth = self._text(self.attend.d.extent)
        if self.keys_stored is not None:
            format_ = self.keys_stored.format
        features = self._text(self.part.feature.extent)
        loop = "for (int64_t r = begin_row; r < end_row; ++r)"
        lines = [
            f"tw_seen seen[{self.rows}];",
            f"{self.kind} keep[{self.rows}];",
            "int64_t last = 0;",
            f"{loop} {{",
            "    const int64_t from = tw_most<int64_t>(visible_from[r] - key, 0);",
            "    const int64_t to = tw_least(visible_to[r] - key, keys);",
            "    seen[r] = from < to ? tw_seen{(int32_t)from, (int32_t)to} : tw_seen{0, 0};",
            "    last = tw_most<int64_t>(last, seen[r].to);",
            "}",
            "if (!last) return;",
            f"tw_score_block<tw_{format_}>(q_rows + begin_row * d_stride, d_stride, end_row - begin_row,",
            f"    seen + begin_row, tw_key_list(k_at, last, ahead), {depth}, turned, scores + begin_row * {KEYS});",
        ]
        if worked:
            lines += [
                f"{loop} {{",
                "    if (seen[r].from >= seen[r].to) continue;",
                *indented(self._scores()),
                "}",
            ]
        return [
            *lines,
            f"tw_soften_block<{self.kind}>(scores + begin_row * {KEYS}, end_row - begin_row, seen + begin_row, shown,",
            f"    {scale}, greatest[state] + begin_row, total[state] + begin_row, keep + begin_row);",
            f"{loop} tw_scale_row<{self.kind}>(sums + r * f_stride, f_stride, keep[r]);",
            f"tw_mix_block<{self.kind}>(scores + begin_row * {KEYS}, end_row - begin_row, seen + begin_row, v_at,",
            f"    {features}, value_ahead, sums + begin_row * f_stride, f_stride);",
        ]

    def _scores(self) -> list[str]:
        """Scale, cap and mask of the visible scores of row r."""
        attend = self.attend
        emitter = self._scope()
        s = emitter.axis(attend.s)
        self._push_row(emitter)
        emitter.push((attend.s.name,))
        place = f"scores[r * {KEYS} + j]"
        emitter.line(f"{self.kind} score = {place} * {literal(attend.scale, self.real)};")
        if attend.soft_cap > 0:
            cap = literal(attend.soft_cap, self.real)
            emitter.line(f"score = {cap} * tw_tanh(score / {cap});")
        if attend.mask is not None and not self._masks_keys():
            mask = emitter.value(attend.mask)
            if attend.mask.dtype == torch.bool:
                emitter.line(f"score = {mask} ? score : {literal(float('-inf'), self.real)};")
            else:
                emitter.line(f"score = score + {converted(mask, attend.mask.dtype, self.real)};")
        emitter.line(f"{place} = score;")
        masked = attend.mask is not None and not self._masks_keys()
        inner = [f"const int64_t {s} = key + j;"] if masked else []
        inner += emitter.pop()
        outer = self._of_row() if masked else []
        begin, end = ("seen[r].from", "seen[r].to") if masked else ("0", str(KEYS))
        loop = ["#pragma GCC ivdep", f"for (int64_t j = {begin}; j < {end}; ++j) {{", *indented(inner), "}"]
        body = outer + emitter.pop() + loop
        return emitter.pop() + body
