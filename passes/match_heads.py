"""Query, key and value of an attention as [batch, heads, positions, features], before any repetition of heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from torchweld.graph.match import aten, is_call, rank_of, shape_of
from torchweld.graph.rewrite import Refusal


@dataclass(frozen=True)
class Operand:
    """Query, key or value: a node, seen in another shape (`view`) and then through a permutation of its axes."""

    node: fx.Node
    order: tuple[int, ...] | None = None
    view: tuple[Any, ...] | None = None

    @property
    def viewed(self) -> tuple[Any, ...]:
        """Sizes before the permutation."""
        return shape_of(self.node) if self.view is None else self.view

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes after the permutation."""
        return self.viewed if self.order is None else tuple(self.viewed[axis] for axis in self.order)


def check_heads(
    node: fx.Node, query: Operand, key: Operand, value: Operand, *, grouped: bool
) -> Refusal | None:
    """Batch sizes equal; key and value heads equal to the query's, or one, or (grouped) a divisor."""
    (batch, heads), keys, values = query.shape[:2], key.shape[:2], value.shape[:2]
    if keys[0] != batch or values[0] != batch:
        return Refusal("batch sizes of query, key and value differ", node)
    if keys[1] != values[1]:
        return Refusal("key and value have different numbers of heads", node)
    divides = isinstance(heads, int) and isinstance(keys[1], int) and keys[1] > 0 and heads % keys[1] == 0
    if keys[1] == heads or keys[1] == 1 or (grouped and divides):
        return None
    return Refusal("query heads cannot be grouped over the key heads", node)


def without_repeats(key: Operand, value: Operand) -> tuple[Operand, Operand]:
    """Key and value before every head was repeated for its group of query heads, if both were alike."""
    bare_key, bare_value = _before_repeat(key), _before_repeat(value)
    if bare_key is None or bare_value is None or bare_key.shape[1] != bare_value.shape[1]:
        return key, value
    return bare_key, bare_value


def _before_repeat(operand: Operand) -> Operand | None:
    """The operand whose heads were repeated to give this one, in whatever order its axes stand."""
    node, order = operand.node, operand.order or (0, 1, 2, 3)
    if operand.view is not None or rank_of(node) != 4:
        return None
    if is_call(node, aten.permute.default):
        axes: Any = node.args[1]
        source: Any = node.args[0]
        node, order = source, tuple(axes[axis] % 4 for axis in order)
    found = _unrepeated(node, order[1])
    return None if found is None else replace(found, order=None if order == (0, 1, 2, 3) else order)


def _unrepeated(node: fx.Node, axis: int) -> Operand | None:
    """x for x expanded or tiled from one head, and for reshape(expand(x with an axis of size 1 behind its heads))."""
    source: Any = node.args[0] if node.args else None
    if is_call(node, aten.expand.default):
        return Operand(source) if _is_one_head(node, source, axis) else None
    if is_call(node, aten.repeat.default):
        times: Any = node.args[1]
        alone = len(times) == 4 and all(count == 1 for place, count in enumerate(times) if place != axis)
        return Operand(source) if alone and _is_one_head(node, source, axis) else None
    if not is_call(node, aten.reshape.default) or not is_call(source, aten.expand.default):
        return None
    inserted: Any = source.args[0]
    wide = shape_of(source)
    if len(wide) != 5 or rank_of(inserted) != 5 or not isinstance(wide[axis + 1], int):
        return None
    kept = (*wide[: axis + 1], *wide[axis + 2 :])
    merged = (*wide[:axis], wide[axis] * wide[axis + 1], *wide[axis + 2 :])
    if shape_of(inserted) != (*wide[: axis + 1], 1, *wide[axis + 2 :]) or shape_of(node) != merged:
        return None
    before: Any = inserted.args[0] if is_call(inserted, aten.reshape.default) else None
    return (
        Operand(before) if before is not None and shape_of(before) == kept else Operand(inserted, None, kept)
    )


def _is_one_head(node: fx.Node, source: fx.Node, axis: int) -> bool:
    """Is `node` `source` with its one head as many times, and nothing else?"""
    if rank_of(source) != 4 or shape_of(source)[axis] != 1:
        return False
    return all(
        a == b
        for place, (a, b) in enumerate(zip(shape_of(source), shape_of(node), strict=True))
        if place != axis
    )


def key_operand(right: fx.Node) -> Operand:
    """Key [.., s, d] from the right operand [.., d, s] of the scores."""
    rank = rank_of(right)
    order = [*range(rank - 2), rank - 1, rank - 2]
    if is_call(right, aten.permute.default):
        axes: Any = right.args[1]
        source: Any = right.args[0]
        right, order = source, [axes[axis] % rank for axis in order]
    return Operand(right, None if order == list(range(rank)) else tuple(order))


def merge_groups(query: Operand, key: Operand, value: Operand) -> tuple[Operand, Operand, Operand] | None:
    """Operands [batch, key heads, group, positions, features], key and value with a group of size 1, as query
    [batch, key heads * group, ..] and key and value [batch, key heads, ..]; None where they are not like that."""
    batch, heads, group, length, features = query.shape
    bare_key, bare_value = _without_group(key), _without_group(value)
    if bare_key is None or bare_value is None or query.order is not None:
        return None
    if bare_key.shape[:2] != (batch, heads) or bare_value.shape[:2] != (batch, heads):
        return None
    return Operand(query.node, None, (batch, heads * group, length, features)), bare_key, bare_value


def _without_group(operand: Operand) -> Operand | None:
    """Axis 2 of five taken away, which must have size 1."""
    order = operand.order or (0, 1, 2, 3, 4)
    gone = order[2]
    if operand.view is not None or operand.viewed[gone] != 1:
        return None
    view = (*operand.viewed[:gone], *operand.viewed[gone + 1 :])
    left = tuple(axis - (axis > gone) for place, axis in enumerate(order) if place != 2)
    return Operand(operand.node, None if left == (0, 1, 2, 3) else left, view)
