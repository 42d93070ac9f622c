"""A convolution in which nothing looks ahead is torchweld::causal_convolution.

before:  conv1d(pad(x, [(K - 1) * d, 0]), w, padding=0)    or    conv1d(x, w, padding=(K - 1) * d)[..., :S]
after:   causal_convolution(x, w, b, d, groups);    for K = 1 a linear, position by position
why:     one spelling; result t reads inputs up to t, which lets a step keep the last inputs instead of all
legal:   stride 1, not transposed, exactly (K - 1) * d zeros in front, as many results as inputs
source:  WaveNet (van den Oord et al.); the short convolutions of Hyena, Mamba and LFM2
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import fx

from torchweld.graph.match import aten, is_call, shape_of
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
from torchweld.graph.sequence_states import CONVOLUTION, CONVOLUTIONS, read_convolution

NAME: Final = "recognize_convolution"
EXACTNESS: Exactness = "exact"


def _causal(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    found = read_convolution(node)
    if found is None:
        return None
    if isinstance(found, Refusal):
        # A convolution and the slice that cuts it are one site: the slice where it is causal, else the convolution.
        cut = is_call(node, aten.slice.Tensor) or any(_is_causal(user) for user in node.users)
        return None if cut else found
    read = found.source
    source = read if found.order is None else Spelling(aten.permute.default, (read, found.order))
    if shape_of(found.weight)[2] == 1 and found.groups == 1:
        weight = Spelling(aten.select.int, (found.weight, 2, 0))
        lines = Spelling(aten.permute.default, (source, [0, 2, 1]))
        lines = Spelling(aten.linear.default, (lines, weight, found.bias))
        return Spelling(aten.permute.default, (lines, [0, 2, 1]))
    return Spelling(CONVOLUTION, (source, found.weight, found.bias, found.dilation, found.groups))


def _is_causal(node: fx.Node) -> bool:
    found = read_convolution(node)
    return found is not None and not isinstance(found, Refusal)


RULES: Final[dict[Target, Rule]] = dict.fromkeys((*CONVOLUTIONS, aten.slice.Tensor), _causal)


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Convolutions, and slices of their results."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Put the own op in place of the convolution, or of the slice that cuts it."""
    apply_rule(graph_module, site, NAME)
