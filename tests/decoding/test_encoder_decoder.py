"""Encoder-decoders decode with a cache: the source is encoded once, and every token is as without a cache."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.encoder_decoders import (
    END,
    HUGGING_FACE,
    START,
    Translator,
    draw_source,
    draw_tokens,
    hugging_face,
)
from torchweld.decoding.cached import CachedModel, NotDecodable
from torchweld.decoding.greedy import DecodingError
from torchweld.optimizer.compile import Options

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4}
ONE_THREAD = Options(threads=1)
LENGTH = 12


class Subject:
    """A model with and without a cache; `run` is without, in float64."""

    def __init__(self, model: nn.Module, example: dict[str, Tensor], target: str) -> None:
        self.model, self.target = model.eval(), target
        self.exact = deepcopy(model).double()
        self.cached = CachedModel.from_module(model, example, options=ONE_THREAD)
        assert self.cached.compiled().eager_reason is None

    def run(self, ids: Tensor, source: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            exact = {
                name: value.double() if value.is_floating_point() else value for name, value in source.items()
            }
            found: Any = self.exact(**exact, **{self.target: ids})
        logits: Tensor = found if isinstance(found, Tensor) else found.logits
        return logits.float()


@lru_cache
def subject(name: str) -> Subject:
    example = {**draw_source(name, 2, 9, 0), "decoder_input_ids": draw_tokens(2, 7, 0)}
    return Subject(hugging_face(name), example, "decoder_input_ids")


@lru_cache
def own(variant: str) -> Subject:
    return Subject(
        Translator(variant), {"source": draw_tokens(2, 9, 0), "target": draw_tokens(2, 7, 1)}, "target"
    )


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_decodes_as_without_a_cache(name: str) -> None:
    found, ids = subject(name), draw_tokens(2, LENGTH, 2)
    source = draw_source(name, 2, 6, 3)
    expected = found.run(ids, source)
    # The weights are large, so that greedy tokens vary; so are rounding errors, also those of the eager model.
    close = {"rtol": 1e-4, "atol": 3e-5 * float(expected.abs().max())}
    prompts = [ids[0, :2].tolist(), ids[1, :5].tolist()]
    first = found.cached.prefill(prompts, **source)
    torch.testing.assert_close(first[0], expected[0, 1], **close)
    torch.testing.assert_close(first[1], expected[1, 4], **close)
    assert found.cached.truncate(2) == (0, 3)
    for start, end in pairwise((2, 3, 7, LENGTH)):
        logits = found.cached.step(ids[:, start:end], logits_for="all")
        torch.testing.assert_close(logits, expected[:, start:end], **close)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_greedy_tokens_equal_those_of_hugging_face(name: str) -> None:
    found, source = subject(name), draw_source(name, 1, 7, 11)
    model: Any = found.model
    count = 12
    generated = model.generate(
        **source, decoder_input_ids=torch.tensor([[START, 5]]), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, num_beams=1, forced_eos_token_id=None,
    )  # fmt: skip
    logits = found.cached.prefill([[START, 5]], **source)
    tokens: list[int] = []
    while len(tokens) < count:
        logits[:, END] = -torch.inf  # as min_new_tokens does
        tokens.append(int(logits.argmax()))
        logits = found.cached.step(torch.tensor([tokens[-1:]]))[:, 0]
    assert tokens == generated[0, -count:].tolist()
    assert len(set(tokens)) > 2, "the weights make the model say one thing only: nothing is shown"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_mask_of_the_source_is_an_input(name: str) -> None:
    source = draw_source(name, 2, 9, 0)
    source["attention_mask"] = torch.ones(2, 9, dtype=torch.int64)
    source["attention_mask"][1, 4:] = 0
    ids = draw_tokens(2, 7, 4)
    found = Subject(hugging_face(name), {**source, "decoder_input_ids": ids}, "decoder_input_ids")
    expected = found.run(ids, source)
    close = {"rtol": 1e-4, "atol": 3e-5 * float(expected.abs().max())}
    torch.testing.assert_close(found.cached.prefill(ids[:, :4], **source), expected[:, 3], **close)
    torch.testing.assert_close(found.cached.step(ids[:, 4:]), expected[:, 6:], **close)
    short = {name: value[1:, :4] for name, value in source.items()}
    torch.testing.assert_close(found.run(ids[1:], short), expected[1:], **close)


@pytest.mark.parametrize("variant", ["plain", "biased"])
@settings(max_examples=10)
@given(
    cuts=st.sets(st.integers(1, LENGTH - 1)),
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
    length=st.integers(1, 11),
)
def test_every_split_equals_no_cache(
    variant: str, cuts: set[int], seed: int, batch: int, length: int
) -> None:
    found, ids = own(variant), draw_tokens(batch, LENGTH, seed)
    source = {"source": draw_tokens(batch, length, seed + 1)}
    expected = found.run(ids, source)
    calls = found.cached.encoder.calls if found.cached.encoder is not None else 0
    for start, end in pairwise([0, *sorted(cuts), LENGTH]):
        if start:
            last = found.cached.step(ids[:, start:end])
        else:
            last = found.cached.prefill(ids[:, :end], **source)[:, None]
        torch.testing.assert_close(last, expected[:, end - 1 : end], **CLOSE)
    assert found.cached.encoder is not None
    assert found.cached.encoder.calls == calls + 1, "one source is encoded once"


@pytest.mark.parametrize("variant", ["plain", "biased"])
def test_one_row_and_many_rows_are_the_same_bits(variant: str) -> None:
    found, ids = own(variant), draw_tokens(1, LENGTH, 8)
    source = {"source": draw_tokens(1, 9, 9)}
    found.cached.prefill(ids[:, :1], **source)
    many = found.cached.step(ids[:, 1:], logits_for="all")
    found.cached.truncate(1)
    single = [found.cached.step(ids[:, row : row + 1]) for row in range(1, LENGTH)]
    assert torch.equal(torch.cat(single, 1), many)


@pytest.mark.parametrize("variant", ["plain", "biased"])
def test_trees_rollback_and_uneven_steps(variant: str) -> None:
    found, ids = own(variant), draw_tokens(2, LENGTH, 5)
    source = {"source": draw_tokens(2, 8, 6)}
    expected = found.run(ids, source)
    found.cached.prefill([ids[0, :3].tolist(), ids[1, :6].tolist()], **source)
    rows = torch.stack([ids[0, 3:7], ids[1, 6:10]])
    logits = found.cached.step(rows, counts=[4, 2], logits_for="all")
    torch.testing.assert_close(logits[0], expected[0, 3:7], **CLOSE)
    torch.testing.assert_close(logits[1, :2], expected[1, 6:8], **CLOSE)
    assert found.cached.lengths == (7, 8)
    first = {"source": source["source"][:1]}
    found.cached.prefill(ids[:1, :3], **first)
    found.cached.step(torch.tensor([[9, int(ids[0, 3]), 9, int(ids[0, 4])]]), parents=[-1, -1, 0, 1])
    found.cached.keep([1, 3])
    torch.testing.assert_close(found.cached.step(ids[:1, 5:6]), expected[:1, 5:6], **CLOSE)
    assert found.cached.truncate(3) == (3,)
    torch.testing.assert_close(found.cached.step(ids[:1, 3:])[:, 0], expected[:1, -1], **CLOSE)


def test_the_source_stays_until_another_is_given() -> None:
    found, ids = own("plain"), draw_tokens(2, 5, 5)
    source, other = {"source": draw_tokens(2, 8, 6)}, {"source": draw_tokens(2, 3, 7)}
    before = found.cached.prefill(ids, **source)
    assert not torch.allclose(found.cached.prefill(ids, **other), before), "the source decides the text"
    torch.testing.assert_close(found.cached.prefill(ids[:, :2]), found.run(ids, other)[:, 1], **CLOSE)


def test_wrong_inputs_leave_everything_as_it_was() -> None:
    found, ids = own("plain"), draw_tokens(2, 5, 5)
    source = {"source": draw_tokens(2, 8, 6)}
    fresh = found.cached.with_cache()
    with pytest.raises(DecodingError, match="begin with prefill"):
        fresh.step(ids[:1])
    with pytest.raises(DecodingError, match="begin with prefill"):
        fresh.prefill(ids)
    found.cached.prefill(ids, **source)
    with pytest.raises(DecodingError, match="3 sources for 2 prompts"):
        found.cached.prefill(ids, source=draw_tokens(3, 8, 6))
    with pytest.raises(DecodingError, match="not part of the capture"):
        found.cached.prefill(ids, sauce=source["source"])
    with pytest.raises(DecodingError, match="1 texts and 2 encoded sources"):
        found.cached.prefill(ids[:1])
    with pytest.raises(DecodingError, match="float32"):
        found.cached.prefill(ids, source=source["source"].float())
    assert found.cached.lengths == (5, 5)
    after = found.cached.step(ids[:, :1])
    torch.testing.assert_close(after, found.run(torch.cat([ids, ids[:, :1]], 1), source)[:, -1:], **CLOSE)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("tokens in keys", "mean over the sequence axis: a later token changes earlier outputs"),
        ("pooled", "outside of attention"),
        ("diagonal", "of this cross attention depends on the position in the decoder"),
    ],
)
def test_refused_with_the_reason(variant: str, reason: str) -> None:
    example = {"source": draw_tokens(2, 9, 0), "target": draw_tokens(2, 7, 1)}
    with pytest.raises(NotDecodable, match=reason):
        CachedModel.from_module(Translator(variant), example, options=ONE_THREAD)


def test_the_tokens_may_be_named() -> None:
    example = {"source": draw_tokens(2, 9, 0), "target": draw_tokens(2, 7, 1)}
    with pytest.raises(NotDecodable, match="flip of the sequence axis"):
        CachedModel.from_module(Translator(), example, tokens="source", options=ONE_THREAD)
    with pytest.raises(NotDecodable, match="no input 'text' that the graph reads; it reads"):
        CachedModel.from_module(Translator(), example, tokens="text", options=ONE_THREAD)


def test_an_example_with_texts_of_one_length_ties_them_not_together() -> None:
    found = Subject(Translator(), {"source": draw_tokens(2, 7, 0), "target": draw_tokens(2, 7, 1)}, "target")
    ids, source = draw_tokens(2, 4, 2), {"source": draw_tokens(2, 9, 3)}
    torch.testing.assert_close(found.cached.prefill(ids, **source), found.run(ids, source)[:, -1], **CLOSE)
