"""The steps of a mask's proof: every part of a conjunction, what it shows, and where it was written."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchweld.graph.capture import capture
from torchweld.graph.rewrite import run_pass
from torchweld.passes import CANONICALIZE, recognize_attention
from torchweld.passes.show_proof import show_distances

X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """Attention to earlier tokens that are at most 3 away, and of the same document; all are one document."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        query, key = places[:, None], places[None, :]
        near = query - key <= 3
        earlier = key <= query
        same = (query * 0) == (key * 0)
        visible: Tensor = near & (earlier & same)
        if self.kind == "added":
            visible = torch.where(visible, 0.0, float("-inf"))
        if self.kind == "hidden":
            scores = (x @ x.transpose(1, 2)).masked_fill(~visible, float("-inf"))
            return scores.softmax(-1) @ x
        if self.kind == "unlike":
            visible = visible | (query == key)
        x = x[:, None]
        return F.scaled_dot_product_attention(x, x, x, attn_mask=visible)[:, 0]


def proof(kind: str) -> str:
    graph_module = capture(Masked(kind).eval(), (X,), verify=False).graph_module
    for pass_ in (*CANONICALIZE, recognize_attention):
        run_pass(graph_module, pass_)
    (node,) = graph_module.graph.find_nodes(op="call_function", target=recognize_attention.ATTENTION)
    assert (node.args[4], node.args[5]) == ("window", 4)
    found: str = node.meta["mask_proof"]
    return found


def test_every_part_is_shown_with_its_line() -> None:
    for kind in ("boolean", "added"):
        found = proof(kind)
        whole, _, steps = found.partition("key position: ")
        assert "shows 0 <= d <= 3 for every size" in whole
        assert "shows d <= 3 (test_show_proof.py:" in steps and "near = query - key <= 3)" in steps
        assert "shows d >= 0 (test_show_proof.py:" in steps and "earlier = key <= query)" in steps
        assert "hides nothing (test_show_proof.py:" in steps
        assert steps.count(".py:") == 3


def test_what_is_no_conjunction_is_one_step() -> None:
    steps = proof("unlike").partition("key position: ")[2]
    assert steps.startswith("written at test_show_proof.py:") and "visible | (query == key)" in steps


def test_a_mask_of_what_is_hidden_has_no_steps() -> None:
    """`masked_fill` hides where it is true: "shows" would say the opposite."""
    assert proof("hidden").endswith("key position")


@given(st.integers(-5, 5), st.integers(0, 6))
def test_distances_in_words(low: int, length: int) -> None:
    high = low + length
    assert show_distances([(float(low), math.inf)]) == f"shows d >= {low}"
    assert show_distances([(-math.inf, float(high))]) == f"shows d <= {high}"
    both = show_distances([(float(low), float(high)), (high + 2.0, math.inf)])
    assert both == f"shows {low} <= d <= {high} or d >= {high + 2}"
    assert show_distances([]) == "hides everything"
    assert show_distances([(-math.inf, math.inf)]) == "hides nothing"
