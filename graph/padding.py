"""Is what a program gives for a sentence the same without the padding behind it?

    found = check_padding(program)       # a Padding, or a Refusal that names the node

True of a program of tokens [B, S] and a mask [B, S] (0 for padding) if, read from its graph:

* no value of one sentence reaches another: axis B is never summed over, merged or reordered;
* a position reads other positions only where the mask lets it: in an attention whose mask is false at padded keys, or
  in a sum over S of values that are 0 at padded positions, or as the first position, which is no padding;
* no output has an axis S.

Then a call with fewer columns, as long as only padding is cut off, gives the same but for the order of sums. What is 0
at padded positions is the mask and what is multiplied by it; that takes padded values to be finite, as everywhere else.

Every operation has to be one of the tables below; any other is refused. Nothing is inferred from examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.groups import has_tensor
from torchweld.graph.meaning.context import Unsupported, shape_of
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal

aten = torch.ops.aten
MASK: Final = "attention_mask"


class State(Enum):
    """What is known of a value's padded positions."""

    ANYTHING = "anything"
    ZERO = "zero"


@dataclass(frozen=True)
class Padding:
    """Positions among the flat inputs of the mask, and of all inputs [B, S] (the mask among them)."""

    mask: int
    cut: tuple[int, ...]


class _Refused(Exception):
    """The message says what of a node the proof does not allow."""


POINTWISE: Final = frozenset(
    {
        aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.gelu.default, aten.relu.default, aten.silu.default,
        aten.tanh.default, aten.sigmoid.default, aten.exp.default, aten.rsqrt.default, aten.sqrt.default,
        aten.pow.Tensor_Scalar, aten.clamp.default, aten.clamp_min.default, aten.erf.default, aten.neg.default,
        aten.abs.default, aten.eq.Scalar, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
        aten.expand.default, aten.clone.default,
    }
)  # fmt: skip
"""Element by element: what stands at a position stays there."""
KEEPS_ZERO: Final = frozenset(
    {aten._to_copy.default, aten.reshape.default, aten.permute.default, aten.ne.Scalar}
)
"""Element by element, or a view, and 0 stays 0 (`ne` with 0; the second argument is checked)."""

TAKES_SIZES: Final = frozenset({aten.reshape.default, aten.expand.default, aten.arange.default})
"""Where a size is a shape; anywhere else it would be a number that a shorter call changes."""


@dataclass(frozen=True)
class _Walk:
    """The symbols of batch and length, and what is known of the values so far."""

    batch: Any
    length: Any
    states: dict[fx.Node, State]

    def has_length(self, node: fx.Node) -> bool:
        """Whether an axis of `node` is the sequence."""
        return self.length in shape_of(node)

    def node(self, node: fx.Node) -> State:
        """The state of a computed node. Raises _Refused."""
        for extent in shape_of(node):
            if extent not in (self.batch, self.length) and extent.free_symbols:
                raise _Refused(f"an axis of {extent}")
        if list(shape_of(node)).count(self.length) > 1 or list(shape_of(node)).count(self.batch) > 1:
            raise _Refused("two axes of one size")
        sizes = [other for other in node.all_input_nodes if not has_tensor(other)]
        if sizes and node.target not in TAKES_SIZES:
            raise _Refused("it computes with a size")
        if node.target in (aten.reshape.default, aten.permute.default):
            self._check_order(node)
        if node.target is aten.ne.Scalar and node.args[1] != 0:
            raise _Refused("it compares with something else than 0")
        if node.target in KEEPS_ZERO:
            return self.states.get(self._operand(node, 0), State.ANYTHING)
        if node.target is aten.mul.Tensor:
            return self._product(node)
        if node.target in POINTWISE:
            return State.ANYTHING
        rule = _RULES.get(node.target)
        if rule is None:
            raise _Refused(f"no rule for {node.target}")
        return rule(self, node)

    def _operand(self, node: fx.Node, position: int) -> fx.Node:
        operand = node.args[position]
        if not isinstance(operand, fx.Node):
            raise _Refused(f"argument {position} is no tensor")
        return operand

    def _product(self, node: fx.Node) -> State:
        zero = [n for n in node.all_input_nodes if self.states.get(n) is State.ZERO and self.has_length(n)]
        return State.ZERO if zero else State.ANYTHING

    def _check_order(self, node: fx.Node) -> None:
        """Batch stays in front of length; neither is merged with, or cut out of, other axes."""
        before, after = shape_of(self._operand(node, 0)), shape_of(node)
        for symbol in (self.batch, self.length):
            if (symbol in before) != (symbol in after):
                raise _Refused(f"the axis {symbol} is merged or split")
        if node.target is aten.permute.default:
            return
        for symbol in (self.batch, self.length):
            if symbol in before:
                first, second = (_front(shape, symbol) for shape in (before, after))
                if first != second:
                    raise _Refused(f"the axis {symbol} moves")

    def reduced(self, node: fx.Node, position: int = 1) -> tuple[Any, ...]:
        """The extents of the axes that a reduction sums over."""
        shape = shape_of(self._operand(node, 0))
        axes = node.args[position] if len(node.args) > position else None
        chosen = range(len(shape)) if axes is None else [axes] if isinstance(axes, int) else axes
        if not isinstance(chosen, (range, list, tuple)) or not all(isinstance(axis, int) for axis in chosen):
            raise _Refused("its axes are not constant")
        return tuple(shape[axis] for axis in chosen)


