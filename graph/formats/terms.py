"""Stored weight formats as terms: the value of element `i` of a block from its bytes.

This is the one description of a format that the code printers read; `StoredFormat.decode` is the same meaning in
plain torch, and tests hold the two equal bit for bit.  Layouts: the GGUF specification, checked against `gguf.quants`.

`read(offset, dtype)` gives the little-endian number of `dtype` that stands `offset` bytes after the block's start;
`i` is an index expression with 0 <= i < block.  Arithmetic is float32, in the order that `gguf.quants` uses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sympy import Integer

from torchweld.graph.index import FloorDiv, Mod
from torchweld.graph.terms import Expr, IndexValue, Term, cast, const, op

Read = Callable[[Expr, torch.dtype], Term]

I32 = torch.int32
F32 = torch.float32


def _int(value: int) -> Term:
    return const(value, I32)


def _index(expr: Expr) -> Term:
    return IndexValue(I32, expr)


def _byte(read: Read, offset: Expr) -> Term:
    return cast(read(offset, torch.uint8), I32)


def _half(read: Read, offset: int) -> Term:
    return cast(read(Integer(offset), torch.float16), F32)


def _nibble(read: Read, base: int, i: Expr, run: int) -> Term:
    """Nibbles in runs: `run` low ones, then the `run` high ones of the same bytes."""
    byte = _byte(read, base + FloorDiv(i, Integer(2 * run)) * run + Mod(i, Integer(run)))
    shift = op("mul", _index(Mod(FloorDiv(i, Integer(run)), Integer(2))), _int(4))
    return op("and", op("shr", byte, shift), _int(15))


def _fifth_bit(read: Read, base: int, i: Expr) -> Term:
    """Bit i of the 32-bit word at `base`, as 0 or 16."""
    byte = _byte(read, base + FloorDiv(i, Integer(8)))
    return op("shl", op("and", op("shr", byte, _index(Mod(i, Integer(8)))), _int(1)), _int(4))


def _scaled(scale: Term, quant: Term) -> Term:
    return op("mul", scale, cast(quant, F32))


def _q8_0(read: Read, i: Expr) -> Term:
    return _scaled(_half(read, 0), cast(read(2 + i, torch.int8), I32))


def _q4_0(read: Read, i: Expr) -> Term:
    return _scaled(_half(read, 0), op("sub", _nibble(read, 2, i, 16), _int(8)))


def _q4_1(read: Read, i: Expr) -> Term:
    return op("add", _scaled(_half(read, 0), _nibble(read, 4, i, 16)), _half(read, 2))


def _q5_0(read: Read, i: Expr) -> Term:
    quant = op("or", _nibble(read, 6, i, 16), _fifth_bit(read, 2, i))
    return _scaled(_half(read, 0), op("sub", quant, _int(16)))


def _q5_1(read: Read, i: Expr) -> Term:
    quant = op("or", _nibble(read, 8, i, 16), _fifth_bit(read, 4, i))
    return op("add", _scaled(_half(read, 0), quant), _half(read, 2))


def _six_bit_scale_and_min(read: Read, base: int, i: Expr) -> tuple[Term, Term]:
    """The packed 6-bit scale and minimum of the 32-element group that holds `i` (12 bytes for 8 groups)."""
    group = FloorDiv(i, Integer(32))
    low_group = Mod(group, Integer(4))
    is_low = op("lt", _index(group), _int(4))
    a = _byte(read, base + low_group)
    b = _byte(read, base + 4 + low_group)
    c = _byte(read, base + 8 + low_group)

    def high_bits(byte: Term) -> Term:
        return op("shl", op("shr", byte, _int(6)), _int(4))

    scale = op("where", is_low, op("and", a, _int(63)), op("or", op("and", c, _int(15)), high_bits(a)))
    minimum = op("where", is_low, op("and", b, _int(63)), op("or", op("shr", c, _int(4)), high_bits(b)))
    return scale, minimum


def _k_affine(read: Read, i: Expr, quant: Term) -> Term:
    scale, minimum = _six_bit_scale_and_min(read, 4, i)
    return op(
        "sub", op("mul", _scaled(_half(read, 0), scale), cast(quant, F32)), _scaled(_half(read, 2), minimum)
    )


def _q4_k(read: Read, i: Expr) -> Term:
    return _k_affine(read, i, _nibble(read, 16, i, 32))


def _q5_k(read: Read, i: Expr) -> Term:
    high = _byte(read, 16 + Mod(i, Integer(32)))
    bit = op("and", op("shr", high, _index(FloorDiv(i, Integer(32)))), _int(1))
    return _k_affine(read, i, op("or", _nibble(read, 48, i, 32), op("shl", bit, _int(4))))


def _q6_k(read: Read, i: Expr) -> Term:
    low = _nibble(read, 0, i, 64)
    quarter = Mod(FloorDiv(i, Integer(32)), Integer(4))
    byte = _byte(read, 128 + FloorDiv(i, Integer(128)) * 32 + Mod(i, Integer(32)))
    high = op("and", op("shr", byte, op("mul", _index(quarter), _int(2))), _int(3))
    quant = op("sub", op("or", low, op("shl", high, _int(4))), _int(32))
    scale = cast(read(192 + FloorDiv(i, Integer(16)), torch.int8), I32)
    return op("mul", _scaled(_half(read, 208), scale), cast(quant, F32))


def _dense(dtype: torch.dtype) -> Callable[[Read, Expr], Term]:
    return lambda read, i: cast(read(Integer(0), dtype), F32)


_ELEMENTS: dict[str, Callable[[Read, Expr], Term]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "F16": _dense(torch.float16), "BF16": _dense(torch.bfloat16), "F32": _dense(torch.float32),
}  # fmt: skip


def decode_terms(format: str, read: Read, i: Expr) -> Term:
    """The float32 value of element `i` of a block of `format`; KeyError for a format that is not stored."""
    if format not in _ELEMENTS:
        raise KeyError(f"stored format {format!r}: no terms; known are {', '.join(sorted(_ELEMENTS))}")
    return _ELEMENTS[format](read, i)
