"""Remove what nothing reads.

before:  a node without users
after:   nothing
why:     dead nodes would be matched, fused and counted
legal:   it is no placeholder (the signature), no output, and writes nothing
source:  dead code elimination, any compiler
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import fx

from torchweld.graph.edit import writes
from torchweld.graph.rewrite import Exactness, NodeSite, Refusal, is_erased

NAME: Final = "remove_dead_code"
EXACTNESS: Exactness = "exact"


def find(graph_module: fx.GraphModule) -> Iterator[NodeSite]:
    """Nodes without users, last first, so that a dead chain dies in one sweep."""
    for node in reversed(tuple(graph_module.graph.nodes)):
        if not is_erased(node) and not node.users and node.op not in ("placeholder", "output"):
            yield NodeSite(node)


def check(graph_module: fx.GraphModule, site: NodeSite) -> Refusal | None:
    """See `legal` above."""
    return Refusal("the node writes", site.anchor) if writes(site.anchor) else None


def rewrite(graph_module: fx.GraphModule, site: NodeSite) -> None:
    """Nothing to redirect: `run_pass` sweeps an anchor without users."""
