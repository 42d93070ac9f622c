"""Cross attention in a step: what it reads of an encoder is an input, computed once per source.

before:  attention(q[batch, H, S, D], key, value, mask, "none")      key, value and mask from an encoder
after:   attention(q[B, H, T, D], encoded_i, encoded_j, encoded_k, "none")
why:     the encoder and the keys and values of every layer cost nothing in a step
legal:   tokens meet the encoder in attention alone, under a mask that is the same for every row
         (graph/sequence_encoder.py)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import aten, shape_of, tensor_of
from torchweld.graph.program import find_fake_mode
from torchweld.graph.sequence import SequenceAnalysis
from torchweld.passes.step_copy import Stand, StepCopier
from torchweld.passes.step_inputs import StepInputs, new_size

TRACED: Final = 3001
ATTENTION: Final = torch.ops.torchweld.attention.default
HEADS_TO_ROWS: Final = [0, 2, 1, 3]  # [B, H, T, D] <-> [B, T, H, D]


def add_encoded_inputs(
    found: SequenceAnalysis, inputs: StepInputs, *, made_by: str
) -> dict[fx.Node, fx.Node]:
    """Inputs encoded_0, encoded_1, ... behind `rows`, by the values of the encoder that they stand for.

    Equal sizes of the encoder are equal symbols; the batch is that of the step.
    """
    if not found.encoded:
        return {}
    graph = inputs.ids.graph
    mode = find_fake_mode(graph)
    assert mode.shape_env is not None
    sizes: dict[Any, int | torch.SymInt] = {found.batch: tensor_of(inputs.ids).shape[0], found.symbol: 1}
    known: dict[fx.Node, fx.Node] = {}
    last = inputs.rows
    for number, value in enumerate(found.encoded):
        for size in shape_of(value):
            if not isinstance(size, int) and size not in sizes:
                place = len(sizes)
                sizes[size] = new_size(mode.shape_env, f"encoded_{place}", TRACED + 8 * place)
        with graph.inserting_after(last):
            last = graph.placeholder(f"encoded_{number}")
        shape = [size if isinstance(size, int) else sizes[size] for size in shape_of(value)]
        with mode:
            last.meta["val"] = torch.empty(
                shape, dtype=tensor_of(value).dtype, device=tensor_of(value).device
            )
        last.meta["made_by"] = made_by
        known[value] = last
    return known


@dataclass(frozen=True)
class CrossWriter:
    """Writes cross attentions behind the rows of `copier`; by_sequence: [1, H, B * T, D] as [B, H, T, D]."""

    copier: StepCopier
    inputs: StepInputs
    by_sequence: Callable[[fx.Node, fx.Node], fx.Node]

    def stand(self, attention: fx.Node) -> Stand:
        """What stands for `attention` in the step."""
        return Stand(tuple(attention.all_input_nodes), lambda: self._write(attention))

    def _write(self, attention: fx.Node) -> fx.Node:
        make, known, inputs = self.copier.make, self.copier.known, self.inputs
        query: Any = attention.args[0]
        read = self.by_sequence(known[query], attention)
        key, value = (self._for_all(known[operand], attention) for operand in attention.args[1:3])  # type: ignore[index]
        rest = fx.node.map_arg(attention.args[3:], known.__getitem__)
        mixed = make(ATTENTION, read, key, value, *rest, like=attention)
        _, heads, _, features = tensor_of(mixed).shape
        rows = make(aten.permute.default, mixed, HEADS_TO_ROWS, like=attention)
        shape = [1, inputs.length, int(heads), int(features)]
        packed = make(aten.reshape.default, rows, shape, like=attention)
        return make(aten.permute.default, packed, HEADS_TO_ROWS, like=attention)

    def _for_all(self, operand: fx.Node, like: fx.Node) -> fx.Node:
        """Keys or values [1, H, S, D] that are the same for every sequence, as [B, H, S, D]."""
        first, *rest = shape_of(operand)
        if first != 1:
            return operand
        make = self.copier.make
        sizes = [
            size if isinstance(size, int) else make(aten.sym_size.int, operand, axis, like=like)
            for axis, size in enumerate(rest, 1)
        ]
        return make(aten.expand.default, operand, [self.inputs.batch, *sizes], like=like)
