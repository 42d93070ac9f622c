"""Compute masks of pairs of positions again in a step: for the positions of its rows, and of all keys.

before:  bias[h, t, s] = table[bucket(t - s), h]                     t, s = arange(S)
after:   bias[h, n, j] = table[bucket(positions[n] - j), h]          n < B * T, j < C
why:     a causal attention may have such a mask on top (T5); its entries are read by position, as keys are
legal:   entry [t, s] depends on positions t and s alone, value by value (graph/sequence_pairs.py)

Layers that share a mask share what is computed here.
"""

from __future__ import annotations

from typing import Any, Final

from torch import fx

from torchweld.graph.match import aten, shape_of, tensor_of
from torchweld.graph.sequence import Placed
from torchweld.graph.sequence_pairs import FILLED as FILLED_LIKE
from torchweld.graph.sequence_pairs import pair_operands
from torchweld.passes.step_copy import FILLED, StepCopier
from torchweld.passes.step_inputs import StepInputs

SHAPED: Final = (aten.reshape.default, aten.expand.default)


class PairWriter:
    """Writes masks of pairs; `rows` and `keys` copy what follows one position alone."""

    def __init__(self, rows: StepCopier, keys: StepCopier, inputs: StepInputs) -> None:
        self.rows, self.keys, self.inputs = rows, keys, inputs
        self.made: dict[Placed, fx.Node] = {}

    def write(self, mask: tuple[Placed, ...]) -> fx.Node:
        """The mask [B or 1, heads or 1, T, C] of the values in `mask`, operands first."""
        for placed in mask:
            if placed not in self.made:
                self.made[placed] = self._value(placed)
        last = mask[-1].node
        return self._by_sequence(self.made[mask[-1]], last)

    def _value(self, placed: Placed) -> fx.Node:
        node, along = placed.node, self.rows.found.along
        if node in along or (placed.row is None and placed.key is None):
            copier = self.keys if placed.key is not None else self.rows
            copied: fx.Node = copier.copy(node)
            return copied
        if node.target in FILLED_LIKE:
            number: Any = FILLED[node.target]
            number = node.args[1] if number is None else number
            shape, dtype = self._shape(placed), tensor_of(node).dtype
            device = tensor_of(node).device
            return self.rows.make(aten.full.default, shape, number, like=node, dtype=dtype, device=device)
        operands = {source: self.made[operand] for source, operand in pair_operands(placed).items()}
        if node.target in SHAPED:
            (source,) = operands.values()
            return self.rows.make(node.target, source, self._shape(placed), like=node)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), operands.__getitem__)
        return self.rows.make(node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]

    def _shape(self, placed: Placed) -> list[Any]:
        """The shape of a value, with rows and keys where positions were."""
        counted = {placed.row: self.rows.length, placed.key: self.keys.length}
        sizes = enumerate(shape_of(placed.node))
        return [counted[axis] if axis in counted else self.rows.size_of(size) for axis, size in sizes]

    def _by_sequence(self, packed: fx.Node, like: fx.Node) -> fx.Node:
        """[.., heads, B * T, C] as [B, heads, T, C]."""
        make = self.rows.make
        shape = shape_of(like)
        heads = int(shape[-3]) if len(shape) > 2 else 1
        flat = make(aten.reshape.default, packed, [heads, self.rows.length, self.keys.length], like=like)
        rows = make(aten.permute.default, flat, [1, 0, 2], like=like)
        sizes = [self.inputs.batch, self.inputs.new, heads, self.keys.length]
        return make(
            aten.permute.default, make(aten.reshape.default, rows, sizes, like=like), [0, 2, 1, 3], like=like
        )
