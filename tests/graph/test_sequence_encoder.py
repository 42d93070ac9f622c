"""Which input is the text of a decoder, and what counts as its encoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.encoder_decoders import Translator, draw_tokens
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.graph.sequence import SequenceAnalysis
from torchweld.graph.sequence_rules import analyse_sequence
from torchweld.passes import CANONICALIZE, RECOGNIZE


def normalised(model: nn.Module, **inputs: Tensor) -> Program:
    program = capture(model.eval(), (), inputs, verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    return program


def two_texts() -> dict[str, Tensor]:
    return {"source": draw_tokens(2, 9, 0), "target": draw_tokens(2, 7, 1)}


@pytest.mark.parametrize("variant", ["plain", "causal encoder"])
def test_the_causal_input_are_the_tokens(variant: str) -> None:
    program = normalised(Translator(variant), **two_texts())
    found = analyse_sequence(program)
    assert isinstance(found, SequenceAnalysis), found
    assert found.tokens.name == "target"
    (cross,) = found.crosses
    assert found.encoded == cross.args[1:3], "keys and values"
    assert cross not in found.attentions and len(found.attentions) == 1
    assert found.limit == Translator.places_count, "of the text: the source's length is no limit of it"


def test_a_mask_of_the_source_is_read_too() -> None:
    inputs = {**two_texts(), "source_mask": torch.ones(2, 9, dtype=torch.int64)}
    found = analyse_sequence(normalised(Translator(), **inputs))
    assert isinstance(found, SequenceAnalysis), found
    assert len(found.encoded) == 3 and found.crosses[0].args[3] in found.encoded


def test_two_causal_texts_must_be_told_apart_by_name() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Parameter(torch.randn(11, 6))

        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return self.attend(left), self.attend(right)

        def attend(self, ids: Tensor) -> Tensor:
            x = F.embedding(ids, self.words)[:, None]
            return F.linear(F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0], self.words)

    program = normalised(Towers(), left=draw_tokens(2, 9, 0) % 11, right=draw_tokens(2, 7, 1) % 11)
    found = analyse_sequence(program)
    assert isinstance(found, Refusal)
    assert "left and right are both causal sequences: say by name" in found.reason
    for name in ("left", "right"):
        chosen = analyse_sequence(program, name)
        assert isinstance(chosen, SequenceAnalysis) and chosen.tokens.name == name


def test_a_mask_by_the_position_of_the_text_is_refused() -> None:
    class Ahead(Translator):
        def attend(self, x: Tensor, memory: Tensor, name: str, mask: Tensor | None, causal: bool) -> Tensor:
            if name == "c":
                rows, columns = torch.arange(x.shape[1])[:, None], torch.arange(memory.shape[1])
                seen = mask if mask is not None else torch.ones(1, 1, 1, 1, dtype=torch.bool)
                mask = seen & (columns <= 2 * rows)[None, None]
            return super().attend(x, memory, name, mask, causal)

    found = analyse_sequence(normalised(Ahead(), **two_texts()), "target")
    assert isinstance(found, Refusal)
    assert "depends on the position in the decoder" in found.reason


def test_a_batch_of_one_beside_an_encoder_is_refused() -> None:
    inputs = {name: ids[:1] for name, ids in two_texts().items()}
    dynamic = {"source": [1], "target": [1]}
    program = capture(Translator().eval(), (), inputs, dynamic=dynamic, verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    found = analyse_sequence(program, "target")
    assert isinstance(found, Refusal) and "fixed at 1" in found.reason
