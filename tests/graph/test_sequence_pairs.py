"""Masks of pairs of positions: which values they are made of, and which masks are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchweld.graph.capture import capture
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.graph.sequence import SequenceAnalysis
from torchweld.graph.sequence_rules import analyse_sequence
from torchweld.passes import CANONICALIZE, RECOGNIZE

WORDS, WIDTH = 11, 6
Bias = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Biased(nn.Module):
    """One causal attention with a bias of our choice, from positions as a column and as a row."""

    def __init__(self, bias: Bias) -> None:
        super().__init__()
        self.bias = bias
        self.words = nn.Embedding(WORDS, WIDTH)
        self.register_buffer("table", torch.randn(64, 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        place = torch.arange(ids.shape[1])
        scores = x @ x.transpose(1, 2) * 0.3 + self.bias(self, place[:, None], place[None, :])
        hidden = place[:, None] < place[None, :]
        mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ x
        return F.linear(mixed, self.words.weight)


def analysed(bias: Bias) -> SequenceAnalysis | Refusal:
    program = capture(Biased(bias).eval(), (torch.arange(14).reshape(2, 7) % WORDS,), verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    return analyse_sequence(program)


@pytest.mark.parametrize(
    "bias",
    [
        lambda m, t, s: F.embedding((t - s).clamp(0, 63), m.get_buffer("table")).squeeze(-1),
        lambda m, t, s: ((t % 3) * (s % 5)).float(),
        lambda m, t, s: (t * s).float().sqrt() + F.embedding(t % 4, m.get_buffer("table"))[:, 0],
    ],
    ids=["by distance", "by both positions", "by products and the row's position"],
)
def test_functions_of_two_positions_are_followed(bias: Bias) -> None:
    found = analysed(bias)
    assert isinstance(found, SequenceAnalysis), found
    ((attention, mask),) = found.pair_masks.items()
    assert attention in found.attentions
    last = mask[-1]
    rank = last.node.meta["val"].dim()
    assert (last.row, last.key) == (rank - 2, rank - 1)
    made = {placed.node for placed in mask}
    assert found.tokens not in made, "a mask by position"


@pytest.mark.parametrize(
    ("bias", "op"),
    [
        (lambda m, t, s: (t * s).float().cumsum(0), "mul"),
        (lambda m, t, s: (t * s).float().flip(1), "mul"),
        (lambda m, t, s: (t * s).float() - (t * s).float().mean(), "mul"),
    ],
    ids=["cumsum", "flip", "mean"],
)
def test_what_mixes_pairs_is_refused(bias: Bias, op: str) -> None:
    found = analysed(bias)
    assert isinstance(found, Refusal) and found.node is not None
    assert op in str(found.node.target) or "attention" in str(found.node.target)
