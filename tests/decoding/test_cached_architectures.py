"""Every causal Hugging Face architecture of the zoo decodes with the derived cache, as without one."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.zoo import VOCAB, WINDOW, ZOO
from torchweld.decoding.cached import CachedModel
from torchweld.decoding.generate import generate
from torchweld.graph.capture_causal import capture_causal
from torchweld.optimizer.compile import Options

NAMES = tuple(name for name, entry in ZOO.items() if entry.kind == "causal")
WINDOWED = ("mistral", "gemma2", "gemma3_text", "starcoder2")
SPARE = 6
LENGTH = 4 * (WINDOW + SPARE)  # several turns of a ring
TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


@lru_cache
def architecture(name: str) -> tuple[nn.Module, CachedModel]:
    model = ZOO[name].make()
    cached = CachedModel(capture_causal(model, verify=False), options=Options(threads=1), spare=SPARE)
    assert cached.compiled().eager_reason is None
    return model, cached


@lru_cache
def text_of(name: str) -> tuple[Tensor, Tensor]:
    """Two texts [2, LENGTH], and their logits without a cache."""
    ids = ZOO[name].inputs(2, LENGTH, seed=1)["input_ids"]
    with torch.no_grad():
        return ids, architecture(name)[0](input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_prompt_chunks_and_single_tokens_equal_no_cache(name: str) -> None:
    _, model = architecture(name)
    ids, expected = text_of(name)
    torch.testing.assert_close(model.prefill(ids), expected[:, -1], **TOLERANCE)
    torch.testing.assert_close(model.prefill(ids[:, :5]), expected[:, 4], **TOLERANCE)
    for start, end in ((5, 6), (6, 9), (9, 30), *((at, at + 1) for at in range(30, LENGTH))):
        found = model.step(ids[:, start:end], logits_for="all")
        torch.testing.assert_close(found, expected[:, start:end], **TOLERANCE)
    windows = {state.window for state in model.states}
    assert (max(windows) == WINDOW) == (name in WINDOWED)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5)
@given(
    first=st.integers(1, 20), second=st.integers(1, 20), junk=st.integers(1, SPARE), more=st.integers(1, 9),
)  # fmt: skip
def test_different_lengths_and_rolling_back(name: str, first: int, second: int, junk: int, more: int) -> None:
    _, model = architecture(name)
    ids, expected = text_of(name)
    logits = model.prefill([ids[0, :first].tolist(), ids[1, :second].tolist()])
    torch.testing.assert_close(
        logits, torch.stack([expected[0, first - 1], expected[1, second - 1]]), **TOLERANCE
    )
    model.step(ids[:, -junk:].flip(0))
    assert model.truncate([first, second]) == (junk, junk)
    rows = torch.stack([ids[0, first : first + more], ids[1, second : second + more]])
    found = model.step(rows, counts=[more, 1], logits_for="all")
    torch.testing.assert_close(found[0], expected[0, first : first + more], **TOLERANCE)
    torch.testing.assert_close(found[1, 0], expected[1, second], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_trees_have_the_bits_of_single_rows(name: str) -> None:
    _, model = architecture(name)
    ids, _ = text_of(name)
    text, rows = ids[:1, :9], ids[:1, 9:16]
    model.prefill(text)
    singles = torch.cat([model.step(rows[:, at : at + 1]) for at in range(7)], 1)
    model.prefill(text)
    assert torch.equal(model.step(rows, logits_for="all"), singles)
    # The same seven rows as a path of a tree in which strangers stand between them.
    tree = torch.stack([rows[0], (rows[0] + 1) % VOCAB], 1).reshape(1, 14)
    parents = [parent for at in range(7) for parent in (2 * at - 2 if at else -1,) * 2]
    model.prefill(text)
    found = model.step(tree, parents=parents, logits_for="all")
    assert model.compiled(is_tree=True).eager_reason is None
    assert torch.equal(found[:, ::2], singles)
    model.keep(range(0, 14, 2))
    after = model.step(ids[:1, 16:18])
    model.prefill(ids[:1, :16])
    assert torch.equal(model.step(ids[:1, 16:18]), after)


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3"])
def test_greedy_tokens_equal_hugging_face_generation(name: str) -> None:
    """Their cache is the second oracle; mistral passes its window of 8 several times."""
    model, cached = architecture(name)
    prompt = ZOO[name].inputs(1, 6, seed=4)["input_ids"]
    theirs = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=28, do_sample=False, use_cache=True
    )[0, 6:].tolist()
    ours = list(generate(cached, prompt, max_new_tokens=28, eos_token_id=2).tokens)
    assert ours == theirs
    assert len(set(ours)) > 2, "a constant answer would prove nothing"
