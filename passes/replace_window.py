"""Let full causal attention see the last `window` positions only.

before:  attention(q, k, v, "causal")
after:   attention(q, k, v, "window", window)
why:     the cache of such a layer is a ring of fixed size, and long prompts cost linear time
legal:   a lossy rewrite, asked for by name: exact up to `window` positions, another model beyond; no tensor mask stands
         on top of the causal one; the window is at least 1
source:  Beltagy et al., Longformer (2020); Jiang et al., Mistral 7B (2023), which is trained like that
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from torchweld.graph.match import is_call
from torchweld.graph.ops import attention as attention_op
from torchweld.graph.rewrite import Exactness, NodeSite, Refusal, walk

ATTENTION = torch.ops.torchweld.attention.default
OPERATOR_FILE = attention_op.__name__  # importing it is what registers ATTENTION


@dataclass(frozen=True)
class ReplaceWindow:
    """The pass for one window: `Options(lossy=(ReplaceWindow(512),))`. ValueError for a window below 1."""

    window: int
    NAME: ClassVar[str] = "replace_window"
    EXACTNESS: ClassVar[Exactness] = "lossy"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"ReplaceWindow({self.window}): a window of at least 1 position is expected")

    def find(self, graph_module: fx.GraphModule) -> Iterator[NodeSite]:
        """Every full causal attention."""
        for node in walk(graph_module):
            if is_call(node, ATTENTION) and node.args[4] == "causal":
                yield NodeSite(node)

    def check(self, graph_module: fx.GraphModule, site: NodeSite) -> Refusal | None:
        """See `legal` above."""
        if site.anchor.args[3] is not None:
            return Refusal("a tensor mask stands on top of the causal one", site.anchor)
        return None

    def rewrite(self, graph_module: fx.GraphModule, site: NodeSite) -> None:
        """Another kind for the same operands."""
        node = site.anchor
        node.args = (*node.args[:4], "window", self.window, *node.args[6:])
        proof = node.meta.get("mask_proof", "")
        node.meta["mask_name"] = f"window {self.window}"
        node.meta["mask_proof"] = f"limited to 0 <= d <= {self.window - 1} by {self.NAME}; before: {proof}"
        node.meta["made_by"] = self.NAME
