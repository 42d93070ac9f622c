"""Choices instead of logits: the same tokens, the same errors, and who may ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import tiny_model
from torchweld.decoding.cached import CachedModel
from torchweld.decoding.choices import Choices, choices_of, may_choose
from torchweld.decoding.step_model import DecodingError
from torchweld.decoding.warp import Warp


@given(st.lists(st.sampled_from([0.0, 1.0, -2.0, float("-inf"), float("nan")]), min_size=1, max_size=9))
def test_choices_of_logits_are_what_torch_finds(row: list[float]) -> None:
    logits = torch.tensor([[row]])
    found = choices_of(logits)
    assert int(found.tokens[0, 0]) == int(logits.argmax(-1))


def test_nan_is_an_error() -> None:
    found = choices_of(torch.tensor([[[1.0, float("nan")]]]))
    with pytest.raises(DecodingError, match="the logits after 7 tokens hold NaN"):
        found.token(0, 0, 7)


def test_only_plain_greedy_decoding_may_choose() -> None:
    class Model:
        def choose(self) -> None: ...

    assert may_choose(Model(), Warp(), logprobs=False)
    assert not may_choose(Model(), Warp(), logprobs=True)
    assert not may_choose(Model(), Warp(do_sample=True), logprobs=False)
    assert not may_choose(Model(), Warp(repetition_penalty=1.1), logprobs=False)
    assert not may_choose(object(), Warp(), logprobs=False)


def test_a_cached_model_chooses_what_its_logits_say(tmp_path: Path) -> None:
    model = CachedModel.from_module(tiny_model("llama", tmp_path))
    prompts = [[1, 2, 3], [4, 5]]
    ids, counts = torch.tensor([[6, 7, 8], [9, 3, 0]]), [3, 2]
    for wanted in ("last", "all", [0, 2]):
        model.prefill(prompts)
        expected = choices_of(model.step(ids, counts=counts, logits_for=wanted))  # type: ignore[arg-type]
        lengths = model.lengths
        model.prefill(prompts)
        found = model.choose(ids, counts=counts, logits_for=wanted)  # type: ignore[arg-type]
        assert isinstance(found, Choices) and model.lengths == lengths
        real = expected.tokens if wanted == "last" else expected.tokens[:, :2]
        assert torch.equal(found.tokens[:, : real.shape[1]], real)
        assert torch.equal(found.scores[:, : real.shape[1]], expected.scores[:, : real.shape[1]])
