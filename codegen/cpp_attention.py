"""AttentionPart as C++: blocks of 64 keys in ascending order, up to 16 query rows per tile (attention.h).

The threads share (batch, tile of queries). Keys outside the causal or window bounds of a tile are not touched; within
a block every row takes its own visible keys only, so a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import sympy
import torch

from torchweld.codegen.cpp_names import PrintError, converted, literal, unwrapped, value_type
from torchweld.codegen.cpp_operand import StoredRow, padded, stored_row
from torchweld.codegen.cpp_terms import Emitter
from torchweld.codegen.cpp_text import KernelNames, indented
from torchweld.codegen.ir import AttentionPart, Kernel
from torchweld.graph.terms import Attend, Axis, Expr, Term

_QUERIES, _KEYS = 16, 64  # tw_query_block, tw_key_block


def print_attention_part(kernel: Kernel, names: KernelNames, part: AttentionPart) -> tuple[list[str], Expr]:
    """The statements of the part and the bytes of scratch memory per thread that they need."""
    return _AttentionPrinter(kernel, names, part).print()


class _AttentionPrinter:
    def __init__(self, kernel: Kernel, names: KernelNames, part: AttentionPart) -> None:
        attend = part.attend.term
        if not isinstance(attend, Attend):
            raise PrintError(f"{part.attend.name!r} is no Attend but a {type(attend).__name__}")
        self.kernel, self.names, self.part, self.attend = kernel, names, part, attend
        self.real = torch.float64 if attend.dtype == torch.float64 else torch.float32
        self.kind = value_type(self.real)
        self.emitter = Emitter(kernel, names)
        self.axes = (*part.batch, part.t, part.feature, attend.s, attend.d)
        for axis in self.axes:
            self.emitter.axis(axis)
        self.keys_stored = stored_row(kernel, attend.k, attend.d, self.real)
        self.values_stored = self._plain_values()
        self.scratch: Expr = sympy.Integer(0)
        self.lines: list[str] = []

    def _plain_values(self) -> StoredRow | None:
        row = stored_row(self.kernel, self.attend.v, self.part.feature, self.real)
        return row if row is not None and row.format in ("F32", "F64") else None

    def print(self) -> tuple[list[str], Expr]:
        """The whole part."""
        self._room()
        emitter, part = self.emitter, self.part
        tiles = f"tw_blocks({unwrapped(emitter.index(part.t.extent))}, {_QUERIES})"
        features = unwrapped(emitter.index(part.feature.extent))
        self.lines += [
            f"const int64_t query_blocks = {features} ? {tiles} : 0;",
            f"const tw_range share = tw_share({emitter.extents(part.batch)} * query_blocks, thread, threads);",
            "for (int64_t unit = share.begin; unit < share.end; ++unit) {",
            *indented(self._tile()),
            "}",
        ]
        return self.lines, self.scratch

    def _allocate(self, name: str, count: Expr) -> None:
        start = unwrapped(self.emitter.index(self.scratch))
        self.lines.append(f"{self.kind}* const {name} = ({self.kind}*)(scratch + {start});")
        self.scratch = sympy.expand(self.scratch + padded(count * self.real.itemsize, torch.uint8))

    def _room(self) -> None:
        depth, width = padded(self.attend.d.extent, self.real), padded(self.part.feature.extent, self.real)
        self.lines.append(f"const int64_t d_stride = {unwrapped(self.emitter.index(depth))};")
        self.lines.append(f"const int64_t f_stride = {unwrapped(self.emitter.index(width))};")
        self._allocate("q_rows", depth * _QUERIES)
        self._allocate("scores", sympy.Integer(_QUERIES * _KEYS))
        self._allocate("outputs", width * _QUERIES)
        self._allocate("decoded", depth * 4)
        if self.keys_stored is None:
            self._allocate("k_rows", depth * _KEYS)
        if self.values_stored is None:
            self._allocate("v_rows", width * _KEYS)

    def _scope(self) -> Emitter:
        emitter = Emitter(self.kernel, self.names)
        for axis in self.axes:
            emitter.adopt_axis(axis, self.emitter)
        emitter.push(tuple(axis.name for axis in self.part.batch))
        return emitter

    def _tile(self) -> list[str]:
        emitter, kind, attend = self.emitter, self.kind, self.attend
        keys, queries = (
            unwrapped(emitter.index(attend.s.extent)),
            unwrapped(emitter.index(self.part.t.extent)),
        )
        least = literal(float("-inf"), self.real)
        return [
            f"const int64_t first_query = unit % query_blocks * {_QUERIES};",
            f"const int64_t rows = tw_least<int64_t>({_QUERIES}, {queries} - first_query);",
            *emitter.unflatten("unit / query_blocks", self.part.batch),
            f"int64_t visible_from[{_QUERIES}], visible_to[{_QUERIES}], first_key = {keys}, last_key = 0;",
            f"{kind} greatest[{_QUERIES}], total[{_QUERIES}];",
            *self._queries(least),
            f"for (int64_t key = first_key / {_KEYS} * {_KEYS}; key < last_key; key += {_KEYS}) {{",
            *indented(self._block()),
            "}",
            *self._stores(),
        ]

    def _queries(self, least: str) -> list[str]:
        """Bounds and state of every row of the tile, and its query as numbers."""
        attend, part = self.attend, self.part
        emitter = self._scope()
        t, keys = emitter.axis(part.t), unwrapped(emitter.index(attend.s.extent))
        emitter.push((part.t.name,))
        emitter.line(f"greatest[r] = {least}, total[r] = 0;")
        f = emitter.axis(part.feature)
        emitter.line(f"for (int64_t {f} = 0; {f} < f_stride; ++{f}) outputs[r * f_stride + {f}] = 0;")
        if attend.mask_kind == "none":
            emitter.line(f"visible_from[r] = 0, visible_to[r] = {keys};")
        else:
            last = attend.t + attend.s.extent - attend.t_extent
            emitter.line(f"const int64_t last_visible = {unwrapped(emitter.index(sympy.expand(last)))};")
            start = (
                f"tw_most<int64_t>(0, last_visible - {attend.window - 1})"
                if attend.mask_kind == "window"
                else "0"
            )
            emitter.line(
                f"visible_from[r] = {start}, visible_to[r] = tw_least<int64_t>({keys}, last_visible + 1);"
            )
        emitter.line(
            "first_key = tw_least(first_key, visible_from[r]), last_key = tw_most(last_key, visible_to[r]);"
        )
        self._fill(emitter, attend.q, attend.d, "q_rows", "r", "d_stride")
        body = [f"const int64_t {t} = first_query + r;", *emitter.pop()]
        return [*emitter.pop(), "for (int64_t r = 0; r < rows; ++r) {", *indented(body), "}"]

    def _fill(self, emitter: Emitter, term: Term, axis: Axis, rows: str, row: str, stride: str) -> None:
        name = emitter.axis(axis)
        place = f"{rows}[{row} * {stride} + {name}]"
        emitter.push((axis.name,))
        emitter.line(f"{place} = {unwrapped(converted(emitter.value(term), term.dtype, self.real))};")
        for line in emitter.vector_loop(axis, emitter.pop()):
            emitter.line(line)
        if padded(axis.extent, self.real) != axis.extent:
            extent = unwrapped(emitter.index(axis.extent))
            emitter.line(f"for (int64_t {name} = {extent}; {name} < {stride}; ++{name}) {place} = 0;")

    def _block(self) -> list[str]:
        attend, kind = self.attend, self.kind
        extent = unwrapped(self.emitter.index(attend.s.extent))
        format_ = "F64" if self.real == torch.float64 else "F32"
        depth = unwrapped(self.emitter.index(attend.d.extent))
        if self.keys_stored is not None:
            format_ = self.keys_stored.format
        else:
            depth = "d_stride"
        return [
            f"const int64_t keys = tw_least<int64_t>({_KEYS}, {extent} - key);",
            f"const void* k_at[{_KEYS}];",
            f"const {kind}* v_at[{_KEYS}];",
            *self._key_rows(),
            f"tw_matmul<tw_{format_}, 4, 4>(q_rows, d_stride, rows, k_at, keys, {depth}, scores, {_KEYS}, decoded);",
            "for (int64_t r = 0; r < rows; ++r) {",
            "    const int64_t begin = tw_most<int64_t>(visible_from[r] - key, 0);",
            "    const int64_t end = tw_least(visible_to[r] - key, keys);",
            "    if (begin >= end) continue;",
            *indented(self._scores()),
            f"    tw_attend_block<{kind}>(scores + r * {_KEYS}, begin, end, greatest[r], total[r], v_at,"
            f" {unwrapped(self.emitter.index(self.part.feature.extent))}, outputs + r * f_stride);",
            "}",
        ]

    def _key_rows(self) -> list[str]:
        attend = self.attend
        emitter = self._scope()
        s = emitter.axis(attend.s)
        emitter.push((attend.s.name,))
        if self.keys_stored is not None:
            emitter.line(f"k_at[j] = (const void*)({self.keys_stored.address(emitter, attend.d)});")
        else:
            self._fill(emitter, attend.k, attend.d, "k_rows", "j", "d_stride")
            emitter.line("k_at[j] = k_rows + j * d_stride;")
        if self.values_stored is not None:
            emitter.line(f"v_at[j] = {self.values_stored.address(emitter, self.part.feature)};")
        else:
            self._fill(emitter, attend.v, self.part.feature, "v_rows", "j", "f_stride")
            emitter.line("v_at[j] = v_rows + j * f_stride;")
        body = [f"const int64_t {s} = key + j;", *emitter.pop()]
        return [*emitter.pop(), "for (int64_t j = 0; j < keys; ++j) {", *indented(body), "}"]

    def _scores(self) -> list[str]:
        """Scale, cap and mask of the visible scores of row r."""
        attend = self.attend
        emitter = self._scope()
        t, s = emitter.axis(self.part.t), emitter.axis(attend.s)
        emitter.push((self.part.t.name,))
        emitter.push((attend.s.name,))
        place = f"scores[r * {_KEYS} + j]"
        emitter.line(f"{self.kind} score = {place} * {literal(attend.scale, self.real)};")
        if attend.soft_cap > 0:
            cap = literal(attend.soft_cap, self.real)
            emitter.line(f"score = {cap} * tw_tanh(score / {cap});")
        if attend.mask is not None:
            mask = emitter.value(attend.mask)
            if attend.mask.dtype == torch.bool:
                emitter.line(f"score = {mask} ? score : {literal(float('-inf'), self.real)};")
            else:
                emitter.line(f"score = score + {converted(mask, attend.mask.dtype, self.real)};")
        emitter.line(f"{place} = score;")
        inner = [f"const int64_t {s} = key + j;"] if attend.mask is not None else []
        inner += emitter.pop()
        outer = [f"const int64_t {t} = first_query + r;"] if attend.mask is not None else []
        loop = ["#pragma GCC ivdep", "for (int64_t j = begin; j < end; ++j) {", *indented(inner), "}"]
        body = outer + emitter.pop() + loop
        return emitter.pop() + body

    def _stores(self) -> list[str]:
        part, attend = self.part, self.attend
        emitter = self._scope()
        t, f = emitter.axis(part.t), emitter.axis(part.feature)
        emitter.push((part.t.name,))
        emitter.line("// a row that saw nothing gives 0")
        emitter.line(f"const {self.kind} share_of_one = total[r] > 0 ? 1 / total[r] : total[r];")
        ref = f"ref:{part.attend.name}"
        emitter.push((part.feature.name, ref))
        name = self.names.namer.fresh(part.attend.name)
        text = converted(f"(outputs[r * f_stride + {f}] * share_of_one)", self.real, attend.dtype)
        emitter.line(f"const {value_type(attend.dtype)} {name} = {unwrapped(text)};")
        emitter.define_ref(part.attend.name, name, attend.dtype)
        for store in part.stores:
            emitter.store(store)
        lines = emitter.pop()
        for line in emitter.vector_loop(part.feature, lines):
            emitter.line(line)
        body = [f"const int64_t {t} = first_query + r;", *emitter.pop()]
        return [*emitter.pop(), "for (int64_t r = 0; r < rows; ++r) {", *indented(body), "}"]
