"""Products with packed weights in a MatmulPart: copies of the A rows in bfloat16 and int8, and which kernel runs.

    precision   1 to 16 rows                  more rows
    f32         float                         float
    bf16        float                         bfloat16 where the CPU multiplies it, else float
    int8        int8 in blocks of 32          bfloat16 where the CPU multiplies it, else int8

Weights that are plain numbers in the model are kept in bfloat16 for the last two. They have no int8 kernel, and where
the CPU has AMX they meet bfloat16 whatever the number of rows: the tile reads them as they are packed, 16 rows in the
time of one. Up to 16 rows a row has the same bits whatever their number, and so it
has beyond 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torchweld.codegen.cpp_operand import StoredRow
from torchweld.graph.terms import Expr

Precision = Literal["f32", "bf16", "int8"]
PRECISIONS: Final = ("f32", "bf16", "int8")
FEW_ROWS: Final = 16
"""The greatest number of rows whose bits must not depend on their number: what a step of decoding verifies."""
_NARROW_BYTES: Final = 1 << 20  # A rows in bfloat16: they stay in an L2 cache of 2 MiB
_MOST_NARROW_ROWS: Final = 256


@dataclass(frozen=True)
class Copies:
    """Names of the copies of a panel: bfloat16 rows; where int8 is wished, what packed_int8.h makes of a row."""

    half: str
    codes: str | None
    scales: str
    offsets: str
    sums: str


def make_copies(fresh: Callable[[str], str], precision: Precision) -> Copies:
    """Names for a panel."""
    codes = fresh("a_codes") if precision == "int8" else None
    return Copies(fresh("a_half"), codes, fresh("a_scales"), fresh("a_offsets"), fresh("a_code_sums"))


def narrow_rows(width: int) -> int:
    """Rows of a block in bfloat16, a multiple of 32."""
    return max(32, min(_MOST_NARROW_ROWS, _NARROW_BYTES // (2 * width) // 32 * 32))


def allocate_copies(
    allocate: Callable[[str, str, int, Expr], None], copies: Copies, width: Expr, rows: int, few: int
) -> None:
    """Room for the copies: `rows` rows in bfloat16, `few` rows in int8, in whole tiles of 16."""
    allocate(copies.half, "uint16_t", 2, width * rows)
    if copies.codes is not None:
        few = -(-few // 16) * 16
        allocate(copies.codes, "int8_t", 1, width * few)
        allocate(copies.scales, "float", 4, width / 32 * few)
        allocate(copies.offsets, "float", 4, width / 32 * few)
        allocate(copies.sums, "int32_t", 4, width / 16 * few)


def copy_lines(copies: Copies, row: str, stride: str) -> list[str]:
    """Statements behind the filling of a row at `row`: its copies."""
    lines = [f"if (narrow) tw_round_row({row}, {stride}, r, {copies.half});"]
    if copies.codes is not None:
        lines += [
            f"else if (tw_has_int8) tw_quantize_row({row}, {stride}, r, {copies.codes}, {copies.scales},",
            f"    {copies.offsets}, {copies.sums});",
        ]
    return lines


def product_lines(
    stored: StoredRow,
    base: str,
    a: Sequence[str],
    copies: Copies | None,
    out: str,
    out_stride: int,
    room: str,
) -> list[str]:
    """The product of the rows of a block with the columns of a block; `a` are the rows, their stride and their sums."""
    panel, stride, sums = a
    rows, steps = "block_end - first_row", f"{stride} / 32"
    plain = [
        f"tw_packed_matmul<tw_{stored.format}>({panel}, {stride}, {rows}, {sums},",
        f"    {base}, width, {steps}, {out}, {out_stride});",
    ]
    if copies is None:
        return plain
    lines = [
        "if (narrow) {",
        f"    tw_packed_bf16<tw_{stored.format}>({copies.half}, {stride}, {rows}, {base}, width, {steps},",
        f"        {out}, {out_stride}, {room});",
    ]
    if copies.codes is not None and stored.has_codes:
        lines += [
            "} else if (tw_has_int8) {",
            f"    tw_packed_int8<tw_{stored.format}>({copies.codes}, {rows}, {copies.scales}, {copies.offsets},",
            f"        {copies.sums}, {base}, width, {steps}, {out}, {out_stride});",
        ]
    return [*lines, "} else {", *(f"    {line}" for line in plain), "}"]
