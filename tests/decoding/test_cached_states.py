"""Convolutions, running values and scans in a step against the model without a cache; one row and many to the bit."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.decoding.state_models import LAYERS, WORDS, state_model
from torchweld.decoding.cached import CachedModel, CacheError, NotDecodable
from torchweld.graph.capture_causal import capture_causal
from torchweld.optimizer.commands.decode import explain_decoding
from torchweld.optimizer.compile import Options

KINDS = tuple(LAYERS)
LENGTH = 26
SPARE = 4
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
ONE_THREAD = Options(threads=1)


class Subject:
    """A model and its cached form; caches are started over by every test."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cached = CachedModel.from_module(model, options=ONE_THREAD, spare=SPARE)

    def whole(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(ids)
        return logits


@lru_cache
def subject(kind: str) -> Subject:
    found = Subject(state_model(kind))
    assert found.cached.compiled().eager_reason is None
    return found


def draw_ids(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(cuts=st.sets(st.integers(1, LENGTH - 1)), seed=st.integers(0, 99), batch=st.integers(1, 2))
def test_every_split_equals_no_cache(kind: str, cuts: set[int], seed: int, batch: int) -> None:
    """Several turns of the rings, which hold 2 to 11 rows and 4 to spare."""
    found = subject(kind)
    ids = draw_ids(batch, LENGTH, seed)
    expected = found.whole(ids)
    for start, end in pairwise([0, *sorted(cuts), LENGTH]):
        last = found.cached.step(ids[:, start:end]) if start else found.cached.prefill(ids[:, :end])[:, None]
        torch.testing.assert_close(last, expected[:, end - 1 : end], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(kept=st.integers(1, LENGTH - 1), junk=st.integers(1, SPARE), seed=st.integers(0, 99))
def test_tokens_rolled_back_leave_no_trace(kind: str, kept: int, junk: int, seed: int) -> None:
    found = subject(kind)
    ids = draw_ids(1, LENGTH, seed)
    found.cached.prefill(ids[:, :kept])
    found.cached.step(draw_ids(1, junk, seed + 1))
    assert found.cached.truncate(kept) == (junk,)
    torch.testing.assert_close(found.cached.step(ids[:, kept:]), found.whole(ids)[:, -1:], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=3),
    turns=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_sequences_of_different_lengths_equal_each_alone(
    kind: str, lengths: list[int], turns: list[list[int]], seed: int
) -> None:
    found = subject(kind)
    texts = draw_ids(len(lengths), 13 + 4 * len(turns), seed)
    expected = found.whole(texts)
    have = list(lengths)
    logits = found.cached.prefill([texts[b, :length].tolist() for b, length in enumerate(lengths)])
    for b, length in enumerate(have):
        torch.testing.assert_close(logits[b], expected[b, length - 1], **TOLERANCE)
    for turn in turns:
        counts = turn[: len(lengths)]
        ids = torch.full((len(lengths), max(*counts, 1)), -1)
        for b, count in enumerate(counts):
            ids[b, :count] = texts[b, have[b] : have[b] + count]
        logits = found.cached.step(ids, counts=counts)
        have = [length + count for length, count in zip(have, counts, strict=True)]
        for b, count in enumerate(counts):
            if count:
                torch.testing.assert_close(logits[b, 0], expected[b, have[b] - 1], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8])
def test_one_row_and_many_rows_give_the_same_bits(kind: str, rows: int) -> None:
    model = subject(kind).cached
    ids = draw_ids(1, 9 + rows, rows)
    model.prefill(ids[:, :9])
    singles = torch.cat([model.step(ids[:, at : at + 1]) for at in range(9, 9 + rows)], 1)
    model.prefill(ids[:, :9])
    assert torch.equal(model.step(ids[:, 9:], logits_for="all"), singles)
    assert torch.equal(model.prefill(ids), singles[:, -1])
    model.prefill(torch.cat([draw_ids(2, 9, 8), ids[:, :9]]))
    padded = torch.cat([draw_ids(2, rows, 9), ids[:, 9:]])
    found = model.step(padded, counts=[1, 0, rows], logits_for="all")[2:]
    assert torch.equal(found, singles), "neighbours of other lengths change nothing"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(
    past=st.integers(1, 14),
    parents=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    seed=st.integers(0, 99),
)
def test_every_row_of_a_tree_equals_its_path_fed_plainly(
    kind: str, past: int, parents: list[int], seed: int
) -> None:
    """To the bit; and the kept path continues as if nothing else had been there."""
    model = subject(kind).cached
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
    assert torch.equal(model.step(ids, parents=tree, logits_for="all"), torch.cat(plain, 1))
    model.keep(paths[-1])
    assert torch.equal(model.step(more, logits_for="all"), after)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_slots_are_not_read(kind: str) -> None:
    """What holds no position, or none that the next row reads, must not reach the logits."""
    found = subject(kind)
    ids = draw_ids(1, LENGTH, 6)
    found.cached.prefill(ids[:, : LENGTH - 2])
    cache = found.cached.cache
    tensors = iter(cache.tensors())
    for state in found.cached.states:
        for tensor in (next(tensors) for _ in state.features):
            capacity, visible = tensor.shape[2], state.window - 1 if state.window else LENGTH
            kept = {place % capacity for place in range(max(0, LENGTH - 2 - visible), LENGTH - 2)}
            junk = float("nan") if tensor.is_floating_point() else 40
            tensor[:, :, [slot for slot in range(capacity) if slot not in kept]] = junk
    torch.testing.assert_close(found.cached.step(ids[:, -2:]), found.whole(ids)[:, -1:], **TOLERANCE)


def test_caches_are_written_in_place_and_fork_is_independent() -> None:
    for kind in KINDS:
        found = subject(kind)
        ids = draw_ids(1, LENGTH, 7)
        found.cached.prefill(ids[:, :9])
        before = [tensor.data_ptr() for tensor in found.cached.cache.tensors()]
        branch = found.cached.cache.fork()
        found.cached.step(draw_ids(1, 1, 8))
        assert [tensor.data_ptr() for tensor in found.cached.cache.tensors()] == before
        found.cached.cache = branch
        torch.testing.assert_close(found.cached.step(ids[:, 9:]), found.whole(ids)[:, -1:], **TOLERANCE)


def test_a_ring_refuses_to_go_back_beyond_its_rows() -> None:
    model = subject("wide").cached
    model.prefill(draw_ids(1, LENGTH, 9))
    with pytest.raises(CacheError, match="a window of 5 reads positions from 15 on, and its ring of 9 slots"):
        model.truncate(LENGTH - 7)
    assert model.lengths == (LENGTH,)


def test_states_say_what_they_are() -> None:
    kinds = {
        name: [(state.kind, state.window, state.bytes_per_token) for state in subject(name).cached.states]
        for name in KINDS
    }
    assert kinds == {
        "short": [("convolution", 3, 48), ("causal", 0, 96), ("convolution", 2, 48)],
        "wide": [("convolution", 5, 48), ("convolution", 3, 48), ("convolution", 11, 48)],
        "mean": [("causal", 0, 96), ("cumulative sum", 2, 96), ("cumulative sum", 2, 8)],
        "running": [
            ("cumulative sum", 2, 96), ("cumulative log-sum-exp", 2, 96),
            ("cumulative maximum", 2, 48), ("cumulative maximum", 2, 96), ("cumulative minimum", 2, 48),
            ("cumulative minimum", 2, 8), ("cumulative minimum", 2, 8), ("cumulative minimum", 2, 1),
            ("cumulative sum", 2, 96), ("cumulative product", 2, 96), ("cumulative log-sum-exp", 2, 96),
        ],
        "scan": [
            ("scan", 2, 48), ("scan", 2, 48), ("scan", 2, 8), ("causal", 0, 96),
            ("associative scan", 2, 48), ("associative scan", 2, 48),
        ],
    }  # fmt: skip
    assert [state.dtype for state in subject("mean").cached.states[1:]] == [torch.float64, torch.int64]


def test_only_running_values_and_scans_run_eagerly_and_say_why() -> None:
    expected = {
        "mean": (2, "takes in one new row after the other"),
        "scan": (2, "torchweld.cached_scan: no rule"),
    }
    expected["running"] = (11, "takes in one new row after the other")
    for kind in KINDS:
        fallbacks = subject(kind).cached.compiled().report.fallbacks
        count, reason = expected.get(kind, (0, ""))
        assert len(fallbacks) == count, fallbacks
        assert all(reason in fallback.reason for fallback in fallbacks)


def test_explanation_shows_the_states() -> None:
    report = explain_decoding(capture_causal(state_model("short")), ONE_THREAD)
    assert report.kinds() == "3 layers: 1 convolution of 3, 1 causal, 1 convolution of 2"
    assert "a kernel of 3 behind 2 zeros" in report.to_markdown()
    assert report.cache_bytes(100) == 3 * 48 + 100 * 96 + 2 * 48


def test_all_results_of_what_looks_back_last_reach_the_logits() -> None:
    """The rows that get logits are chosen behind them, not behind the first of them."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.words, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

        def forward(self, ids: Tensor) -> Tensor:
            values, places = self.words(ids).cummax(1)
            logits: Tensor = self.head(values + places / 8)
            return logits

    found, ids = Subject(Last().eval()), draw_ids(2, LENGTH, 3)
    parts = [found.cached.prefill(ids[:, :5])[:, None], found.cached.step(ids[:, 5:], logits_for="all")]
    torch.testing.assert_close(torch.cat(parts, 1), found.whole(ids)[:, 4:], **TOLERANCE)


def test_the_carries_of_a_scan_belong_to_one_layer() -> None:
    report = explain_decoding(capture_causal(state_model("scan")), ONE_THREAD)
    assert report.kinds() == "3 layers: 1 scan, 1 causal, 1 associative scan"
    assert [layer.layer for layer in report.layers] == [0, 0, 0, 1, 2, 2]
    assert "carry 2 of 3 after the last row, in float32" in report.to_markdown()


def test_a_product_of_what_came_before_is_a_sum_of_logarithms() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.words, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.sigmoid(self.words(ids)).log().cumsum(1).exp())
            return logits

    found = Subject(Product().eval())
    ids = draw_ids(2, LENGTH, 3)
    parts = [found.cached.prefill(ids[:, :5])[:, None], found.cached.step(ids[:, 5:], logits_for="all")]
    torch.testing.assert_close(torch.cat(parts, 1), found.whole(ids)[:, 4:], **TOLERANCE)


def test_lfm2_of_hugging_face() -> None:
    """Its slow path: gated depthwise convolutions between attentions."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(2)
    config = Lfm2Config(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, conv_L_cache=3, layer_types=["conv", "full_attention"], use_cache=False,
    )  # fmt: skip
    model = Lfm2ForCausalLM(config).eval()
    cached = CachedModel.from_module(model, options=ONE_THREAD)
    assert [state.kind for state in cached.states] == ["convolution", "causal"]
    ids = draw_ids(2, LENGTH, 4)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    parts = [
        cached.prefill(ids[:, :7])[:, None],
        cached.step(ids[:, 7:8]),
        cached.step(ids[:, 8:], logits_for="all"),
    ]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 6:], **TOLERANCE)


@pytest.mark.parametrize(
    ("padding", "stride", "reason"),
    [
        (1, 1, "looks 1 position ahead"),
        (2, 2, "a convolution of stride 2"),
        (0, 1, "looks 2 positions ahead"),
    ],
)
def test_other_convolutions_are_refused_by_name(padding: int, stride: int, reason: str) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.conv = nn.Embedding(WORDS, 6), nn.Conv1d(6, WORDS, 3, stride, padding)

        def forward(self, ids: Tensor) -> Tensor:
            mixed: Tensor = self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2)
            return mixed

    with pytest.raises(NotDecodable, match=reason) as caught:
        CachedModel.from_module(Other().eval(), options=ONE_THREAD)
    assert caught.value.refusal.node is not None and "conv1d" in str(caught.value.refusal.node.target)
    assert "test_cached_states.py:" in str(caught.value)


def test_a_sum_from_the_end_is_refused() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids).flip(1).cumsum(1).flip(1) @ self.words.weight.T

    with pytest.raises(NotDecodable, match="flip of the sequence axis"):
        CachedModel.from_module(Backwards().eval(), options=ONE_THREAD)
