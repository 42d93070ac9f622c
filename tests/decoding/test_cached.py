"""The derived cache against the model without one, on our own models: everything a step may be asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tiny_models import VOCABULARY, tiny_inputs, tiny_model
from torchweld.codegen.cpp_packed import Precision
from torchweld.decoding.cached import CachedModel, CacheError, NotDecodable
from torchweld.decoding.generate import generate
from torchweld.decoding.greedy import DecodingError
from torchweld.decoding.greedy import generate as recompute
from torchweld.decoding.step_model import StepModel
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Options

KINDS = ("llama", "gemma3_text", "gpt2")
LENGTH = 20
WINDOW = 5  # of the tiny gemma
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}
ONE_THREAD = Options(threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


class Subject:
    """A model, its program and its cached form; caches are started over by every test."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = model, program
        self.cached = CachedModel(program, options=ONE_THREAD, spare=4)

    def whole(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(ids)
        return logits


@lru_cache
def subject(kind: str, folder: Path) -> Subject:
    model = tiny_model(kind, folder)
    found = Subject(model, capture(model, tiny_inputs(kind), verify=False))
    assert found.cached.compiled().eager_reason is None
    return found


def draw_ids(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def as_step_model(model: CachedModel) -> StepModel:
    """That a type checker accepts this is the test."""
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_whole_prompt_equals_no_cache(kind: str, folder: Path) -> None:
    found = subject(kind, folder)
    ids = draw_ids(2, LENGTH, 0)
    torch.testing.assert_close(found.cached.prefill(ids), found.whole(ids)[:, -1], **TOLERANCE)
    assert found.cached.lengths == (LENGTH, LENGTH)
    found.cached.prefill(ids[:, :1])
    everything = found.cached.step(ids[:, 1:], logits_for="all")
    torch.testing.assert_close(everything, found.whole(ids)[:, 1:], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(cuts=st.sets(st.integers(1, LENGTH - 1)), seed=st.integers(0, 99), batch=st.integers(1, 2))
def test_every_split_equals_no_cache(kind: str, folder: Path, cuts: set[int], seed: int, batch: int) -> None:
    found = subject(kind, folder)
    ids = draw_ids(batch, LENGTH, seed)
    expected = found.whole(ids)
    for start, end in pairwise([0, *sorted(cuts), LENGTH]):
        last = found.cached.step(ids[:, start:end]) if start else found.cached.prefill(ids[:, :end])[:, None]
        torch.testing.assert_close(last, expected[:, end - 1 : end], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(kept=st.integers(1, LENGTH - 1), junk=st.integers(1, 4), seed=st.integers(0, 99))
def test_tokens_rolled_back_leave_no_trace(kind: str, folder: Path, kept: int, junk: int, seed: int) -> None:
    found = subject(kind, folder)
    ids = draw_ids(1, LENGTH, seed)
    found.cached.prefill(ids[:, :kept])
    found.cached.step(draw_ids(1, junk, seed + 1))
    assert found.cached.truncate(kept) == (junk,)
    after = found.cached.step(ids[:, kept:])
    torch.testing.assert_close(after, found.whole(ids)[:, -1:], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    turns=st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_sequences_of_different_lengths_equal_each_alone(
    kind: str, folder: Path, lengths: list[int], turns: list[list[int]], seed: int
) -> None:
    found = subject(kind, folder)
    texts = draw_ids(len(lengths), 13 + 4 * len(turns), seed)
    have = list(lengths)
    logits = found.cached.prefill([texts[b, :length].tolist() for b, length in enumerate(lengths)])
    expected = [found.whole(text[None])[0] for text in texts]
    for b, length in enumerate(have):
        torch.testing.assert_close(logits[b], expected[b][length - 1], **TOLERANCE)
    for turn in turns:
        counts = turn[: len(lengths)]
        width = max(*counts, 1)
        ids = torch.full((len(lengths), width), -1)
        for b, count in enumerate(counts):
            ids[b, :count] = texts[b, have[b] : have[b] + count]
        logits = found.cached.step(ids, counts=counts)
        have = [length + count for length, count in zip(have, counts, strict=True)]
        assert found.cached.lengths == tuple(have)
        for b, count in enumerate(counts):
            if count:
                torch.testing.assert_close(logits[b, 0], expected[b][have[b] - 1], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(
    past=st.integers(1, 14),
    parents=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    seed=st.integers(0, 99),
)
def test_every_row_of_a_tree_equals_its_path_fed_plainly(
    kind: str, folder: Path, past: int, parents: list[int], seed: int
) -> None:
    """To the bit; and the kept path continues as if nothing else had been there."""
    model = subject(kind, folder).cached
    tree = [min(parent, row) - 1 for row, parent in enumerate(parents)]
    prompt, ids, more = draw_ids(1, past, seed), draw_ids(1, len(tree), seed + 1), draw_ids(1, 3, seed + 2)
    paths: list[list[int]] = []
    for row, parent in enumerate(tree):
        paths.append([*(paths[parent] if parent >= 0 else []), row])
    plain = []
    for path in paths:
        model.prefill(prompt)
        plain.append([model.step(ids[:, row : row + 1]) for row in path][-1])
    after = model.step(more, logits_for="all")  # behind the path of the last row
    model.prefill(prompt)
    found = model.step(ids, parents=tree, logits_for="all")
    assert torch.equal(found, torch.cat(plain, 1))
    assert model.lengths == (past + len(tree),)
    model.keep(paths[-1])
    assert model.lengths == (past + len(paths[-1]),)
    assert torch.equal(model.step(more, logits_for="all"), after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", range(1, 17))
def test_one_row_and_many_rows_give_the_same_bits(kind: str, folder: Path, rows: int) -> None:
    model = subject(kind, folder).cached
    ids = draw_ids(1, 4 + rows, rows)
    model.prefill(ids[:, :4])
    singles = torch.cat([model.step(ids[:, at : at + 1]) for at in range(4, 4 + rows)], 1)
    model.prefill(ids[:, :4])
    assert torch.equal(model.step(ids[:, 4:], logits_for="all"), singles)
    assert torch.equal(model.prefill(ids), singles[:, -1])
    model.prefill(torch.cat([draw_ids(2, 4, 8), ids[:, :4]]))
    padded = torch.cat([draw_ids(2, rows, 9), ids[:, 4:]])
    found = model.step(padded, counts=[1, 0, rows], logits_for="all")[2:]
    assert torch.equal(found, singles), "neighbours of other lengths change nothing"


def test_past_the_window_by_several_turns_of_the_ring(folder: Path) -> None:
    found = subject("gemma3_text", folder)
    turns = 8 * WINDOW
    ids = draw_ids(1, turns, 3)
    expected = found.whole(ids)
    found.cached.prefill(ids[:, :2])
    for at in range(2, turns):
        torch.testing.assert_close(
            found.cached.step(ids[:, at : at + 1]), expected[:, at : at + 1], **TOLERANCE
        )
    ring = next(state for state in found.cached.states if state.kind == "window")
    sizes = {tensor.shape[2] for tensor in found.cached.cache.tensors()}
    assert ring.window == WINDOW and min(sizes) == WINDOW + 4


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_longer_than_a_chunk(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchweld.decoding.cached.CHUNK", 6)
    found = subject(kind, folder)
    ids = draw_ids(2, LENGTH, 4)
    expected = found.whole(ids)
    torch.testing.assert_close(found.cached.prefill(ids), expected[:, -1], **TOLERANCE)
    logits = found.cached.prefill([ids[0, :17].tolist(), ids[1].tolist()])
    torch.testing.assert_close(logits, torch.stack([expected[0, 16], expected[1, 19]]), **TOLERANCE)
    found.cached.prefill(ids[:, :3])
    logits = found.cached.step(ids[:, 3:], counts=[17, 2], logits_for="all")
    torch.testing.assert_close(logits[0], expected[0, 3:], **TOLERANCE)
    torch.testing.assert_close(logits[1, :2], expected[1, 3:5], **TOLERANCE)
    assert found.cached.lengths == (20, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_recomputation(kind: str, folder: Path) -> None:
    found = subject(kind, folder)
    seen: set[int] = set()
    for seed in range(4):
        prompt = draw_ids(1, 6, seed)
        expected = list(recompute(found.whole, prompt, 12))
        assert list(generate(found.cached, prompt, max_new_tokens=12).tokens) == expected
        seen |= set(expected)
    assert len(seen) > 2, "a constant answer would prove nothing"


def test_chosen_rows_are_rows_of_all(folder: Path) -> None:
    model = subject("llama", folder).cached
    ids = draw_ids(2, 9, 5)
    model.prefill(ids[:, :2])
    fork = model.cache.fork()
    everything = model.step(ids[:, 2:], logits_for="all")
    model.cache = fork
    assert torch.equal(model.step(ids[:, 2:], logits_for=[4, 1]), everything[:, [4, 1]])


def test_caches_are_written_in_place(folder: Path) -> None:
    model = subject("llama", folder).cached
    model.prefill(draw_ids(1, 9, 5))
    before = [tensor.data_ptr() for tensor in model.cache.tensors()]
    model.step(draw_ids(1, 1, 6))
    assert [tensor.data_ptr() for tensor in model.cache.tensors()] == before


@pytest.mark.parametrize("kind", KINDS)
def test_unused_slots_are_not_read(kind: str, folder: Path) -> None:
    """NaN in every slot that holds no position must not reach the logits."""
    found = subject(kind, folder)
    ids = draw_ids(1, LENGTH, 6)
    found.cached.prefill(ids[:, :LENGTH])
    found.cached.truncate(LENGTH - 2)
    for tensor in found.cached.cache.tensors():
        capacity = tensor.shape[2]
        kept = {
            j % capacity
            for j in range(max(0, LENGTH - 2 - WINDOW + 1) if capacity < LENGTH else 0, LENGTH - 2)
        }
        tensor[:, :, [slot for slot in range(capacity) if slot not in kept]] = float("nan")
    torch.testing.assert_close(found.cached.step(ids[:, -2:]), found.whole(ids)[:, -1:], **TOLERANCE)


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_as_many_rows_as_are_exact_have_the_bits_of_one(precision: Precision, folder: Path) -> None:
    found = subject("llama", folder)
    model = CachedModel(found.program, options=replace(ONE_THREAD, precision=precision))
    assert model.exact_rows == (None if precision == "f32" else 16)
    ids = draw_ids(1, 9 + 16, 8)
    model.prefill(ids[:, :9])
    single = torch.cat([model.step(ids[:, place : place + 1]) for place in range(9, 25)], 1)
    model.prefill(ids[:, :9])
    assert torch.equal(model.step(ids[:, 9:], logits_for="all"), single)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_one_step_take_turns(kind: str, folder: Path) -> None:
    found = subject(kind, folder)
    models = [found.cached.with_cache(spare=4), found.cached.with_cache(max_length=32, up_front=True)]
    texts = [draw_ids(2, LENGTH, seed) for seed in (11, 12)]
    for model, ids in zip(models, texts, strict=True):
        model.prefill(ids[:, :3])
    for at in range(3, LENGTH - 1):
        for model, ids in zip(models, texts, strict=True):
            now = model.step(ids[:, at : at + 1])
            torch.testing.assert_close(now, found.whole(ids[:, : at + 1])[:, -1:], **TOLERANCE)
        if at % 5 == 0:
            models[0].truncate(at)
            models[0].step(texts[0][:, at : at + 1])


def test_fork_continues_on_its_own(folder: Path) -> None:
    found = subject("llama", folder)
    ids = draw_ids(1, LENGTH, 7)
    found.cached.prefill(ids[:, :9])
    branch = found.cached.cache.fork()
    found.cached.step(draw_ids(1, 3, 8))
    found.cached.cache = branch
    torch.testing.assert_close(found.cached.step(ids[:, 9:]), found.whole(ids)[:, -1:], **TOLERANCE)


Bits = tuple[tuple[int, ...], list[Tensor]]


def snapshot(model: CachedModel) -> Bits:
    return model.lengths, [tensor.clone().view(torch.int32) for tensor in model.cache.tensors()]


def assert_as_before(model: CachedModel, before: Bits) -> None:
    lengths, tensors = snapshot(model)
    assert lengths == before[0]
    assert all(torch.equal(left, right) for left, right in zip(tensors, before[1], strict=True))


def test_errors_leave_the_cache_as_it_was(folder: Path) -> None:
    found = subject("llama", folder)
    model = CachedModel(found.program, options=ONE_THREAD, max_length=10)
    ids = draw_ids(1, LENGTH, 9)
    model.prefill(ids[:, :8])
    before = snapshot(model)
    with pytest.raises(CacheError, match=r"8 positions and 3 new ones are more than the limit of 10"):
        model.step(ids[:, 8:11])
    with pytest.raises(CacheError, match=r"2 sequences for a cache of 1"):
        model.step(draw_ids(2, 1, 0))
    with pytest.raises(CacheError, match=r"cannot truncate 8 positions to 9"):
        model.truncate(9)
    with pytest.raises(IndexError, match="outside the model's table of 97 tokens"):
        model.step(torch.tensor([[VOCABULARY]]))
    with pytest.raises(DecodingError, match="expected int64"):
        model.step(ids[:, 8:9].int())
    with pytest.raises(CacheError, match="limit of 10"):
        model.prefill(ids)
    with pytest.raises(IndexError, match="token 97"):
        model.prefill([[3, VOCABULARY]])
    with pytest.raises(CacheError, match="no tree"):
        model.keep([0])
    assert_as_before(model, before)
    torch.testing.assert_close(model.step(ids[:, 8:10]), found.whole(ids[:, :10])[:, -1:], **TOLERANCE)


def test_an_interrupted_step_leaves_the_cache_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = subject("gemma3_text", folder)
    model, ids = found.cached, draw_ids(1, LENGTH, 9)
    model.prefill(ids[:, :9])
    compiled = model.compiled()

    class Stopping:
        """Runs the step once; the second call is interrupted."""

        calls = 0

        def __call__(self, *inputs: object) -> tuple[object, ...]:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return compiled(*inputs)

        def prepare(self, *inputs: object) -> Callable[[], tuple[object, ...]]:
            return lambda: self(*inputs)

    for attempt in (lambda: model.step(ids[:, 9:]), lambda: model.prefill(ids)):
        with monkeypatch.context() as patch:
            patch.setattr("torchweld.decoding.cached.CHUNK", 4)
            patch.setitem(model._steps, False, Stopping())  # type: ignore[arg-type]
            with pytest.raises(KeyboardInterrupt):
                attempt()
        assert model.lengths == (9,)
    torch.testing.assert_close(model.step(ids[:, 9:]), found.whole(ids)[:, -1:], **TOLERANCE)


def test_a_ring_refuses_to_go_back_beyond_its_slots(folder: Path) -> None:
    found = subject("gemma3_text", folder)
    model, ids = found.cached, draw_ids(1, LENGTH, 9)
    model.prefill(ids)
    before = snapshot(model)
    with pytest.raises(
        CacheError, match="a window of 5 reads positions from 9 on, and its ring of 9 slots has kept"
    ):
        model.truncate(LENGTH - 7)
    assert_as_before(model, before)
    model.truncate(LENGTH - 4)
    torch.testing.assert_close(model.step(ids[:, -4:]), found.whole(ids)[:, -1:], **TOLERANCE)


def test_a_long_chain_of_guesses_can_be_rolled_back_past_the_window(folder: Path) -> None:
    """More guesses than the ring has spare slots: the ring came back before the guesses were judged."""
    found = subject("gemma3_text", folder)
    model, ids = found.cached, draw_ids(1, 4 * WINDOW, 11)
    model.prefill(ids)
    guesses = draw_ids(1, 3 * WINDOW, 12)
    model.step(guesses, logits_for="all")
    model.truncate(4 * WINDOW + 1)
    text = torch.cat([ids, guesses[:, :2]], dim=1)
    torch.testing.assert_close(model.step(guesses[:, 1:2]), found.whole(text)[:, -1:], **TOLERANCE)
    assert min(tensor.shape[2] for tensor in model.cache.tensors()) == WINDOW + 4


def test_position_table_is_a_limit(folder: Path) -> None:
    model = subject("gpt2", folder).cached
    assert model.max_length == 32
    model.prefill(draw_ids(2, 31, 1))
    model.step(draw_ids(2, 4, 2), counts=[1, 0])
    assert model.lengths == (32, 31), "padding behind the table is no position"
    with pytest.raises(CacheError, match="limit of 32"):
        model.step(draw_ids(2, 1, 1))


def test_what_the_model_is(folder: Path) -> None:
    model = subject("gemma3_text", folder).cached
    assert as_step_model(model).vocab_size == VOCABULARY
    assert model.max_length is None
    assert {(state.kind, state.window) for state in model.states} == {("causal", 0), ("window", WINDOW)}


def launches_of_the_last_call(model: CachedModel) -> list[str]:
    executable = model.compiled().executable
    assert executable is not None and executable._placed is not None
    return [launch.kernel.name for group in executable._placed.launches for launch in group]


@pytest.mark.parametrize("kind", KINDS)
def test_few_kernels_per_layer(kind: str, folder: Path) -> None:
    model = subject(kind, folder).cached
    model.prefill([[1, 2]])
    launches = launches_of_the_last_call(model)  # the end that nobody asked for is not launched
    assert len(launches) <= 2 * 8 + 1, launches
    model.choose(torch.tensor([[3]]))
    assert len(launches_of_the_last_call(model)) == len(launches)


def test_from_a_plain_module(folder: Path) -> None:
    found = subject("llama", folder)
    model = CachedModel.from_module(found.model, options=ONE_THREAD, max_length=30)
    assert model.max_length == 30
    ids = draw_ids(2, 9, 4)
    torch.testing.assert_close(model.prefill(ids), found.whole(ids)[:, -1], **TOLERANCE)


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


def test_a_model_of_vectors_has_no_tokens() -> None:
    class Vectors(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            heads = x[:, None]
            mixed: Tensor = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            return mixed[:, 0]

    inputs: Any = (torch.randn(2, 7, 8),)
    with pytest.raises(NotDecodable, match="holds no tokens"):
        CachedModel(capture(Vectors(), inputs, verify=False), options=ONE_THREAD)
