"""Loops cut into pieces where an index wraps, so that the compiler sees straight rows and vectorizes every piece.

before:  for (i = 0; i < 64; ++i) ... x[(32 + i) % 64] ...     a division and a scalar load per element
after:   for (i_first = 0; i_first < 64; i_first += 32)        unrolled, so i_first is a constant,
             for (i_lane = 0; i_lane < 32; ++i_lane)           and (32 + i) % 64 is i_lane plus a constant
         and i / 64 and i % 64 are written as i_first / 64 and i_first % 64 + i_lane
why:     rotary embeddings read the other half of a head, and the input of an output projection lies head by head
         (there gcc 12 makes a vector loop of the first piece only unless these are written out)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Final

from torchweld.codegen.cpp_text import indented
from torchweld.graph.index import FloorDiv, Mod
from torchweld.graph.terms import Axis, Expr, Term, index_exprs

_MOST_PIECES: Final = 32  # each is code of its own
_LEAST_PIECE: Final = 16  # elements: a vector


def piece_length(terms: Iterable[Term], axis: Axis) -> int | None:
    """Length of the pieces of `axis` inside which no `(axis + c) % m` or `(axis + c) // m` in `terms` wraps.

    None where nothing wraps, the extent is a symbol, or the pieces would be many or short.
    """
    if not axis.extent.is_Integer:
        return None
    extent = int(axis.extent)
    wrapping = {f for term in terms for expr in index_exprs(term) for f in expr.atoms(Mod, FloorDiv)}
    length = math.gcd(extent, *(wrap for function in wrapping for wrap in _wraps(function, axis)))
    return length if _LEAST_PIECE <= length < extent <= length * _MOST_PIECES else None


def _wraps(function: Expr, axis: Axis) -> tuple[int, ...]:
    """The first place inside the axis where a Mod or FloorDiv of axis + constant wraps, and the way to the next."""
    dividend, divisor = function.args
    start = dividend - axis.symbol
    if not (start.is_Integer and divisor.is_Integer):
        return ()
    first = int(divisor) - int(start) % int(divisor)
    return (first, int(divisor)) if first < int(axis.extent) else ()


def loop_in_pieces(name: str, extent: int, length: int, lines: Sequence[str]) -> list[str]:
    """`lines` in a loop over `name` from 0 to `extent`, in unrolled pieces of `length`."""
    first, lane = f"{name}_first", f"{name}_lane"

    def straight(wrap: re.Match[str]) -> str:
        if int(wrap[2]) % length:
            return wrap[0]
        return f"({first} / {wrap[2]})" if wrap[1] == "/" else f"({first} % {wrap[2]} + {lane})"

    wraps = re.compile(rf"\({re.escape(name)} ([/%]) (\d+)\)")
    inner = [f"const int64_t {name} = {first} + {lane};", *(wraps.sub(straight, line) for line in lines)]
    return [
        f"#pragma GCC unroll {extent // length}",
        f"for (int64_t {first} = 0; {first} < {extent}; {first} += {length}) {{",
        "#pragma GCC ivdep",
        *indented([f"for (int64_t {lane} = 0; {lane} < {length}; ++{lane}) {{", *indented(inner), "}"]),
        "}",
    ]
