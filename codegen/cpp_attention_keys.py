"""The keys of an AttentionPart in C++: which positions a row sees, and where the key and value of a position lie.

Over a cache a position is found through its slot.  The new rows of a tree have no position of their own: whoever looks
for the key at a position behind the old text finds its own ancestor there.
"""

from __future__ import annotations

import sympy
import torch

from torchweld.codegen.cpp_names import PrintError, converted, unwrapped, value_type
from torchweld.codegen.cpp_operand import StoredRow, padded, stored_row
from torchweld.codegen.cpp_terms import Emitter
from torchweld.codegen.cpp_text import KernelNames, indented
from torchweld.codegen.ir import AttentionPart, Kernel
from torchweld.graph.terms import Attend, Axis, Expr, Term

TILE_ROWS = 64  # as a rule: scores, queries and sums of a tile stay in an L2 cache with 256 features


class AttentionKeys:
    """What the printer of a part says about rows and their keys; `r` is a row of a tile, `j` a key of a block."""

    def __init__(self, kernel: Kernel, names: KernelNames, part: AttentionPart, place: int) -> None:
        attend = part.attend.term
        if not isinstance(attend, Attend):
            raise PrintError(f"{part.attend.name!r} is no Attend but a {type(attend).__name__}")
        self.kernel, self.names, self.part, self.attend = kernel, names, part, attend
        self.real = torch.float64 if attend.dtype == torch.float64 else torch.float32
        self.kind = value_type(self.real)
        self.emitter = Emitter(kernel, names)
        self.axes = (*part.batch, part.t, part.feature, attend.s, attend.d)
        self.axes += () if attend.steps is None else (attend.steps,)
        for axis in self.axes:
            self.emitter.axis(axis)
        self.share = attend.share if part.batch else 1
        self.queries = max(1, TILE_ROWS // self.share)
        self.rows = self.queries * self.share
        self.keys_stored = stored_row(kernel, attend.k, attend.d, self.real)
        self.values_stored = self._plain_values()
        self.place = place
        self.scratch: Expr = sympy.Integer(0)
        self.lines: list[str] = []

    def _plain_values(self) -> StoredRow | None:
        row = stored_row(self.kernel, self.attend.v, self.part.feature, self.real)
        return row if row is not None and row.format in ("F32", "F64") else None

    def _text(self, expr: Expr) -> str:
        return unwrapped(self.emitter.index(expr))

    def _for(self, axis: Axis) -> str:
        name = self.emitter.axis(axis)
        return f"for (int64_t {name} = 0; {name} < {self._text(axis.extent)}; ++{name})"

    def _scope(self) -> Emitter:
        emitter = Emitter(self.kernel, self.names)
        for axis in self.axes:
            emitter.adopt_axis(axis, self.emitter)
        emitter.push(tuple(axis.name for axis in self.part.batch))
        return emitter

    def _of_row(self) -> list[str]:
        """The query and the head of row r."""
        t = f"const int64_t {self.emitter.axis(self.part.t)} = first_query + r / {self.share};"
        if self.share == 1:
            return [t.replace(f"r / {self.share}", "r")]
        head = self.emitter.axis(self.part.batch[-1])
        return [t, f"const int64_t {head} = first_head + r % {self.share};"]

    def _push_row(self, emitter: Emitter) -> None:
        heads = (self.part.batch[-1].name,) if self.share > 1 else ()
        emitter.push((self.part.t.name, *heads))

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

    def _past(self) -> list[str]:
        attend = self.attend
        if attend.past is None:
            return []
        emitter = self._scope()
        emitter.line(f"const int64_t past = {unwrapped(emitter.value(attend.past))};")
        emitter.line(f"const int64_t slots = {self._text(attend.s.extent)};")
        if attend.path is not None:
            emitter.line("const int64_t past_slot = past % slots;")
        return emitter.pop()

    def _visibility(self) -> list[str]:
        """Which positions every row sees."""
        attend = self.attend
        emitter = self._scope()
        self._push_row(emitter)
        keys = unwrapped(emitter.index(attend.s.extent))
        if attend.mask_kind == "none":
            emitter.line(f"visible_from[r] = 0, visible_to[r] = {keys};")
        else:
            emitter.line(f"const int64_t last_visible = {self._last_visible(emitter)};")
            window = f"tw_most<int64_t>(0, last_visible - {attend.window - 1})"
            start = window if attend.mask_kind == "window" else "0"
            end = (
                f"tw_least<int64_t>({keys}, last_visible + 1)" if attend.past is None else "last_visible + 1"
            )
            emitter.line(f"visible_from[r] = {start}, visible_to[r] = {end};")
            if attend.past is not None:
                emitter.line("// more than there are slots: the caller's cache is too small")
                emitter.line(
                    "if (visible_to[r] - visible_from[r] > slots) *error = 1, visible_to[r] = visible_from[r];"
                )
        emitter.line("if (visible_from[r] >= visible_to[r]) {")
        emitter.line("    visible_from[r] = visible_to[r] = 0;")
        emitter.line("    continue;")
        emitter.line("}")
        emitter.line("first_key = first_key < 0 ? visible_from[r] : tw_least(first_key, visible_from[r]);")
        emitter.line("last_key = tw_most(last_key, visible_to[r]);")
        body = [*self._of_row(), *emitter.pop()]
        return [*emitter.pop(), "for (int64_t r = 0; r < rows; ++r) {", *indented(body), "}"]

    def _last_visible(self, emitter: Emitter) -> str:
        """The position of a row."""
        attend = self.attend
        if attend.past is None:
            return unwrapped(emitter.index(sympy.expand(attend.t + attend.s.extent - attend.t_extent)))
        if attend.path is None or attend.steps is None:
            return f"past + {emitter.index(attend.t)}"
        step = emitter.axis(attend.steps)
        emitter.line("int64_t depth = -1;")
        emitter.push((attend.steps.name,))
        emitter.line(f"if ({unwrapped(emitter.value(attend.path))} < 0) break;")
        emitter.line(f"depth = {step};")
        emitter.nest(self._for(attend.steps), emitter.pop())
        return "past + depth"

    def _slot_of_position(self) -> tuple[list[str], list[str], list[str]]:
        """Statements before the loop over the keys of a block, in it in front, and at its end."""
        s = self.emitter.axis(self.attend.s)
        if self.attend.past is None:
            return [], [f"const int64_t {s} = key + j;"], []
        return (
            ["int64_t slot = key % slots;"],
            [f"const int64_t {s} = slot;"],
            ["slot = slot + 1 == slots ? 0 : slot + 1;"],
        )

    def _slot_on_path(self) -> tuple[list[str], list[str], list[str]]:
        attend = self.attend
        assert attend.path is not None and attend.steps is not None
        s, t, step = (self.emitter.axis(axis) for axis in (attend.s, self.part.t, attend.steps))
        emitter = self._scope()
        emitter.push((self.part.t.name,))
        emitter.push((attend.steps.name,))
        ancestor, queries = unwrapped(emitter.value(attend.path)), emitter.index(attend.t_extent)
        emitter.line(f"new_row = tw_checked({ancestor}, {queries}, error);")
        inner = emitter.pop()
        hoisted = emitter.pop()
        before = [f"const int64_t {t} = first_query + q / {self.share};", *emitter.pop(), *hoisted]
        at = [
            "if (key + j >= visible_to[q]) break;  // what this query does not see has no place",
            "int64_t new_row = 0;",
            "if (key + j >= past) {",
            f"    const int64_t {step} = key + j - past;",
            *indented(inner),
            "}",
            f"const int64_t {s} = key + j < past ? (key + j) % slots : (past_slot + new_row) % slots;",
        ]
        return before, at, []

    def _pointers(self, slots: tuple[list[str], list[str], list[str]]) -> list[str]:
        attend = self.attend
        before, at, after = slots
        emitter = self._scope()
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
        body = [*at, *emitter.pop(), *after]
        return [*before, *emitter.pop(), "for (int64_t j = 0; j < keys; ++j) {", *indented(body), "}"]
