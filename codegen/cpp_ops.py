"""Pointwise operations of the IR as C++ expressions: one table, one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from torchweld.codegen.cpp_names import HALVES, PrintError, converted, storage_type, value_type
from torchweld.graph.terms import Op

_INFIX: Final = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARE: Final = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGIC: Final = {"and": "&", "or": "|", "xor": "^"}
_CALLS: Final = frozenset({
    "exp", "exp2", "log", "log2", "log1p", "expm1", "sqrt", "tanh", "sigmoid", "erf", "sin", "cos", "floor", "ceil",
    "trunc", "erf_short",
})  # fmt: skip
# These give one of their arguments, which 16 bits hold already: nothing to round.
_EXACT: Final = frozenset({"where", "max", "min", "neg", "abs", "relu", "bitcast", "cast", "sign"})


def op_text(term: Op, args: Sequence[str]) -> str:
    """The expression of `term` on the texts of its arguments, in brackets where it needs them."""
    text = _text(term, args)
    if term.dtype in HALVES and term.name not in _EXACT:
        return f"tw_round_{HALVES[term.dtype]}({text})"
    return text


def _text(term: Op, args: Sequence[str]) -> str:
    name, dtype = term.name, term.dtype
    first = term.args[0].dtype
    match name:
        case "cast":
            return converted(args[0], first, dtype)
        case "bitcast":
            return _bitcast(args[0], first, dtype)
        case "where":
            yes, no = (converted(a, t.dtype, dtype) for a, t in zip(args[1:], term.args[1:], strict=True))
            return f"({args[0]} ? {yes} : {no})"
        case "isnan":
            return f"({args[0]} != {args[0]})" if first.is_floating_point else "false"
        case "isinf":
            return f"(tw_abs({args[0]}) == {_infinity(first)})" if first.is_floating_point else "false"
        case "not":
            return f"(!{args[0]})"
    if name in _COMPARE:
        common = _promoted(term.args[0].dtype, term.args[1].dtype)
        left, right = (converted(a, t.dtype, common) for a, t in zip(args, term.args, strict=True))
        return f"({left} {_COMPARE[name]} {right})"
    operands = [converted(a, t.dtype, dtype) for a, t in zip(args, term.args, strict=True)]
    if dtype.is_floating_point:
        return _real(term, operands)
    return _whole(term, operands)


def _real(term: Op, args: Sequence[str]) -> str:
    name, kind = term.name, value_type(term.dtype)
    one = "1.0f" if kind == "float" else "1.0"
    if name in _INFIX:
        return f"({args[0]} {_INFIX[name]} {args[1]})"
    if name in _CALLS:
        return f"tw_{name}({args[0]})"
    match name:
        case "neg":
            return f"(-{args[0]})"
        case "abs":
            return f"tw_abs({args[0]})"
        case "rsqrt":
            return f"({one} / tw_sqrt({args[0]}))"
        case "reciprocal":
            return f"({one} / {args[0]})"
        case "round":
            return f"tw_rint({args[0]})"
        case "sign":
            return f"tw_sign_real({args[0]})"
        case "relu":
            return f"tw_relu<{kind}>({args[0]})"
        case "max" | "min":
            return f"tw_{name}<{kind}>({args[0]}, {args[1]})"
        case "floordiv" | "mod":
            return f"tw_{name}_real<{kind}>({args[0]}, {args[1]})"
        case "pow" | "atan2":
            return f"tw_{name}({args[0]}, {args[1]})"
    raise PrintError(f"pointwise operation {name!r} on {term.dtype}: the C++ printer has no words for it")


def _whole(term: Op, args: Sequence[str]) -> str:
    name, kind, boolean = term.name, storage_type(term.dtype), term.dtype == torch.bool
    if name in _LOGIC:
        return _narrow(f"({args[0]} {_LOGIC[name]} {args[1]})", term.dtype)
    if name in ("add", "sub", "mul"):
        return _narrow(f"({args[0]} {_INFIX[name]} {args[1]})", term.dtype)
    match name:
        case "neg":
            return _narrow(f"(-{args[0]})", term.dtype)
        case "bitwise_not":
            return f"(!{args[0]})" if boolean else _narrow(f"(~{args[0]})", term.dtype)
        case "abs":
            return _narrow(f"({args[0]} < 0 ? -{args[0]} : {args[0]})", term.dtype)
        case "sign":
            return f"tw_sign<{kind}>({args[0]})"
        case "relu":
            return f"tw_relu<{kind}>({args[0]})"
        case "floor" | "ceil" | "round" | "trunc":
            return args[0]
        case "max" | "min":
            return f"tw_{name}<{kind}>({args[0]}, {args[1]})"
        case "floordiv" | "mod" | "pow":
            return f"tw_{name}_int<{kind}>({args[0]}, {args[1]})"
        case "shl":
            return _narrow(f"({args[0]} << {args[1]})", term.dtype)
        case "shr":
            return _narrow(f"({args[0]} >> {args[1]})", term.dtype)
    raise PrintError(f"pointwise operation {name!r} on {term.dtype}: the C++ printer has no words for it")


def _narrow(text: str, dtype: torch.dtype) -> str:
    # C++ computes small integers as int; the value wraps at the width of its own type.
    return f"({storage_type(dtype)}){text}" if dtype.itemsize < 4 or dtype == torch.bool else text


def _promoted(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if a == b else torch.promote_types(a, b)


def _infinity(dtype: torch.dtype) -> str:
    return "__builtin_inf()" if dtype == torch.float64 else "__builtin_inff()"


def _bitcast(text: str, source: torch.dtype, target: torch.dtype) -> str:
    if source in HALVES:
        bits = f"tw_to_{HALVES[source]}({text})"
    else:
        bits = f"({storage_type(source)}){text}"
    if target in HALVES:
        return f"tw_from_{HALVES[target]}((uint16_t){bits})"
    return f"tw_bitcast<{storage_type(target)}>({bits})"
