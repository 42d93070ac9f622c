"""Spelling: dtypes, index expressions and pointwise operations as Triton source text.

Values are held as the interpreter of the kernel IR holds them: bool as int1, integers in their own dtype, floats as
float32 (float64 for float64 terms).  16-bit floats are widened right after the load, so all arithmetic is float32.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import sympy
import torch

from torchweld.graph.index import FloorDiv, Mod
from torchweld.graph.terms import COMPARISONS, Expr

DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "tl.float64", torch.float32: "tl.float32", torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16", torch.int64: "tl.int64", torch.int32: "tl.int32", torch.int16: "tl.int16",
    torch.int8: "tl.int8", torch.uint8: "tl.uint8", torch.uint16: "tl.uint16", torch.uint32: "tl.uint32",
    torch.uint64: "tl.uint64", torch.bool: "tl.int1",
}  # fmt: skip

POINTER_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.uint16: "*u16", torch.uint32: "*u32", torch.uint64: "*u64", torch.bool: "*i1",
}  # fmt: skip


def carrier_name(dtype: torch.dtype) -> str:
    """The Triton dtype that values of `dtype` are held in."""
    return "tl.float32" if is_half(dtype) else DTYPE_NAMES[dtype]


def is_half(dtype: torch.dtype) -> bool:
    """float16 or bfloat16."""
    return dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Value:
    """Source text of a value, the tile dimensions that it spans, and how tightly the text binds.

    `is_atom`: needs no parentheses as an operand.  `is_literal`: a Python number, which has no methods.
    """

    text: str
    dims: frozenset[str] = frozenset()
    is_atom: bool = True
    is_literal: bool = False

    @property
    def operand(self) -> str:
        """The text as it stands beside an operator."""
        return self.text if self.is_atom else f"({self.text})"


@dataclass
class Names:
    """Python identifiers, each given out once."""

    used: set[str] = field(default_factory=set)

    def fresh(self, hint: str) -> str:
        """`hint` as an identifier, with a number behind it if it is taken."""
        base = "".join(c if c.isalnum() or c == "_" else "_" for c in hint) or "value"
        base = f"_{base}" if base[0].isdigit() else base
        name, count = base, 0
        while name in self.used or keyword.iskeyword(name):
            count += 1
            name = f"{base}_{count}"
        self.used.add(name)
        return name


def literal(value: float | int | bool) -> Value:
    """A number as Python text."""
    if isinstance(value, float) and not math.isfinite(value):
        return Value(f'float("{value}")', is_literal=True)
    return Value(repr(value), is_atom=value >= 0, is_literal=True)


def index_text(expr: Expr, symbol: Callable[[Expr], Value]) -> Value:
    """An index expression as source text; `symbol` spells its symbols."""
    if expr.is_Integer:
        return literal(int(expr))
    if expr.is_Symbol:
        return symbol(expr)
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        base = index_text(expr.base, symbol)
        return Value(" * ".join([base.operand] * int(expr.exp)), base.dims, is_atom=False)
    if expr.is_Mul and expr.args[0].is_Integer and len(expr.args) > 1:
        parts = [index_text(a, symbol) for a in (*expr.args[1:], expr.args[0])]
    else:
        args = sorted(expr.args, key=_significance) if expr.is_Add else expr.args
        parts = [index_text(a, symbol) for a in args]
    dims = frozenset[str]().union(*(p.dims for p in parts))
    if isinstance(expr, FloorDiv | Mod):
        sign = "//" if isinstance(expr, FloorDiv) else "%"
        return Value(f"({parts[0].operand} {sign} {parts[1].operand})", dims)
    if expr.is_Mul:
        return Value(" * ".join(p.operand for p in parts), dims, is_atom=False)
    if expr.is_Add:
        return Value(_sum_text(parts), dims, is_atom=False)
    name = {"Max": "maximum", "Min": "minimum"}.get(expr.func.__name__)
    if name is None:
        raise ValueError(f"index expression {expr}: {expr.func.__name__} has no spelling in Triton")
    text = parts[0].text
    for part in parts[1:]:
        text = f"tl.{name}({text}, {part.text})"
    return Value(text, dims)


def _significance(part: Expr) -> tuple[bool, int, int, str]:
    """Sort key of a sum's parts: the largest stride first, negative parts last."""
    coefficient, rest = part.as_coeff_Mul()
    factors = len(sympy.Mul.make_args(rest))
    return bool(coefficient < 0), -factors, -abs(int(coefficient)) if not rest.is_Integer else 0, str(rest)


