"""The steps of a mask's proof in words: what it is made of, where that was written, and what each part shows.

    and_4 = logical_and(eq_1, logical_and(gt, le_5))
    "eq_1 hides nothing (masking_utils.py:161: ...), gt shows d <= 31 (...), le_5 shows d >= 0 (...)"

For people; nothing is decided here. Every part is evaluated by the same prover as the whole mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import fx

from torchweld.graph.bands import Interval
from torchweld.graph.match import aten, dtype_of, is_call, shape_of
from torchweld.graph.positions import Prover, Unprovable
from torchweld.graph.program import source_line
from torchweld.passes.match_attention import Mask

CODE: Final = 64
"""Characters of a source line that are shown."""


def show_parts(prover: Prover, mask: Mask) -> str:
    """What each part of a conjunction shows, in graph order, or where the mask was written if it is one part; empty for
    a mask that is not made of truth values, or says what is hidden."""
    parts = [node for node in dict.fromkeys(_parts(mask.node)) if dtype_of(node) == torch.bool]
    if mask.inverted or not parts:
        return ""
    if parts == [mask.node]:
        return f"written at {_place(mask.node)}"
    shown: list[str] = []
    for node in sorted(parts):
        if all(size == 1 for size in shape_of(node)):
            continue  # a literal
        try:
            visible = prover.scores_value(node).intervals(bool)
        except Unprovable as problem:
            shown.append(f"{node.name} is not decided alone: {problem}")
            continue
        shown.append(f"{node.name} {show_distances(visible)} ({_place(node)})")
    return ", ".join(shown)


def show_distances(visible: Sequence[Interval]) -> str:
    """`shows d >= 0`, `shows 0 <= d <= 7`, `hides nothing`, `hides everything`."""
    if not visible:
        return "hides everything"
    if tuple(visible) == ((-math.inf, math.inf),):
        return "hides nothing"
    return "shows " + " or ".join(_show(low, high) for low, high in visible)


def _show(low: float, high: float) -> str:
    if high == math.inf:
        return f"d >= {low:.0f}"
    return f"d <= {high:.0f}" if low == -math.inf else f"{low:.0f} <= d <= {high:.0f}"


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    """The operands of conjunctions, through copies for more rows and the choice between a number and "hidden"."""
    within: tuple[object, ...] = ()
    if is_call(node, aten.logical_and.default):
        within = node.args
    elif is_call(node, aten.expand.default, aten.clone.default) or _hides_the_rest(node):
        within = node.args[:1]
    operands = [operand for operand in within if isinstance(operand, fx.Node)]
    if not operands:
        yield node
    for operand in operands:
        yield from _parts(operand)


def _hides_the_rest(node: fx.Node) -> bool:
    """Is this where(visible, x, a number below zero)?"""
    if not is_call(node, aten.where.Scalar, aten.where.ScalarOther):
        return False
    number = node.args[2]
    return isinstance(number, (int, float)) and number < 0


def _place(node: fx.Node) -> str:
    line = source_line(node)
    return line if len(line) <= CODE else f"{line[: CODE - 3]}..."
