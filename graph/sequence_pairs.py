"""Masks of pairs of positions: a bias by distance, looked up in a table (T5), or any other function of two positions.

    bias[h, t, s] = table[bucket(t - s), h]

On top of a mask that is proved causal such a mask needs no proof: it is computed again in every step, for the positions
of the new rows and of all keys. What is shown here is that entry [t, s] depends on positions t and s alone: every value
has one axis that counts rows, one that counts keys, or one of them, and every op keeps them apart.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import aten, is_tensor, rank_of, shape_of
from torchweld.graph.sequence import Along, Mixes, Placed, Scope

POINTWISE: Final = frozenset(
    {aten._to_copy.default, aten.clone.default, aten.expand.default}
    | {aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf}
)
FILLED: Final = frozenset({aten.zeros_like.default, aten.ones_like.default, aten.full_like.default})
LOOKUPS: Final = frozenset({aten.embedding.default})


def place_pairs(scope: Scope, mask: fx.Node) -> tuple[Placed, ...]:
    """Every value that entry [.., t, s] of `mask` is made of, operands first; Mixes where that is not shown."""
    rank = rank_of(mask)
    order: dict[Placed, None] = {}
    pending = [(Placed(mask, rank - 2, rank - 1), False)]
    while pending:
        placed, is_ready = pending.pop()
        if placed in order:
            continue
        if is_ready:
            order[placed] = None
            continue
        _check_axes(scope, placed)
        pending.append((placed, True))
        if placed.node in scope.set_aside:
            pending += [(operand, False) for operand in pair_operands(placed).values()]
    return tuple(order)


def pair_operands(placed: Placed) -> dict[fx.Node, Placed]:
    """The tensor operands of a value of pairs, with their axes. Raises Mixes."""
    node = placed.node
    if node.target in FILLED:
        return {}
    if node.target is aten.reshape.default:
        source: Any = node.args[0]
        moved = _moved_axes(shape_of(source), shape_of(node))
        if moved is None:
            raise Mixes(f"{node.name} merges or splits the axes of two positions", node)
        return {source: _at(source, moved, placed)}
    if node.target is aten.permute.default:
        source, order = node.args
        places = {at: axis % len(order) for at, axis in enumerate(order)}  # type: ignore[arg-type]
        return {source: _at(source, places, placed)}
    if node.target in LOOKUPS:
        table, index = node.args[0], node.args[1]
        places = {axis: axis for axis in range(rank_of(index))}  # type: ignore[arg-type]
        return {table: Placed(table, None, None), index: _at(index, places, placed)}  # type: ignore[dict-item,arg-type]
    target = node.target
    if target in POINTWISE or (
        isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    ):
        return {source: _broadcast(source, placed) for source in node.all_input_nodes if is_tensor(source)}
    raise Mixes(f"no rule shows that {target} keeps the positions of rows and keys apart", node)


def _check_axes(scope: Scope, placed: Placed) -> None:
    """The axes that follow the sequence are those for rows and keys, and no tokens are in it."""
    node = placed.node
    along: Along | None = scope.of(node)
    if node in scope.encoder or (along is not None and along.tokens):
        raise Mixes(f"the mask depends on {node.name}, not on positions alone")
    axes = [axis for axis in (placed.row, placed.key) if axis is not None and shape_of(node)[axis] != 1]
    if scope.axes(node) != sorted(axes) or not all(scope.is_whole(node, axis) for axis in axes):
        raise Mixes(f"{node.name} has other axes than one for rows and one for keys", node)


def _at(source: fx.Node, places: dict[int, int], placed: Placed) -> Placed:
    """`source`, whose axis places[a] is axis a of the result."""
    row = None if placed.row is None else places.get(placed.row)
    key = None if placed.key is None else places.get(placed.key)
    return _without_ones(source, row, key)


def _broadcast(source: fx.Node, placed: Placed) -> Placed:
    """An operand that is broadcast to the result: axes align at the end."""
    shift = rank_of(placed.node) - rank_of(source)
    row, key = (None if axis is None or axis < shift else axis - shift for axis in (placed.row, placed.key))
    return _without_ones(source, row, key)


def _without_ones(source: fx.Node, row: int | None, key: int | None) -> Placed:
    """An axis of size 1 counts nothing."""
    shape = shape_of(source)
    row, key = (None if axis is None or shape[axis] == 1 else axis for axis in (row, key))
    return Placed(source, row, key)


def _moved_axes(before: tuple[Any, ...], after: tuple[Any, ...]) -> dict[int, int] | None:
    """Axis of the result -> axis of the source, where only axes of size 1 come or go; None otherwise."""
    old = [(axis, size) for axis, size in enumerate(before) if size != 1]
    new = [(axis, size) for axis, size in enumerate(after) if size != 1]
    if [size for _, size in old] != [size for _, size in new]:
        return None
    return {outside: inside for (inside, _), (outside, _) in zip(old, new, strict=True)}
