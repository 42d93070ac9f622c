"""The derived cache against the model without one: whole, in any chunks, after rollbacks, and token by token."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tiny_models import VOCABULARY, tiny_inputs, tiny_model
from tests.zoo import ZOO
from torchweld.decoding.cache import Cache, CacheError
from torchweld.decoding.cached import CachedModel, NotDecodable, generate_cached
from torchweld.decoding.greedy import DecodingError, generate
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Options
from torchweld.passes.rewrite_kv_cache import LayerState

KINDS = ("llama", "gemma3_text", "gpt2")
ARCHITECTURES = ("llama", "mistral", "gemma2", "opt", "bloom", "falcon", "phi3")
LENGTH = 20  # more than twice the tiny gemma's window of 5
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}
ONE_THREAD = Options(threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


class Subject:
    """A model, its program and its cached form; caches are started over by every test."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = model, program
        self.cached = CachedModel(program, options=ONE_THREAD)

    def whole(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(ids)
        return logits


@lru_cache
def subject(kind: str, folder: Path) -> Subject:
    model = tiny_model(kind, folder)
    return Subject(model, capture(model, tiny_inputs(kind), verify=False))


def draw_ids(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_prompt_equals_no_cache(kind: str, folder: Path) -> None:
    found = subject(kind, folder)
    ids = draw_ids(2, LENGTH, 0)
    torch.testing.assert_close(found.cached.prefill(ids, logits="all"), found.whole(ids), **TOLERANCE)
    torch.testing.assert_close(found.cached.prefill(ids), found.whole(ids)[:, -1:], **TOLERANCE)
    assert found.cached.length == LENGTH


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(cuts=st.sets(st.integers(1, LENGTH - 1)), seed=st.integers(0, 99), batch=st.integers(1, 2))
def test_every_split_equals_no_cache(kind: str, folder: Path, cuts: set[int], seed: int, batch: int) -> None:
    found = subject(kind, folder)
    ids = draw_ids(batch, LENGTH, seed)
    expected = found.whole(ids)
    bounds = [0, *sorted(cuts), LENGTH]
    for start, end in pairwise(bounds):
        call = found.cached.step if start else found.cached.prefill
        torch.testing.assert_close(call(ids[:, start:end]), expected[:, end - 1 : end], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(kept=st.integers(1, LENGTH - 1), junk=st.integers(1, 9), seed=st.integers(0, 99))
def test_tokens_rolled_back_leave_no_trace(kind: str, folder: Path, kept: int, junk: int, seed: int) -> None:
    found = subject(kind, folder)
    ids = draw_ids(1, LENGTH, seed)
    found.cached.prefill(ids[:, :kept])
    found.cached.step(draw_ids(1, junk, seed + 1))
    assert found.cached.truncate(kept) == junk
    after = found.cached.step(ids[:, kept:])
    torch.testing.assert_close(after, found.whole(ids)[:, -1:], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_recomputation(kind: str, folder: Path) -> None:
    found = subject(kind, folder)
    seen: set[int] = set()
    for seed in range(4):
        prompt = draw_ids(1, 6, seed)
        expected = list(generate(found.whole, prompt, 12))
        assert list(generate_cached(found.cached, prompt, 12)) == expected
        seen |= set(expected)
    assert len(seen) > 2, "a constant answer would prove nothing"


@lru_cache
def hugging_face(name: str) -> tuple[nn.Module, CachedModel]:
    model = ZOO[name].make()
    inputs = {"input_ids": ZOO[name].inputs(2, 7)["input_ids"], "use_cache": False}
    return model, CachedModel(capture(model, (), inputs, verify=False), options=ONE_THREAD)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hugging_face_architecture_decodes(name: str) -> None:
    model, cached = hugging_face(name)
    ids = ZOO[name].inputs(2, LENGTH)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    for start, end in ((0, 11), (11, 12), (12, 17), (17, LENGTH)):
        call = cached.step if start else cached.prefill
        torch.testing.assert_close(call(ids[:, start:end]), expected[:, end - 1 : end], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3"])
def test_greedy_tokens_equal_hugging_face_generation(name: str) -> None:
    """Their cache is the second oracle; mistral passes its window of 8 four times."""
    model, cached = hugging_face(name)
    prompt = ZOO[name].inputs(1, 6, seed=4)["input_ids"]
    theirs = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=28, do_sample=False, use_cache=True
    )[0, 6:].tolist()
    ours = list(generate_cached(cached, prompt, 28, eos=(2,)))
    assert ours == [token for token in theirs if token != 2]
    assert len(set(ours)) > 2


def test_one_row_and_many_rows_give_the_same_bits(folder: Path) -> None:
    cached = subject("llama", folder).cached
    ids = draw_ids(1, LENGTH, 5)
    cached.prefill(ids[:, :4])
    singles = [cached.step(ids[:, at : at + 1]) for at in range(4, LENGTH)]
    cached.truncate(4)
    for at in range(4, LENGTH, 4):
        assert torch.equal(cached.step(ids[:, at : at + 4]), singles[at + 3 - 4])


def test_unused_room_is_not_read(folder: Path) -> None:
    """Rows behind the length hold NaN: they must not reach the logits."""
    found = subject("llama", folder)
    ids = draw_ids(1, LENGTH, 6)
    found.cached.prefill(ids)
    found.cached.truncate(8)
    for buffer in found.cached.cache._buffers:
        buffer[8:] = float("nan")
    torch.testing.assert_close(found.cached.step(ids[:, 8:]), found.whole(ids)[:, -1:], **TOLERANCE)


def test_fork_continues_on_its_own(folder: Path) -> None:
    found = subject("llama", folder)
    ids = draw_ids(1, LENGTH, 7)
    found.cached.prefill(ids[:, :9])
    branch = found.cached.cache.fork()
    found.cached.step(draw_ids(1, 3, 8))
    found.cached.cache = branch
    torch.testing.assert_close(found.cached.step(ids[:, 9:]), found.whole(ids)[:, -1:], **TOLERANCE)


def snapshot(model: CachedModel) -> tuple[int, list[Tensor]]:
    return model.length, [view.clone() for view in model.cache.views()]


def assert_as_before(model: CachedModel, before: tuple[int, list[Tensor]]) -> None:
    length, views = snapshot(model)
    assert length == before[0]
    assert all(torch.equal(left, right) for left, right in zip(views, before[1], strict=True))


def test_errors_leave_the_cache_as_it_was(folder: Path) -> None:
    found = subject("llama", folder)
    model = CachedModel(found.program, options=ONE_THREAD, max_length=10)
    ids = draw_ids(1, LENGTH, 9)
    model.prefill(ids[:, :8])
    before = snapshot(model)
    with pytest.raises(CacheError, match=r"8 positions and 3 new ones are more than the limit of 10"):
        model.step(ids[:, 8:11])
    with pytest.raises(CacheError, match=r"2 rows of tokens for a cache of 1"):
        model.step(draw_ids(2, 1, 0))
    with pytest.raises(CacheError, match=r"cannot truncate 8 positions to 9"):
        model.truncate(9)
    with pytest.raises(IndexError, match="outside its table"):
        model.step(torch.tensor([[VOCABULARY]]))
    with pytest.raises(DecodingError, match="expected int64"):
        model.step(ids[:, 8:9].int())
    with pytest.raises(CacheError, match="limit of 10"):
        model.prefill(ids)
    assert_as_before(model, before)
    torch.testing.assert_close(model.step(ids[:, 8:10]), found.whole(ids[:, :10])[:, -1:], **TOLERANCE)


def test_position_table_is_a_limit(folder: Path) -> None:
    cached = subject("gpt2", folder).cached
    assert cached.max_length == 32
    cached.prefill(draw_ids(1, 32, 1))
    with pytest.raises(CacheError, match="limit of 32"):
        cached.step(draw_ids(1, 1, 1))


def test_memory_follows_the_length(folder: Path) -> None:
    found = subject("llama", folder)
    model = CachedModel(found.program, options=ONE_THREAD, max_length=100)
    per_token = sum(state.bytes_per_token for state in model.states)
    assert per_token == 2 * 2 * 2 * 16 * 4  # layers, key and value, heads, features, float32
    model.prefill(draw_ids(1, 10, 1))
    assert model.cache.nbytes == 16 * per_token
    model.step(draw_ids(1, 80, 1))
    for length in range(91, 101):
        model.step(draw_ids(1, 1, 1))
        assert length * per_token <= model.cache.nbytes <= 100 * per_token, "never past the limit"


def test_memory_stays_near_the_minimum() -> None:
    state = LayerState("attention", "causal", 0, 1, 4, 4, torch.float32, "")
    cache = Cache([state], batch=1)
    cache.append([torch.zeros(400, 1, 1, 4)] * 2)
    for length in range(401, 1500):
        cache.append([torch.full((1, 1, 1, 4), float(length))] * 2)
        assert cache.length == length
        assert cache.nbytes <= 1.05 * length * state.bytes_per_token
    assert torch.equal(cache.views()[0][400:, 0, 0, 0], torch.arange(401.0, 1500.0))


def test_bidirectional_model_is_refused_with_its_node(folder: Path) -> None:
    model = tiny_model("bert", folder)
    ids = tiny_inputs("bert")[0]

    class Unmasked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> object:
            return self.inner(ids, torch.ones_like(ids))

    with pytest.raises(NotDecodable) as caught:
        CachedModel(capture(Unmasked(), (ids,), verify=False), options=ONE_THREAD)
    assert "later tokens" in str(caught.value)
    assert caught.value.refusal.node is not None
    assert ".py:" in str(caught.value), "the source line is named"
