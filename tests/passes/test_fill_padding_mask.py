"""A padding mask becomes ones, its effect is proved afterwards, and other inputs stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.passes import CANONICALIZE, RECOGNIZE
from torchweld.passes.fill_padding_mask import fill_padding_mask
from torchweld.passes.rewrite_kv_cache import StepProgram, derive_step

WIDTH, WORDS = 8, 13
IDS = torch.arange(14).reshape(2, 7) % WORDS


class Padded(nn.Module):
    """One head of attention that sees earlier tokens which are no padding."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.words = nn.Parameter(torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.embedding(ids, self.words)[:, None]
        visible = (attention_mask != 0)[:, None, None, :]
        if self.is_causal:
            visible = visible & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        mixed = F.scaled_dot_product_attention(x, x, x, attn_mask=visible)
        return F.linear(mixed[:, 0], self.words)


class Weighted(Padded):
    """The mask is a weight too."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(ids, attention_mask) * (2 * attention_mask)[:, :, None]


def derived(program: Program) -> StepProgram | Refusal:
    filled = fill_padding_mask(program)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(filled.graph_module, pass_)
    return derive_step(filled)


def test_the_mask_is_ones() -> None:
    for model in (Padded(), Weighted()):
        program = capture(model.eval(), (IDS, torch.ones_like(IDS)), verify=False)
        filled = fill_padding_mask(program)
        zeros = torch.zeros_like(IDS)
        torch.testing.assert_close(filled.run(IDS, zeros), model(IDS, torch.ones_like(IDS)))
        assert program.placeholders[1].users, "the source stays as it is"


def test_a_causal_mask_under_it_is_proved() -> None:
    for model in (Padded(), Weighted()):
        step = derived(capture(model.eval(), (IDS, torch.ones_like(IDS)), verify=False))
        assert isinstance(step, StepProgram), step
        assert [state.kind for state in step.states] == ["causal"]


def test_without_a_causal_mask_the_model_is_refused() -> None:
    refusal = derived(capture(Padded(False).eval(), (IDS, torch.ones_like(IDS)), verify=False))
    assert isinstance(refusal, Refusal) and "later tokens" in refusal.reason


def test_other_inputs_stay() -> None:
    class Named(nn.Module):
        def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
            return ids * weights

    class Floats(nn.Module):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return ids * attention_mask

    class Square(nn.Module):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return ids[:, :, None] * attention_mask

    for model, second in (
        (Named(), IDS), (Floats(), IDS.float()), (Square(), torch.ones(2, 7, 7, dtype=torch.int64)),
    ):  # fmt: skip
        program = capture(model, (IDS, second), verify=False)
        assert fill_padding_mask(program) is program
