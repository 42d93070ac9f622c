"""A table that is read row by row is aten.embedding.

before:  gather(repeat(table, [B, 1, 1]), 1, repeat(places[..., None], [1, 1, D])), as GPT-J reads its sinusoids
after:   embedding(table, places)
why:     one spelling of a position table; gather with a repeated index hides that whole rows are read
legal:   the table is the same for every batch row, the index the same for every column, and neither is cut
source:  canonicalisation as in MLIR
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import fx

from torchweld.graph.match import aten, axis_argument, is_call, is_tensor, rank_of, shape_of
from torchweld.graph.rewrite import (
    Exactness,
    Refusal,
    Rule,
    RuleSite,
    Spelling,
    Target,
    apply_rule,
    check_rule,
    find_by_rules,
)
from torchweld.passes.canonicalize_views import read_sizes

NAME: Final = "canonicalize_lookups"
EXACTNESS: Exactness = "exact"


def _gather(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    source, places = node.args[0], node.args[2]
    if not isinstance(source, fx.Node) or not isinstance(places, fx.Node) or rank_of(node) != 3:
        return None
    if axis_argument(node, 1, "dim", 3) != 1:
        return None
    table, index = _spread_along(source, 0), _spread_along(places, 2)
    if table is None or index is None or shape_of(source)[2] != shape_of(node)[2]:
        return None
    rows = read_sizes(graph_module, node, shape_of(source)[1:])
    sizes = read_sizes(graph_module, node, shape_of(node)[:2])
    if rows is None or sizes is None:
        return Refusal("a symbolic size of the table or the index cannot be read from any node", node)
    bare: Any = table if rank_of(table) == 2 else Spelling(aten.reshape.default, (table, rows))
    return Spelling(aten.embedding.default, (bare, Spelling(aten.reshape.default, (index, sizes))))


def _spread_along(node: fx.Node, axis: int) -> fx.Node | None:
    """x for a tensor that is x, of size 1 along `axis` (or without it), as often as needed."""
    if shape_of(node)[axis] == 1:
        return node
    source: Any = node.args[0] if is_call(node, aten.expand.default, aten.repeat.default) else None
    if not is_tensor(source):
        return None
    wide = (*[1] * (3 - rank_of(source)), *shape_of(source))
    same = all(a == b for place, (a, b) in enumerate(zip(wide, shape_of(node), strict=True)) if place != axis)
    return source if same and wide[axis] == 1 else None


RULES: Final[dict[Target, Rule]] = {aten.gather.default: _gather}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Gathers that may read whole rows."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Put the embedding in place of the gather."""
    apply_rule(graph_module, site, NAME)
