"""Hugging Face's gpt-oss decodes with its attention sinks; dense layers stand where its experts are.

Which experts a token goes to is decided token by token in a loop that no graph holds, so its own ones do not decode.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.more_decoders import make_decoder
from tests.zoo import HIDDEN, INNER, VOCAB, WINDOW
from torchweld.codegen.ir import part_terms
from torchweld.decoding.cached import CachedModel
from torchweld.decoding.generate import generate
from torchweld.graph.capture_causal import capture_causal
from torchweld.graph.terms import Attend
from torchweld.optimizer.compile import Options

SPARE, LENGTH = 16, 40  # several turns of the ring
TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


class Dense(nn.Module):
    """In the place of the experts; it has no router, so no scores of one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(torch.nn.functional.silu(self.up(x))), None


@lru_cache
def models() -> tuple[nn.Module, CachedModel]:
    model: Any = make_decoder("gpt_oss")
    torch.manual_seed(3)
    for layer in model.model.layers:
        layer.mlp = Dense().requires_grad_(False)
        layer.self_attn.sinks.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]))
    cached = CachedModel(capture_causal(model.eval(), verify=False), options=Options(threads=1), spare=SPARE)
    assert cached.compiled().eager_reason is None
    return model, cached


@lru_cache
def text() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return ids, models()[0](input_ids=ids, use_cache=False).logits


def test_the_states_and_the_kernels_are_those_of_sinks() -> None:
    _, cached = models()
    assert [(state.kind, state.window) for state in cached.states] == [("window", WINDOW), ("causal", 0)]
    built = cached.compiled().built
    assert built is not None
    attends = [
        term
        for launch in built.plan.launches()
        for part in launch.kernel.parts
        for term in part_terms(part)
        if isinstance(term, Attend)
    ]
    assert len(attends) == 2 and all(term.sinks is not None for term in attends)


def test_prompt_chunks_and_single_tokens_equal_no_cache() -> None:
    model, cached = models()
    ids, expected = text()
    torch.testing.assert_close(cached.prefill(ids[:, :5]), expected[:, 4], **TOLERANCE)
    for start, end in ((5, 6), (6, 9), (9, 25), *((at, at + 1) for at in range(25, LENGTH))):
        found = cached.step(ids[:, start:end], logits_for="all")
        torch.testing.assert_close(found, expected[:, start:end], **TOLERANCE)
    kept = [layer.self_attn.sinks.clone() for layer in model.model.layers]  # type: ignore[attr-defined]
    for layer in model.model.layers:  # type: ignore[attr-defined]
        layer.self_attn.sinks.fill_(-100.0)
    without = model(input_ids=ids, use_cache=False).logits
    for layer, sinks in zip(model.model.layers, kept, strict=True):  # type: ignore[attr-defined]
        layer.self_attn.sinks.copy_(sinks)
    assert (without - expected).abs().max() > 0.1, "sinks that change nothing would prove nothing"


def test_many_rows_have_the_bits_of_single_rows() -> None:
    _, cached = models()
    ids, _ = text()
    for past in (1, WINDOW + 3):
        cached.prefill(ids[:1, :past])
        singles = torch.cat([cached.step(ids[:1, past + at : past + at + 1]) for at in range(16)], 1)
        for count in range(2, 17):
            cached.prefill(ids[:1, :past])
            found = cached.step(ids[:1, past : past + count], logits_for="all")
            assert torch.equal(found, singles[:, :count]), count


def test_greedy_tokens_equal_hugging_face_generation() -> None:
    model, cached = models()
    prompt = text()[0][:1, :6]
    theirs = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=28, do_sample=False, use_cache=True
    )[0, 6:].tolist()
    ours = list(generate(cached, prompt, max_new_tokens=28, eos_token_id=2).tokens)
    assert ours == theirs
    assert len(set(ours)) > 2, "a constant answer would prove nothing"
