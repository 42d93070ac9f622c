"""Products with packed weights in a MatmulPart: copies of the A rows in bfloat16 and int8, and which kernel runs.

    precision   weights       1 to 16 rows              more rows
    f32         any           float                     float
    bf16        stored        float                     bfloat16 where the CPU multiplies it, else float
    bf16        plain: bf16   bfloat16 where the CPU has AMX tiles, else as above
    int8        stored        int8 in blocks of 32      bfloat16 where the CPU multiplies it, else int8
    int8        plain: int8   8 bits, one scale per row of activations and of weights (runtime/packed_whole.h)

Plain weights are numbers in the model. In bfloat16 AMX reads them as they are packed, 16 rows in the time of one. In
int8 sums of integers are exact: any CPU and any number of rows give the same bits. Otherwise a row has the same bits
whatever their number up to 16 rows, and beyond 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import sympy

from torchweld.codegen.cpp_operand import StoredRow
from torchweld.codegen.packing import LAYOUT
from torchweld.graph.terms import Expr

Precision = Literal["f32", "bf16", "int8"]
PRECISIONS: Final = ("f32", "bf16", "int8")
FEW_ROWS: Final = 16
"""The greatest number of rows whose bits must not depend on their number: what a step of decoding verifies."""
MOST_PIECE_ROWS: Final = 48
"""The greatest tw_bf16_piece of packed_bf16.h."""
_NARROW_BYTES: Final = 1 << 20  # A rows in bfloat16: they stay in an L2 cache of 2 MiB
_MOST_NARROW_ROWS: Final = 256


@dataclass(frozen=True)
class Copies:
    """Names of the copies of a panel, each only where some product reads it.

    half: bfloat16 rows.  codes: what packed_int8.h makes of a row.  whole: what packed_whole.h makes of one.
    """

    half: str | None
    codes: str | None
    whole: str | None
    scales: str
    offsets: str
    sums: str
    whole_scales: str
    whole_zeros: str


def make_copies(
    fresh: Callable[[str], str], precision: Precision, rows: Sequence[StoredRow | None]
) -> Copies | None:
    """Names for a panel that meets the weights `rows` (None: one that is computed); None if it needs no copies."""
    whole = [row for row in rows if row is not None and row.is_whole]
    packed = all(row is not None and row.packed for row in rows) and precision != "f32"
    if not whole and not packed:
        return None
    blocks = packed and len(whole) < len(rows)
    return Copies(
        fresh("a_half") if blocks else None, fresh("a_codes") if blocks and precision == "int8" else None,
        fresh("a_whole") if whole else None, fresh("a_scales"), fresh("a_offsets"), fresh("a_code_sums"),
        fresh("a_whole_scales"), fresh("a_whole_zeros"),
    )  # fmt: skip


def copies_replace_rows(rows: Sequence[StoredRow | None]) -> str:
    """The C++ condition under which products read the copies only, so that the panel itself is one row long.

    Else, and for weights without codes where a tile of AMX is as fast for one row, rows are rounded to bfloat16.
    """
    if not all(row is not None and row.packed for row in rows):
        return "false"
    if all(row is not None and row.is_whole for row in rows):
        return "true"
    plain = not any(row is not None and row.has_codes for row in rows)
    return f"tw_has_bf16 && (rows > {FEW_ROWS}{' || tw_has_tiles' if plain else ''})"


def narrow_rows(width: int) -> int:
    """Rows of a block in bfloat16, a multiple of 32."""
    return max(32, min(_MOST_NARROW_ROWS, _NARROW_BYTES // (2 * width) // 32 * 32))


def allocate_copies(
    allocate: Callable[[str, str, int, Expr], None], copies: Copies, width: Expr, rows: int, few: int
) -> None:
    """Room for the copies: `rows` rows (whole tiles of 32) in bfloat16 and whole int8, `few` in blocks of int8."""
    rows = -(-rows // 32) * 32
    if copies.half is not None:
        allocate(copies.half, "uint16_t", 2, width * rows)
    if copies.whole is not None:
        allocate(copies.whole, "uint8_t", 1, (width + 32) * rows)
        allocate(copies.whole_scales, "float", 4, sympy.Integer(rows))
        allocate(copies.whole_zeros, "int32_t", 4, sympy.Integer(rows))
    if copies.codes is not None:
        few = -(-few // 16) * 16
        allocate(copies.codes, "int8_t", 1, width * few)
        allocate(copies.scales, "float", 4, width / 32 * few)
        allocate(copies.offsets, "float", 4, width / 32 * few)
        allocate(copies.sums, "int32_t", 4, width / 16 * few)


def copy_lines(copies: Copies, row: str, stride: str, *, is_narrow: bool = False) -> list[str]:
    """Statements behind the filling of a row at `row`: its copies; is_narrow: where `narrow` is known to hold."""
    lines = []
    if copies.whole is not None:
        place = f"{copies.whole}, {copies.whole_scales}, {copies.whole_zeros}"
        lines.append(f"tw_quantize_whole({row}, {stride}, r, {place});")
    if copies.half is not None:
        lines.append(f"{'' if is_narrow else 'if (narrow) '}tw_round_row({row}, {stride}, r, {copies.half});")
    if copies.codes is not None and not is_narrow:
        lines += [
            f"else if (tw_has_int8) tw_quantize_row({row}, {stride}, r, {copies.codes}, {copies.scales},",
            f"    {copies.offsets}, {copies.sums});",
        ]
    return lines


def weight_lines(stored: StoredRow, base: str, stride: str, name: str, room: str, block: int) -> list[str]:
    """The weights of a block of columns as bfloat16 tiles, unpacked into `room` where they are stored otherwise.

    Of weights with one scale per row: these scales, and behind `block` of them the sums of the rows' codes.
    """
    if stored.is_whole:
        return [
            f"const float* const {name} = (const float*){room};",
            f"tw_whole_scales({base}, width, {stride} / 32, {block}, (float*){room});",
        ]
    return [
        f"const uint8_t* const {name} = !narrow ? nullptr :",
        f"    tw_bf16_weights<tw_{stored.format}>({base}, width, {stride} / 32, {room});",
    ]


def product_text(
    stored: StoredRow | None, copies: Copies | None, out: str, at: str, weights: str, block: int
) -> str:
    """The C++ value of the product of row r and column j of a block, whose sum is out[at]."""
    if copies is None or stored is None or not stored.is_whole:
        return f"{out}[{at}]"
    row = f"{copies.whole_scales}[r], {copies.whole_zeros}[r]"
    return f"tw_whole_product({out}, {at}, {row}, {weights}, {weights} + {block}, j)"


def sums_wanted(copies: Copies) -> str:
    """When sums of every 32 numbers of a row are read: in products in float. Formats with an offset have codes."""
    return "!narrow" if copies.codes is None else "!narrow && !tw_has_int8"


def product_lines(
    stored: StoredRow,
    base: str,
    a: Sequence[str],
    copies: Copies | None,
    out: str,
    out_stride: int,
    weights: str,
) -> list[str]:
    """The product of the rows of a piece with the columns of a block; `a` are the rows, their stride and their sums.

    The rows are those from `piece` to `piece_end` of the block; a piece is the whole block where they are float.
    """
    panel, stride, sums = a
    steps = f"{stride} / 32"
    rows = "block_end - first_row" if copies is None else "piece_end"
    if copies is not None and stored.is_whole:
        return [
            "if (!narrow) tw_tiles_on();",
            f"tw_packed_whole({copies.whole}, piece, piece_end, block_end - first_row, {base}, width, {steps},",
            f"    {out}, {out_stride});",
            "if (!narrow) tw_tiles_off();",
        ]
    plain = [
        f"tw_packed_matmul<tw_{stored.format}>({panel}, {stride}, {rows}, {sums},",
        f"    {base}, width, {steps}, {out}, {out_stride});",
    ]
    if copies is None or copies.half is None:
        return plain
    lies = stored.format == LAYOUT + "BF16"  # weights are multiplied where they lie
    lines_ahead = ", piece, tw_bf16_lines(block_end - first_row)" if lies else ""
    ahead = f"    tw_bf16_ahead<tw_{stored.format}>({base}, width, {steps}, piece, block_end - first_row);"
    lines = [
        "if (narrow) {",
        *([ahead] if stored.has_codes else []),
        f"    tw_bf16_matmul({copies.half} + piece * {stride}, {stride}, piece_end - piece, {weights}, width,",
        f"        {steps}, {out}, {out_stride}{lines_ahead});",
    ]
    if copies.codes is not None and stored.has_codes:
        lines += [
            "} else if (tw_has_int8) {",
            f"    tw_packed_int8<tw_{stored.format}>({copies.codes}, {rows}, {copies.scales}, {copies.offsets},",
            f"        {copies.sums}, {base}, width, {steps}, {out}, {out_stride});",
        ]
    return [*lines, "} else {", *(f"    {line}" for line in plain), "}"]
