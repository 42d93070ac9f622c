"""What the graph's operations mean, as functions from an index to a term; one file per kind of operation."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import fx

from torchweld.graph.meaning.cached import CACHED
from torchweld.graph.meaning.context import Kind, Meaning, Rule, Unsupported
from torchweld.graph.meaning.contractions import CONTRACTIONS
from torchweld.graph.meaning.pointwise import POINTWISE
from torchweld.graph.meaning.reductions import REDUCTIONS
from torchweld.graph.meaning.views import MOVEMENT, SOURCES, VIEWS

RULES: Mapping[object, Rule] = MappingProxyType(
    {**POINTWISE, **VIEWS, **MOVEMENT, **SOURCES, **REDUCTIONS, **CONTRACTIONS, **CACHED}
)
"""Every operation that kernels can be made of; anything else runs eagerly."""


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a node's operation, or None where it has to run eagerly."""
    return RULES.get(node.target) if node.op == "call_function" else None


__all__ = ["RULES", "Kind", "Meaning", "Rule", "Unsupported", "rule_of"]
