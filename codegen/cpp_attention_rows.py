"""What both ways of an AttentionPart in C++ say about the rows of a tile: their queries, masks, results and room."""

from __future__ import annotations

import sympy
import torch

from torchweld.codegen.cpp_attention_keys import AttentionKeys
from torchweld.codegen.cpp_names import converted, unwrapped, value_type
from torchweld.codegen.cpp_operand import padded
from torchweld.codegen.cpp_text import indented
from torchweld.graph.terms import Expr


class AttentionRows(AttentionKeys):
    """Rows with results in `joined`; greatest, total: the C++ arrays of their greatest scores and sums of weights."""

    greatest, total = "greatest[0]", "total[0]"

    def _allocate(self, name: str, count: Expr) -> None:
        self._allocate_as(self.kind, self.real.itemsize, name, count)

    def _allocate_as(self, kind: str, itemsize: int, name: str, count: Expr) -> None:
        self.lines.append(f"{kind}* const {name} = ({kind}*)(scratch + {self._text(self.scratch)});")
        self.scratch = sympy.expand(self.scratch + padded(count * itemsize, torch.uint8))

    def _queries(self) -> list[str]:
        emitter = self._scope()
        self._push_row(emitter)
        self._fill(emitter, self.attend.q, self.attend.d, "q_rows", "r", "d_stride")
        body = [*self._of_row(), *emitter.pop()]
        return [*emitter.pop(), "for (int64_t r = 0; r < rows; ++r) {", *indented(body), "}"]

    def _masks_keys(self) -> bool:
        """Whether the mask says of a key that all rows of a tile see it, or none."""
        mask = self.attend.mask
        if mask is None or mask.dtype != torch.bool:
            return False
        needs = self._scope().needs(mask)
        return self.part.t.name not in needs and (self.share == 1 or self.part.batch[-1].name not in needs)

    def _stores(self) -> list[str]:
        part, attend = self.part, self.attend
        emitter = self._scope()
        f = emitter.axis(part.feature)
        self._push_row(emitter)
        share = f"tw_share_of_one({self.total}[r])"
        if attend.sinks is not None:
            sink = unwrapped(converted(emitter.value(attend.sinks), attend.sinks.dtype, self.real))
            share = f"tw_share_beside<{self.kind}>({self.greatest}[r], {self.total}[r], {sink})"
        emitter.line(f"const {self.kind} share_of_one = {share};")
        ref = f"ref:{part.attend.name}"
        emitter.push((part.feature.name, ref))
        name = self.names.namer.fresh(part.attend.name)
        text = converted(f"(joined[r * f_stride + {f}] * share_of_one)", self.real, attend.dtype)
        emitter.line(f"const {value_type(attend.dtype)} {name} = {unwrapped(text)};")
        emitter.define_ref(part.attend.name, name, attend.dtype)
        for store in part.stores:
            emitter.store(store)
        lines = emitter.pop()
        for line in emitter.vector_loop(part.feature, lines):
            emitter.line(line)
        body = [*self._of_row(), *emitter.pop()]
        return [*emitter.pop(), "for (int64_t r = 0; r < rows; ++r) {", *indented(body), "}"]