def _front(shape: Sequence[Any], symbol: Any) -> Any:
    """The number of elements before the axis."""
    return math.prod(shape[: list(shape).index(symbol)])


def _last_axis_only(walk: _Walk, node: fx.Node) -> State:
    """linear, norms over the last axes: rows by rows."""
    operand = walk._operand(node, 0)
    shape = shape_of(operand)
    count = len(node.args[1]) if node.target is not aten.linear.default else 1  # type: ignore[arg-type]
    if any(extent in (walk.batch, walk.length) for extent in shape[len(shape) - count :]):
        raise _Refused("it works along batch or length")
    if any(walk.states.get(other) is not None for other in node.all_input_nodes if other is not operand):
        raise _Refused("its weight depends on the inputs")
    return State.ANYTHING


def _embedding(walk: _Walk, node: fx.Node) -> State:
    if walk.states.get(walk._operand(node, 0)) is not None:
        raise _Refused("its table depends on the inputs")
    return State.ANYTHING


def _arange(walk: _Walk, node: fx.Node) -> State:
    return State.ANYTHING  # from a fixed start: what stands at a position does not depend on the length


def _sum(walk: _Walk, node: fx.Node) -> State:
    axes = walk.reduced(node)
    if walk.batch in axes:
        raise _Refused("it sums over the batch")
    operand = walk.states.get(walk._operand(node, 0), State.ANYTHING)
    if walk.length in axes:
        if operand is not State.ZERO:
            raise _Refused("it sums over positions, padding among them")
        return State.ANYTHING
    return operand


def _norm(walk: _Walk, node: fx.Node) -> State:
    if {walk.batch, walk.length} & set(walk.reduced(node, 2)):
        raise _Refused("it is a norm over batch or length")
    return State.ANYTHING


def _select(walk: _Walk, node: fx.Node) -> State:
    extent = shape_of(walk._operand(node, 0))[int(str(node.args[1]))]
    if extent == walk.batch:
        raise _Refused("it takes one sentence")
    if extent == walk.length and node.args[2] != 0:
        raise _Refused("it takes another position than the first")
    return State.ANYTHING


def _attention(walk: _Walk, node: fx.Node) -> State:
    q, k, v, mask = (node.args[position] if len(node.args) > position else None for position in range(4))
    for name, part in (("query", q), ("key", k), ("value", v)):
        shape = shape_of(part) if isinstance(part, fx.Node) else ()
        if len(shape) != 4 or shape[0] != walk.batch or shape[2] != walk.length:
            raise _Refused(f"its {name} is not [batch, heads, length, features]")
    if not isinstance(mask, fx.Node) or walk.states.get(mask) is not State.ZERO:
        raise _Refused("nothing hides padded keys")
    shape = shape_of(mask)
    if shape[-1] != walk.length or shape[0] != walk.batch or mask.meta["val"].dtype != torch.bool:
        raise _Refused("its mask is not of keys")
    return State.ANYTHING


_RULES: Final[Mapping[object, Callable[[_Walk, fx.Node], State]]] = {
    aten.linear.default: _last_axis_only,
    aten.layer_norm.default: _last_axis_only,
    aten.rms_norm.default: _last_axis_only,
    aten.embedding.default: _embedding,
    aten.arange.default: _arange,
    aten.sum.dim_IntList: _sum,
    aten.linalg_vector_norm.default: _norm,
    aten.select.int: _select,
    torch.ops.torchweld.attention.default: _attention,
}


def check_padding(program: Program) -> Padding | Refusal:
    """Whether padding may be cut off, of a canonicalised and recognised program.

    A refusal names the node; it has none where there is no mask.
    """
    places = list(program.placeholders)
    masks = [at for at, node in enumerate(places) if node.name == MASK and has_tensor(node)]
    if not masks:
        return Refusal(f"no input is called {MASK}")
    mask = places[masks[0]]
    shape = shape_of(mask)
    if len(shape) != 2 or not all(extent.is_Symbol for extent in shape) or shape[0] == shape[1]:
        return Refusal("batch and length of the mask are not two symbols", mask)
    walk = _Walk(shape[0], shape[1], {})
    for node in places:
        if not has_tensor(node) or shape_of(node) != shape:
            return Refusal("an input is not [batch, length]", node)
        walk.states[node] = State.ZERO if node is mask else State.ANYTHING
    for node in program.graph.nodes:
        if node.op != "call_function" or not has_tensor(node):
            continue
        try:
            walk.states[node] = walk.node(node)
        except (_Refused, Unsupported) as problem:
            return Refusal(str(problem), node)
    return _check_outputs(program, walk) or Padding(masks[0], tuple(range(len(places))))


def _check_outputs(program: Program, walk: _Walk) -> Refusal | None:
    for node in program.graph.output_node().args[0]:  # type: ignore[union-attr]
        if not isinstance(node, fx.Node) or node.op != "call_function" or not has_tensor(node):
            return Refusal("an output is not computed", program.graph.output_node())
        if walk.has_length(node):
            return Refusal("an output has places for padding", node)
        if not shape_of(node) or shape_of(node)[0] != walk.batch:
            return Refusal("an output is not one row per sentence", node)
    return None
