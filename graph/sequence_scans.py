"""Running values and scans over the sequence: cumsum, cumprod, logcumsumexp, cummax, cummin, and torch's scans.

    RUNNING[aten.cumprod.default]      # "product", a kind of torchweld::cached_running
    SCAN_RULES                         # the rules of the ATen ones for `sequence.walk_sequence`
    scan_rule(node)                    # that of a Scan (graph/ops/scan.py); None for any other node

All look back through one value only, the last one: it is the whole state.  A scan from the end looks ahead; it is
spelled with a flip, which is refused on its own.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import sympy
import torch
from torch import fx

from torchweld.graph.match import aten, axis_argument, rank_of, shape_of
from torchweld.graph.ops.scan import Scan
from torchweld.graph.sequence import Along, Mixes, Rule, Scope, op_name

RUNNING: Final[dict[Any, str]] = {
    aten.cumsum.default: "sum",
    aten.cumprod.default: "product",
    aten.logcumsumexp.default: "logsumexp",
    aten.cummax.default: "maximum",
    aten.cummin.default: "minimum",
}


def values_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of a running value; of the values of a maximum, not of their places."""
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    dtype: torch.dtype = first.dtype
    return dtype


def part_users(node: fx.Node, part: int) -> list[fx.Node]:
    """The nodes that take result number `part` of a call with several."""
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == part]


def _running(scope: Scope, node: fx.Node) -> Along:
    """It carries its last value; a line, such as counted positions, is a source instead."""
    source: Any = node.args[0]
    along = scope.of(source)
    if along is None:
        raise Mixes(f"{op_name(node)} has bounds that depend on the sequence")
    if along.axis != axis_argument(node, 1, "dim", rank_of(source)):
        return along
    single = isinstance(node.meta["val"], torch.Tensor)
    if single and not along.tokens and scope.line(node, along.axis) is not None:
        raise Mixes("a line of positions")  # the caller asks for the line again and notes a source
    name = str(node.target).split(".")[-2]
    if not scope.is_whole(source, along.axis):
        raise Mixes(f"{name} over the sequences of a batch, one behind the other")
    others = [size for axis, size in enumerate(shape_of(source)) if axis != along.axis]
    if not all(_is_fixed(scope, size) for size in others):
        raise Mixes(f"{name} of a value whose other sizes vary")
    if values_dtype(node).is_complex:
        raise Mixes(f"{name} of complex numbers has no state rule")
    scope.carried.append(node)
    return Along(along.axis, tokens=True)


def _is_fixed(scope: Scope, size: Any) -> bool:
    """Is a size a number in a batch of one?"""
    return bool(sympy.sympify(size).subs(shape_of(scope.tokens)[0], 1).is_Integer)


def _scan(scope: Scope, node: fx.Node) -> Along:
    """It carries what its body carries; rows are read one by one, everything else must be there from the start."""
    initial, rows, shared = node.args
    for row in rows:  # type: ignore[union-attr]
        along = scope.of(row)
        if along is None or along.axis != 0:
            raise Mixes(
                "a scan over another axis than the sequence: what its body does to positions is not followed"
            )
        if not scope.is_whole(row, 0):  # type: ignore[arg-type]
            raise Mixes("a scan over the sequences of a batch, one behind the other")
    for words, operands in (("begins with", initial), ("closes over", shared)):
        for operand in operands:  # type: ignore[union-attr]
            if scope.of(operand) is not None:
                raise Mixes(f"a scan that {words} a value of all positions, {operand}")
            if operand in scope.encoder:
                raise Mixes(f"a scan that {words} {operand}, which depends on other inputs than the tokens")
    sizes = [size for like in initial or rows for size in shape_of(like)[0 if initial else 1 :]]  # type: ignore[union-attr,arg-type]
    if not all(_is_fixed(scope, size) for size in sizes):
        raise Mixes("a scan whose carry varies in size")
    scope.carried.append(node)
    return Along(0, tokens=True)


SCAN: Final = Rule(_scan)
SCAN_RULES: Final[dict[Any, Rule]] = dict.fromkeys(RUNNING, Rule(_running))
"""What running values do to the sequence axis."""


def scan_rule(node: fx.Node) -> Rule | None:
    """The rule of a scan; None for any other call."""
    return SCAN if isinstance(node.target, Scan) else None
