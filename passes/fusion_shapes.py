"""What the four fusion passes ask about a group."""

from __future__ import annotations

import torch

from torchweld.graph.groups import Group, kind_of

aten = torch.ops.aten
CONCATENATIONS = frozenset({aten.cat.default, aten.concat.default, aten.stack.default})
SELECTIONS = frozenset({aten.index_select.default, aten.index.Tensor, aten.gather.default})


def has_anchor(group: Group) -> bool:
    """Whether a group is built around a matmul or an attention."""
    return any(kind_of(node) in ("contract", "attention") for node in group.nodes)


def writes_side_by_side(group: Group) -> bool:
    """Whether an output of the group is a concatenation, whose pieces could be written in place."""
    return any(node.target in CONCATENATIONS for node in group.outputs)


def selects_from(consumer: Group, producer: Group) -> bool:
    """Whether `consumer` chooses entries of what `producer` makes: joined, the choice happens before the work."""
    return any(
        node.target in SELECTIONS and source in producer.nodes
        for node in consumer.nodes
        for source in node.all_input_nodes[:1]
    )
