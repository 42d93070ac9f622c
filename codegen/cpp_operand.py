"""Operands of inner products: rows that can be read where they lie, and rows that must be written out first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sympy
import torch

from torchweld.codegen.cpp_names import PrintError
from torchweld.codegen.cpp_terms import Emitter
from torchweld.codegen.ir import Kernel
from torchweld.codegen.packing import GROUP, LAYOUT, WHOLE, columns_of
from torchweld.graph.index import FloorDiv, linearize
from torchweld.graph.terms import Axis, Decode, Expr, Load, Op, Term, walk

STORED_FORMATS: Final = frozenset({
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
    WHOLE,
})  # fmt: skip
_DENSE: Final = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class StoredRow:
    """A row along `k` that lies in memory one element after the other: its format and its first element."""

    format: str
    term: Load | Decode

    @property
    def packed(self) -> bool:
        """Whether 16 rows lie side by side (runtime/packed.h): the row is not in one piece."""
        return self.format.startswith(LAYOUT)

    @property
    def has_offset(self) -> bool:
        """Whether a packed format needs the sums of the other operand."""
        return self.format.removeprefix(LAYOUT) in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")

    @property
    def has_codes(self) -> bool:
        """Whether the weight is stored as small whole numbers with scales per block."""
        return self.format.removeprefix(LAYOUT) not in ("F32", "F16", "BF16", WHOLE)

    @property
    def is_whole(self) -> bool:
        """Whether the weight is packed in int8 with one scale per row."""
        return self.format == LAYOUT + WHOLE

    def first_group(self, emitter: Emitter, n: Axis, first: str) -> str:
        """Of a packed weight: the C++ expression of its first group, where `n` starts at `first`, a multiple of 16."""
        assert isinstance(self.term, Decode)
        start = int(self.term.row[0] - n.symbol)
        at = f"({first} + {start})" if start else first
        buffer = emitter.kernel.buffer(self.term.buffer)
        steps = -(-columns_of(self.format, int(buffer.shape[-1])) // 32)
        name = emitter.names.buffers[self.term.buffer]
        return f"{name} + {at} / {GROUP} * tw_group_bytes<tw_{self.format}>({steps})"

    def address(self, emitter: Emitter, k: Axis) -> str:
        """The C++ expression of the row's address (the axes of the row must be in scope)."""
        if isinstance(self.term, Decode):
            return emitter.row_pointer(self.term)
        buffer = emitter.kernel.buffer(self.term.buffer)
        start = tuple(sympy.sympify(expr).subs(k.symbol, 0) for expr in self.term.index)
        return f"{emitter.names.buffers[buffer.name]} + {emitter.offset(start, buffer.shape)}"

    def needs(self, emitter: Emitter) -> frozenset[str]:
        """The axes that the address depends on (and k)."""
        return emitter.needs(self.term)


def stored_row(kernel: Kernel, term: Term, k: Axis, real: torch.dtype) -> StoredRow | None:
    """The stored row that `term` walks along as k runs, or None if its values have to be computed.

    `real` is the dtype that the product is accumulated in; only float32 takes narrower and stored formats.
    """
    if isinstance(term, Op) and term.name == "cast" and term.dtype == real:
        term = term.args[0]
    if isinstance(term, Decode):
        if term.format.removeprefix(LAYOUT) not in STORED_FORMATS:
            known = ", ".join(sorted(STORED_FORMATS))
            raise PrintError(f"stored format {term.format!r}; known: {known}")
        whole = term.column == k.symbol and not any(k.symbol in e.free_symbols for e in term.row)
        return StoredRow(term.format, term) if whole and real == torch.float32 else None
    if (
        not isinstance(term, Load)
        or term.dtype not in _DENSE
        or kernel.buffer(term.buffer).dtype != term.dtype
    ):
        return None
    if term.dtype != real and (real == torch.float64 or term.dtype == torch.float64):
        return None
    offset = linearize(term.index, kernel.buffer(term.buffer).shape)
    if k.symbol in sympy.expand(offset - k.symbol).free_symbols:
        return None
    return StoredRow(_DENSE[term.dtype], term)


def runs_along(kernel: Kernel, term: Term, axis: Axis) -> bool:
    """Whether the loads of `term` that depend on `axis` mostly move by one element as it does."""
    score = 0
    for node in walk(term):
        if not isinstance(node, Load) or not any(axis.symbol in e.free_symbols for e in node.index):
            continue
        step = linearize(node.index, kernel.buffer(node.buffer).shape).coeff(axis.symbol)
        score += 1 if step == 1 else -1
    return score > 0


def padded(extent: Expr, real: torch.dtype, line: int = 64) -> Expr:
    """`extent` rounded up to whole lines of `line` bytes."""
    lanes = line // real.itemsize
    if extent.is_Integer:
        return sympy.Integer(-(-int(extent) // lanes) * lanes)
    return FloorDiv(extent + lanes - 1, sympy.Integer(lanes)) * lanes