def _sum_text(parts: list[Value]) -> str:
    text = parts[0].text
    for part in parts[1:]:
        text += f" - {part.text[1:]}" if part.is_literal and part.text.startswith("-") else f" + {part.text}"
    return text


@dataclass(frozen=True)
class Spelling:
    """How an operation is written: {a} {b} {c} are operands as they are, {p} {q} in parentheses if need be."""

    template: str
    helper: str | None = None
    is_atom: bool = True


def _call(function: str, arity: int = 1) -> Spelling:
    return Spelling(f"{function}({', '.join('{' + c + '}' for c in 'abc'[:arity])})")


def _helper(function: str, arity: int = 1) -> Spelling:
    return Spelling(_call(function, arity).template, helper=function)


def _infix(sign: str) -> Spelling:
    return Spelling(f"{{p}} {sign} {{q}}", is_atom=False)


SPELLINGS: Final[Mapping[str, Spelling]] = {
    "neg": Spelling("-{p}", is_atom=False),
    "abs": _call("tl.abs"),
    "exp": _call("tl.exp"),
    "exp2": _call("tl.exp2"),
    "log": _call("tl.log"),
    "log2": _call("tl.log2"),
    "log1p": _helper("log1p"),
    "expm1": _helper("expm1"),
    "sqrt": _call("tl.sqrt"),
    "rsqrt": _call("tl.rsqrt"),
    "reciprocal": Spelling("1.0 / {p}", is_atom=False),
    "tanh": _helper("tanh"),
    "sigmoid": _call("tl.sigmoid"),
    "erf": _call("tl.erf"),
    "sin": _helper("sin"),
    "cos": _helper("cos"),
    "floor": _call("tl.floor"),
    "ceil": _call("tl.ceil"),
    "round": _helper("round_half_even"),
    "trunc": Spelling("tl.where({p} < 0, tl.ceil({a}), tl.floor({a}))"),
    "not": Spelling("{p} == 0", is_atom=False),
    "isnan": Spelling("{p} != {p}", is_atom=False),
    "isinf": Spelling('tl.abs({a}) == float("inf")', is_atom=False),
    "sign": _helper("sign"),
    "relu": Spelling("tl.where({p} < 0, 0, {a})"),
    "bitwise_not": Spelling("~{p}", is_atom=False),
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _infix("/"),
    "floordiv": _helper("floor_divide", 2),
    "mod": _helper("floor_modulo", 2),
    "pow": _helper("power", 2),
    "max": Spelling("tl.where({p} > {q}, {a}, tl.where({p} == {p}, {b}, {a}))"),
    "min": Spelling("tl.where({p} < {q}, {a}, tl.where({p} == {p}, {b}, {a}))"),
    "eq": _infix("=="),
    "ne": _infix("!="),
    "lt": _infix("<"),
    "le": _infix("<="),
    "gt": _infix(">"),
    "ge": _infix(">="),
    "and": _infix("&"),
    "or": _infix("|"),
    "xor": _infix("^"),
    "shl": _infix("<<"),
    "shr": _infix(">>"),
    "atan2": _helper("atan2", 2),
    "where": _call("tl.where", 3),
}
"""Every pointwise operation but `cast` and `bitcast`.

`max`, `min` and `relu` are comparisons, because a comparison with NaN is false whatever the hardware's maximum does.
"""

FLOAT_SPELLINGS: Final[Mapping[str, Spelling]] = {
    "floordiv": _helper("float_floor_divide", 2),
    "mod": _helper("float_modulo", 2),
}
"""Spellings that differ for floats."""

EXACT_IN_HALF: Final = COMPARISONS | {
    "neg",
    "abs",
    "relu",
    "max",
    "min",
    "where",
    "floor",
    "ceil",
    "round",
    "trunc",
}
"""Operations whose result is representable in a 16-bit dtype if their operands are."""


DOUBLE_SPELLINGS: Final[Mapping[str, Spelling]] = {
    **FLOAT_SPELLINGS,
    "sin": _call("tl.sin"),
    "cos": _call("tl.cos"),
    "tanh": Spelling("1.0 - 2.0 / (tl.exp(2.0 * {p}) + 1.0)", is_atom=False),
}
"""Spellings that differ for float64."""


def spell(name: str, dtype: torch.dtype) -> Spelling:
    """The spelling of a pointwise operation whose first operand is of `dtype`."""
    if dtype == torch.float64:
        return DOUBLE_SPELLINGS.get(name, SPELLINGS[name])
    return FLOAT_SPELLINGS.get(name, SPELLINGS[name]) if dtype.is_floating_point else SPELLINGS[name]
