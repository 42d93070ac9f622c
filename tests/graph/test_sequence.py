"""Sequence-axis analysis: what is along the sequence, what is a position, and who is refused, with the node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.graph.sequence import Along, SequenceAnalysis, describe_refusal
from torchweld.graph.sequence_rules import analyse_sequence
from torchweld.passes import CANONICALIZE, RECOGNIZE

WIDTH, HEADS, WORDS, PLACES = 12, 2, 19, 64
Mix = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Embedding, one causal attention, head; `mix(module, ids, hidden)` stands between the first two."""

    def __init__(self, mix: Mix, causal: bool = True) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.mix, self.causal = mix, causal
        self.words = nn.Parameter(torch.randn(WORDS, WIDTH, generator=draw))
        self.places = nn.Parameter(torch.randn(PLACES, WIDTH, generator=draw))
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH, generator=draw) / 3)
        self.kernel = nn.Parameter(torch.randn(WIDTH, 1, 3, generator=draw))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.mix(self, ids, F.embedding(ids, self.words))
        batch, length, _ = hidden.shape
        q, k, v = (
            F.linear(hidden, self.qkv).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return F.linear(mixed.permute(0, 2, 1, 3).reshape(batch, length, WIDTH), self.words)


def normalised(mix: Mix, causal: bool = True) -> Program:
    ids = torch.arange(14).reshape(2, 7)
    program = capture(Block(mix, causal).eval(), (ids,), verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    return program


def analysed(mix: Mix) -> SequenceAnalysis:
    found = analyse_sequence(normalised(mix))
    assert isinstance(found, SequenceAnalysis), describe_refusal(found)
    return found


def refused(mix: Mix, causal: bool = True) -> Refusal:
    found = analyse_sequence(normalised(mix, causal))
    assert isinstance(found, Refusal)
    return found


def test_token_local_model() -> None:
    found = analysed(lambda m, ids, x: F.gelu(F.layer_norm(x, (WIDTH,))))
    assert found.along[found.tokens] == Along(1, tokens=True)
    assert found.along[found.logits] == Along(1, tokens=True)
    assert [found.along[attention].axis for attention in found.attentions] == [2]
    assert found.sources == () and found.tables == () and found.limit is None


def test_best_features_of_each_token() -> None:
    found = analysed(lambda m, ids, x: x + x.topk(2, dim=-1).values.sum(-1, keepdim=True))
    (best,) = (node for node in found.along if "topk" in str(node.target))
    assert found.along[best].axis == 1


def test_best_tokens_are_refused() -> None:
    refusal = refused(lambda m, ids, x: x + x.topk(1, dim=1).values)
    assert refusal.node is not None and "topk" in str(refusal.node.target)


def test_arange_is_a_source_and_its_table_a_limit() -> None:
    found = analysed(lambda m, ids, x: x + m.places[torch.arange(x.shape[1]) + 2])
    (source,) = found.sources
    assert (source.line.first, source.line.slope) == (0, 1)
    assert found.limit == PLACES - 2


def test_every_second_place() -> None:
    found = analysed(lambda m, ids, x: x + torch.arange(1, 2 * x.shape[1] + 1, 2).to(x.dtype)[:, None])
    (source,) = found.sources
    assert (source.line.first, source.line.slope) == (1, 2)


def test_counted_ones_are_a_source() -> None:
    found = analysed(lambda m, ids, x: x + m.places[torch.ones_like(ids).cumsum(1)])
    (source,) = found.sources
    assert "cumsum" in str(source.node.target)
    assert (source.line.first, source.line.slope) == (1, 1)


def test_slice_of_a_learned_table() -> None:
    found = analysed(lambda m, ids, x: x + m.places[3 : x.shape[1] + 3])
    (table,) = found.tables
    assert (table.axis, table.start) == (0, 3)
    assert found.limit == PLACES - 3


def test_batch_and_sequence_may_be_merged() -> None:
    found = analysed(lambda m, ids, x: F.relu(x.reshape(-1, WIDTH) * 2).reshape(x.shape))
    assert any(along.axis == 0 for along in found.along.values())


def test_convolutions_and_sums_are_carried_in_graph_order() -> None:
    found = analysed(
        lambda m, ids, x: F.conv1d(
            F.pad(x.cumsum(1).transpose(1, 2), (2, 0)), m.kernel, groups=WIDTH
        ).transpose(1, 2)
    )
    names = [str(node.target) for node in found.looking_back]
    assert names == [
        "aten.cumsum.default",
        "torchweld.causal_convolution.default",
        "torchweld.attention.default",
    ]
    assert found.carried == found.looking_back[:2]
    assert [found.along[node] for node in found.carried] == [Along(1, tokens=True), Along(2, tokens=True)]


def test_elementwise_ops_that_torch_does_not_tag() -> None:
    assert analysed(lambda m, ids, x: F.logsigmoid(F.hardswish(x))).carried == ()


def test_sums_over_features_carry_nothing() -> None:
    assert analysed(lambda m, ids, x: x.cumsum(-1)).carried == ()


def test_a_sum_of_positions_that_is_no_line_is_carried() -> None:
    found = analysed(lambda m, ids, x: x + m.places[: x.shape[1]].cumsum(0))
    assert [str(node.target) for node in found.carried] == ["aten.cumsum.default"]
    assert found.along[found.carried[0]].tokens, "it cannot be computed from the position alone"


REFUSALS: dict[str, tuple[Mix, str, str]] = {
    "mean": (lambda m, ids, x: x - x.mean(1, keepdim=True), "mean.dim", "a later token changes earlier outputs"),
    "sum of all": (lambda m, ids, x: x / x.sum(), "sum.default", "a later token changes earlier outputs"),
    "softmax": (lambda m, ids, x: x.softmax(1), "softmax.int", "a later token changes earlier outputs"),
    "maximum": (lambda m, ids, x: x - x.amax(1, keepdim=True), "amax", "a later token changes earlier outputs"),
    "cumsum through the batch": (
        lambda m, ids, x: x.reshape(-1, WIDTH).cumsum(0).reshape(x.shape), "cumsum", "one behind the other",
    ),
    "flip": (lambda m, ids, x: x.flip(1), "flip", "S - 1 - t"),
    "first token": (lambda m, ids, x: x + x[:, :1], "slice", "a part of the sequence axis"),
    "one token": (lambda m, ids, x: x + x[:, 0][:, None], "select", "one position of the sequence axis"),
    "prefix": (lambda m, ids, x: torch.cat([m.places[:2].expand(x.shape[0], 2, WIDTH), x], 1), "cat", "in front"),
    "length": (lambda m, ids, x: x / x.shape[1], "div", "the sequence length as a number"),
    "merged with features": (
        lambda m, ids, x: x.reshape(x.shape[0], -1).sin().reshape(x.shape), "reshape", "merges the sequence axis",
    ),
    "convolution": (
        lambda m, ids, x: F.conv1d(x.transpose(1, 2), m.kernel, padding=1, groups=WIDTH).transpose(1, 2),
        "conv", "the convolution looks 1 position ahead: a kernel of 3 and 1 zeros in front",
    ),
    "reversed places": (
        lambda m, ids, x: x + m.places[torch.arange(x.shape[1]).flip(0)], "flip", "a later token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_node(name: str) -> None:
    mix, target, reason = REFUSALS[name]
    refusal = refused(mix)
    assert refusal.node is not None
    assert target in str(refusal.node.target)
    assert reason in refusal.reason
    assert "test_sequence.py:" in describe_refusal(refusal), "the user's source line"


def test_attention_without_a_mask_is_refused() -> None:
    refusal = refused(lambda m, ids, x: x, causal=False)
    assert refusal.node is not None and "attention" in str(refusal.node.target)
    assert "later tokens" in refusal.reason


def test_fixed_sequence_is_refused() -> None:
    ids = torch.arange(14).reshape(2, 7)
    program = capture(Block(lambda m, ids, x: x).eval(), (ids,), dynamic={"ids": [0]}, verify=False)
    found = analyse_sequence(program)
    assert isinstance(found, Refusal) and "capture it as dynamic" in found.reason


def test_second_input_is_refused() -> None:
    class Padded(Block):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids) * mask[:, :, None]

    ids = torch.arange(14).reshape(2, 7)
    found = analyse_sequence(capture(Padded(lambda m, ids, x: x).eval(), (ids, ids), verify=False))
    assert isinstance(found, Refusal) and "ids, mask" in found.reason
