"""A kernel as a few lines of mathematics, for the head of its file: what is bound, what is stored, over which axes."""

from __future__ import annotations

from torchweld.codegen.ir import AttentionPart, Kernel, MatmulPart, Part, RowPart, part_axes, part_binds
from torchweld.graph.terms import (
    Attend,
    Axis,
    Const,
    Contract,
    Decode,
    Expr,
    Fold,
    Guard,
    IndexValue,
    Load,
    Op,
    Ref,
    Term,
)

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
          "ge": ">=", "and": "&", "or": "|"}  # fmt: skip
_DEPTH = 7
_LONGEST = 220


def formula(kernel: Kernel) -> list[str]:
    """One line per bind and store; subterms beyond a depth are shortened to `...`."""
    lines: list[str] = []
    for part in kernel.parts:
        lines.append(f"{_family(part)} over {_axes(part_axes(part))}:")
        lines += [f"    {bind.name} = {_short(_text(bind.term, _DEPTH))}" for bind in part_binds(part)]
        for store in part.stores:
            value = _short(_text(store.value, _DEPTH))
            lines.append(f"    {store.buffer}[{_index(store.index)}] = {value}")
    for indirect in kernel.indirects:
        lines.append(f"where {indirect.symbol} = {_short(_text(indirect.term, _DEPTH))} < {indirect.extent}")
    return lines


def _family(part: Part) -> str:
    match part:
        case RowPart():
            return "rows"
        case MatmulPart():
            return "matmul"
        case AttentionPart():
            return "attention"


def _axes(axes: tuple[Axis, ...]) -> str:
    return ", ".join(f"{axis.name} < {axis.extent}" for axis in axes)


def _index(index: tuple[Expr, ...]) -> str:
    return ", ".join(map(str, index))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."


def _text(term: Term, depth: int) -> str:
    if depth == 0 and not isinstance(term, Const | Ref | Load):
        return "..."
    match term:
        case Const():
            return f"{term.value:g}" if isinstance(term.value, float) else str(term.value)
        case IndexValue():
            return f"({term.expr})"
        case Ref():
            return term.name
        case Load():
            return f"{term.buffer}[{_index(term.index)}]"
        case Decode():
            return f"{term.format}({term.buffer})[{_index((*term.row, term.column))}]"
        case Op():
            return _op_text(term, depth)
        case Guard():
            condition, value, other = (_text(t, depth - 1) for t in (term.condition, term.value, term.other))
            return f"({value} if {condition} else {other})"
        case Fold():
            rank = "" if term.rank is None else f", number {term.rank}"
            return f"{term.monoid.kind}[{_axes(term.axes)}{rank}]({_text(term.body, depth - 1)})"
        case Contract():
            return f"sum[{_axes((term.k,))}]({_text(term.a, depth - 1)} * {_text(term.b, depth - 1)})"
        case Attend():
            return _attend_text(term, depth)
    return type(term).__name__


def _op_text(term: Op, depth: int) -> str:
    args = [_text(arg, depth - 1) for arg in term.args]
    if term.name == "cast":
        return f"{args[0]}.to({str(term.dtype).removeprefix('torch.')})"
    if term.name in _SIGNS:
        return f"({args[0]} {_SIGNS[term.name]} {args[1]})"
    return f"{term.name}({', '.join(args)})"


def _attend_text(term: Attend, depth: int) -> str:
    q, k, v = (_text(t, depth - 1) for t in (term.q, term.k, term.v))
    scores = f"{term.scale:g} * sum[{_axes((term.d,))}]({q} * {k})"
    if term.soft_cap > 0:
        scores = f"cap({scores}, {term.soft_cap:g})"
    if term.mask is not None:
        scores += f", mask {_text(term.mask, depth - 1)}"
    kind = f"window of {term.window}" if term.mask_kind == "window" else term.mask_kind
    if term.past is not None:
        tree = f", tree {_text(term.path, depth - 1)}" if term.path is not None else ""
        kind += f" over a cache after {_text(term.past, depth - 1)}{tree}"
    sink = "" if term.sinks is None else f", sink {_text(term.sinks, depth - 1)}"
    return f"softmax[{_axes((term.s,))}]({scores}, positions: {kind}{sink}) @ {v}"
