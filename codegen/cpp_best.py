"""Searching a matmul's products in C++: the greatest entries of every row, kept while the products are made.

    every thread: a sorted list per row
        for each of its blocks of columns, for each row:
            scores of the block -> `found`;  one vectorized comparison with the last of the list, which most blocks
            end with;  the few better ones are inserted (best.h)
    whoever finishes last: the lists of all threads joined, then the stores

Scores are never written to memory. A list does not depend on how rows and columns were shared out, bit for bit: of
equals the lower place comes first, whoever met it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from torchweld.codegen.cpp_names import unwrapped, value_type
from torchweld.codegen.cpp_terms import Emitter
from torchweld.codegen.cpp_text import indented
from torchweld.codegen.families.common import product
from torchweld.codegen.ir import MatmulPart
from torchweld.graph.terms import Expr, Fold, Term

_FRONT = 8192  # tw_lists_begin: counters of whoever has the memory, zero before and after every run
_LINE = 64


@dataclass(frozen=True)
class ListRoom:
    """Memory that all threads see: a counter, and per thread and row a list of `count` values and places."""

    rows: Expr
    count: int

    @classmethod
    def of(cls, part: MatmulPart) -> ListRoom:
        """Of a part with choices."""
        return cls(product(axis.extent for axis in (*part.batch, *part.rows)), entries(part))

    def nbytes(self, value: Callable[[Expr], int], threads: int) -> int:
        """Bytes for the sizes that `value` knows; tw_best of best.h lays them out."""
        rows = value(sympy.sympify(self.rows))
        places = rows * self.count * 8
        return _FRONT + threads * (-(-(rows * 8 + 2 * places) // _LINE) * _LINE)


def entries(part: MatmulPart) -> int:
    """How many entries of each row a part finds."""
    return int(part.ranks[0].extent) if part.ranks else 1


class BestPrinter:
    """The statements of a search, for the printer of its MatmulPart."""

    def __init__(self, part: MatmulPart, place: int) -> None:
        self.part, self.place = part, place
        self.score: Term = self._fold(0).body
        self.kind = value_type(self.score.dtype)

    def _fold(self, number: int) -> Fold:
        fold = self.part.choices[number].term
        assert isinstance(fold, Fold)
        return fold

    def begin(self) -> list[str]:
        """Statements in front of the loop over units."""
        kind = f"tw_best<{self.kind}, {entries(self.part)}>"
        return [f"{kind} best(buffers[{self.place}], batch * rows, thread, threads);"]

    def keep(self, emitter: Emitter) -> None:
        """The statement for column j of a block."""
        emitter.line(f"found[j] = {unwrapped(emitter.value(self.score))};")

    def around(self, loop: Sequence[str], width: int) -> list[str]:
        """Statements for row m: the loop over the columns, and what becomes of the scores."""
        line = "block / row_blocks * rows + m"
        return [f"{self.kind} found[{width}];", *loop, f"best.add({line}, found, width, first_column);"]

    def end(self, emitter: Emitter) -> list[str]:
        """Statements behind the loop over units: whoever comes last joins the lists and stores."""
        part = self.part
        for axis in part.ranks:
            emitter.axis(axis)
        names = tuple(axis.name for axis in (*part.batch, *part.rows, *part.ranks))
        emitter.push((*names, *(f"ref:{bind.name}" for bind in part.choices)))
        for number, bind in enumerate(part.choices):
            fold = self._fold(number)
            rank = "0" if fold.rank is None else unwrapped(emitter.index(fold.rank))
            entry = "value" if fold.monoid.kind == "max" else "place"
            emitter.define_ref(bind.name, f"best.{entry}(line, {rank})", bind.term.dtype)
        for store in part.stores:
            emitter.store(store)
        body = emitter.pop()
        for axis in part.ranks:
            name = emitter.axis(axis)
            body = [f"for (int64_t {name} = 0; {name} < {axis.extent}; ++{name}) {{", *indented(body), "}"]
        body = ["best.join(line);", *emitter.unflatten("line", (*part.batch, *part.rows)), *body]
        loop = ["for (int64_t line = 0; line < batch * rows; ++line) {", *indented(body), "}"]
        return ["if (best.is_last()) {", *indented(loop), "}"]
