"""Every strategy on compiled models with derived caches: the plain text, and its logits bit for bit.

Tiny models with random weights: full caches, rings that turn several times, a position table. For real ones see
tests/scripts/test_prove_strategies.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoding.guessing import RandomGuesser
from tests.passes.test_drop_layers import Blocks
from tests.tiny_models import VOCABULARY, tiny_inputs, tiny_model
from torchweld.decoding.cached import CachedModel, normalised
from torchweld.decoding.generate import generate, generate_batch
from torchweld.decoding.generation import Generation
from torchweld.decoding.lookahead import LookaheadProposer
from torchweld.decoding.lookup import LookupProposer
from torchweld.decoding.reference import ReferenceProposer
from torchweld.decoding.self_draft import draft_program, layer_influence, self_draft
from torchweld.decoding.step_model import DecodingError, Proposer, StepModel
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal
from torchweld.optimizer.compile import Options
from torchweld.passes.drop_layers import drop_layers

ONE_THREAD = Options(threads=1)
# Gemma: windows of 5 in every other layer; gpt2: a table of 32 positions.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3},
    "gemma3_text": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 3},
}
PROMPTS = ([5], [1, 2, 3, 1, 2, 3, 1, 2], list(range(20, 37)), [7, 7, 7, 7, 9, 7, 7, 7, 7])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


class Subject:
    """A program, its model with a cache, and drafts for it."""

    def __init__(self, kind: str, folder: Path) -> None:
        module = tiny_model(kind, folder, **KINDS[kind])
        self.program: Program = capture(module, tiny_inputs(kind), verify=False)
        self.model = CachedModel(self.program, options=ONE_THREAD)
        ids = torch.arange(12)[None] % VOCABULARY
        self.draft = self_draft(self.program, ids, drop=1, options=ONE_THREAD, confidence=0.0)


@lru_cache
def subject(kind: str, folder: Path) -> Subject:
    return Subject(kind, folder)


def strategies(model: StepModel, draft: Proposer, reference: Sequence[int]) -> list[Proposer]:
    return [
        LookupProposer(tokens=6),
        ReferenceProposer([list(reference)]),
        LookaheadProposer(),
        draft,
        RandomGuesser(model.vocab_size, 3),
    ]


def same(got: Generation, plain: Generation, proposer: Proposer) -> None:
    assert got.tokens == plain.tokens, proposer.name
    assert got.logprobs == plain.logprobs, f"{proposer.name}: logits differ in their last bits"
    assert got.finish == plain.finish


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_text_and_logits_are_those_of_plain_decoding(kind: str, folder: Path) -> None:
    it = subject(kind, folder)
    accepted = 0
    for prompt in PROMPTS:
        plain = generate(it.model, prompt, max_new_tokens=32, logprobs=True)
        assert len(plain.tokens) == 32 or plain.finish == "limit"
        reference = [*prompt, *plain.tokens[: len(plain.tokens) // 2], 3, *plain.tokens]
        for proposer in strategies(it.model, it.draft, reference):
            for schedule in ("constant", "adaptive") if proposer is it.draft else ("constant",):
                got = generate(
                    it.model,
                    prompt,
                    max_new_tokens=32,
                    logprobs=True,
                    proposer=proposer,
                    num_assistant_tokens_schedule=schedule,
                )
                same(got, plain, proposer)
                accepted += got.statistics.accepted
    assert accepted > 80, "guesses were accepted, so that rolling back and going on was tried"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_batch_is_its_texts_alone(kind: str, folder: Path) -> None:
    it = subject(kind, folder)
    eos = generate(it.model, PROMPTS[0], max_new_tokens=6).tokens[-1]
    values: dict[str, Any] = {"max_new_tokens": 12, "logprobs": True, "eos_token_id": eos}
    alone = [generate(it.model, prompt, **values) for prompt in PROMPTS]
    batch = generate_batch(it.model, PROMPTS, **values)
    for got, plain in zip(batch, alone, strict=True):
        assert (got.tokens, got.logprobs, got.finish) == (plain.tokens, plain.logprobs, plain.finish)


def test_layers_are_chosen_by_how_little_they_change(folder: Path) -> None:
    it = subject("gemma3_text", folder)
    ids = torch.arange(12)[None] % VOCABULARY
    influence = layer_influence(normalised(it.program), ids)
    assert len(influence) == 4 and all(0.0 < share < 2.0 for share in influence)
    dropped = draft_program(it.program, ids, 1)
    least = min((1, 2), key=lambda number: influence[number])
    expected = drop_layers(normalised(it.program), [least])
    assert not isinstance(expected, Refusal)
    assert str(dropped.graph) == str(expected.graph)
    assert str(draft_program(it.program, ids).graph) == str(draft_program(it.program, ids, 2).graph), (
        "half of them"
    )
    for count in (0, 3):
        with pytest.raises(DecodingError, match=rf"{count} layers of \w+ are to be dropped; expected 1 to 2"):
            draft_program(it.program, ids, count)


def test_a_stream_that_cannot_be_cut_makes_no_draft() -> None:
    program = capture(Blocks((8, 8, 8, 8), side=True), (torch.tensor([[1, 2, 3]]),), verify=False)
    with pytest.raises(DecodingError, match=r"no draft can be made of Blocks: .*3 attentions in"):
        draft_program(program, torch.tensor([[1, 2, 3]]), 1)
