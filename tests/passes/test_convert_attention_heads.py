"""convert_attention_heads: exact for equal heads, measured for others, and exported as a model of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.zoo import DECODER, HEADS, HIDDEN, VOCAB, ZOO, redraw
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import run_pass
from torchweld.optimizer.lossy import change
from torchweld.passes import CANONICALIZE, RECOGNIZE
from torchweld.passes.convert_attention_heads import ConvertAttentionHeads, converted_state_dict, group_alike

ATTENTION = torch.ops.torchweld.attention.default
SIZE = HIDDEN // HEADS
IDS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
ALIKE = [0, 1, 0, 1]
"""Heads 0 and 2 are equal, and 1 and 3: neighbours are not."""


def llama(key_heads: int) -> nn.Module:
    config = hf.LlamaConfig(**{**DECODER, "num_key_value_heads": key_heads})
    model: nn.Module = hf.LlamaForCausalLM(config).eval()
    redraw(model, 0)
    return model.requires_grad_(False)


def with_equal_heads(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "k_proj" in name or "v_proj" in name:
            parameter.data = parameter.data.unflatten(0, (HEADS, SIZE))[ALIKE].flatten(0, 1).contiguous()
    return model


def captured(model: nn.Module) -> Program:
    return capture(model, (), {"input_ids": IDS, "use_cache": False}, verify=False)


def flat(program: Program) -> list[object]:
    return [IDS if isinstance(node.meta["val"], Tensor) else False for node in program.placeholders]


def key_heads(program: Program) -> set[int]:
    nodes = program.graph.find_nodes(op="call_function", target=ATTENTION)
    return {int(node.args[place].meta["val"].shape[1]) for node in nodes for place in (1, 2)}


def test_equal_heads_of_a_group_change_nothing() -> None:
    program = captured(with_equal_heads(llama(HEADS)))
    changed = change(program, ConvertAttentionHeads(2), flat(program))
    assert (changed.outcome.applied, changed.outcome.refused) == (2, ())
    assert key_heads(changed.program) == {2} and key_heads(program) == set()
    orders = [
        node.meta.get("head_order")
        for node in changed.program.graph.find_nodes(op="call_function", target=ATTENTION)
    ]
    assert orders == [(0, 2, 1, 3)] * 2
    assert changed.max_abs < 1e-5 and changed.comparison.kl_max < 1e-9


@pytest.mark.parametrize("groups", [1, 2])
def test_other_heads_have_a_measured_error(groups: int) -> None:
    program = captured(llama(HEADS))
    changed = change(program, ConvertAttentionHeads(groups), flat(program))
    assert changed.outcome.applied == 2 and key_heads(changed.program) == {groups}
    assert changed.max_abs > 1e-3 and 0 < changed.comparison.kl_mean < 10
    assert "convert_attention_heads: 2 of 2 changed" in changed.describe()
    assert run_pass(changed.program.graph_module, ConvertAttentionHeads(groups)).matched == 0


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 1), (2, 1)])
def test_exported_as_state_dict_and_config(before: int, after: int) -> None:
    """The program and a model with fewer key heads that reads the exported weights give the same logits."""
    model = llama(before)
    program = captured(model)
    changed = change(program, ConvertAttentionHeads(after), flat(program))
    small = llama(after)
    small.load_state_dict(converted_state_dict(changed.program.graph_module, model.state_dict()))
    with torch.no_grad():
        found: Any = changed.program.graph_module(*flat(changed.program))
        torch.testing.assert_close(found[0], small(IDS, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_biases_are_pooled_too() -> None:
    model = ZOO["opt"].make()
    for name, parameter in model.named_parameters():
        if "k_proj" in name or "v_proj" in name:
            parameter.data = parameter.data.unflatten(0, (HEADS, SIZE))[ALIKE].flatten(0, 1).contiguous()
    program = captured(model)
    changed = change(program, ConvertAttentionHeads(2), flat(program))
    assert changed.outcome.applied == 2 and changed.max_abs < 1e-5


@pytest.mark.parametrize("kind", ["sinks", "alibi", "neither"])
def test_numbers_per_head_stay_with_their_heads(kind: str) -> None:
    """Heads do not change places where a mask or sinks are counted by them."""

    class PerHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = with_equal_heads(llama(HEADS))
            self.sinks = nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 3.0]), requires_grad=False)

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            layer: Any = self.model.model.layers[0].self_attn  # type: ignore[union-attr, index]
            x = self.model.model.embed_tokens(input_ids)  # type: ignore[union-attr, operator]
            q, k, v = (
                part(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
                for part in (layer.q_proj, layer.k_proj, layer.v_proj)
            )
            place = torch.arange(x.shape[1])
            scores = (q @ k.mT / SIZE**0.5).masked_fill(place[:, None] < place[None, :], -torch.inf)
            if kind == "alibi":
                weights = (scores + self.sinks[:, None, None] * place).softmax(-1)
            elif kind == "sinks":
                sinks = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
                weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            mixed: Tensor = layer.o_proj((weights @ v).transpose(1, 2).flatten(2))
            return mixed @ self.model.model.embed_tokens.weight.T  # type: ignore[union-attr, operator]

    program = captured(PerHead().eval())
    changed = change(program, ConvertAttentionHeads(2), flat(program))
    assert changed.outcome.applied == 1
    (node,) = changed.program.graph.find_nodes(op="call_function", target=ATTENTION)
    assert node.meta["head_order"] == ((0, 2, 1, 3) if kind == "neither" else (0, 1, 2, 3))
    assert (changed.max_abs < 1e-5) == (kind == "neither"), "neighbours are not equal"


def test_groups_are_the_nearest_and_ties_go_to_the_lower_number() -> None:
    heads = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9]])
    assert group_alike([heads], 2) == [0, 2, 1, 3]
    assert group_alike([torch.ones(6, 2)], 3) == [0, 1, 2, 3, 4, 5]
    assert group_alike([heads], 1) == [0, 2, 3, 1]


class Attention(nn.Module):
    """Self attention with projections that a refusal is about."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(VOCAB, 24)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24, bias=False) for _ in range(4))
        self.qkv = nn.Linear(24, 72)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.words(input_ids)
        q, k, v = self.qkv(x).chunk(3, -1) if self.kind == "fused" else (self.q(x), self.k(x), self.v(x))
        if self.kind == "shared":
            k = self.q(x) + 1
        q, k, v = (part.reshape(*x.shape[:2], 3, 8).transpose(1, 2) for part in (q, k, v))
        if self.kind == "norm per head":
            k = k * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.o(mixed) @ self.words.weight.T


@pytest.mark.parametrize(
    ("kind", "groups", "reason"),
    [
        ("plain", 2, "3 key heads cannot be shared out over 2"),
        ("fused", 1, "the heads do not come from a linear of their own"),
        ("shared", 1, "the heads do not come from a linear of their own"),
        ("norm per head", 1, "stands between the projection and the attention"),
    ],
)
def test_refuses(kind: str, groups: int, reason: str) -> None:
    torch.manual_seed(0)
    program = capture(Attention(kind).eval(), (IDS,), verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    outcome = run_pass(program.graph_module, ConvertAttentionHeads(groups))
    assert outcome.applied == 0 and [reason in refusal.reason for refusal in outcome.refused] == [True]


def test_settings() -> None:
    with pytest.raises(ValueError, match="at least 1 key head"):
        ConvertAttentionHeads(0)
