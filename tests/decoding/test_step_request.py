"""What a step may be asked for: the inputs it becomes, its chunks, and every refusal."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchweld.decoding.greedy import DecodingError
from torchweld.decoding.step_request import ancestors, check_prompts, read_request

IDS = torch.tensor([[5, 6, 7], [8, 9, -4]])


def test_inputs_of_rows_with_padding() -> None:
    request = read_request(IDS, [3, 2], None, "last", 10)
    ids, past, positions, rows = request.inputs((4, 0), None)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]], "padding may hold anything"
    assert past.tolist() == [4, 0]
    assert positions.tolist() == [[4, 5, 6], [0, 1, 1]]
    assert rows.tolist() == [2, 4], "rows are counted over the batch"


def test_positions_stay_below_the_limit() -> None:
    request = read_request(IDS, [3, 0], None, "all", 10)
    _, _, positions, rows = request.inputs((4, 7), 7)
    assert positions.tolist() == [[4, 5, 6], [6, 6, 6]]
    assert rows.tolist() == list(range(6))


@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=3),
    limit=st.one_of(st.none(), st.integers(1, 12)), wanted=st.sampled_from(["last", "all"]),
)  # fmt: skip
def test_positions_and_rows_of_any_sizes(
    pairs: list[tuple[int, int]], limit: int | None, wanted: Any
) -> None:
    """Rows that are padding stay on the position of the last real row, and all below the limit."""
    lengths, counts = zip(*pairs, strict=True)
    request = read_request(torch.ones(len(pairs), 4, dtype=torch.int64), counts, None, wanted, 10)
    _, past, positions, rows = request.inputs(lengths, limit)
    last = torch.tensor(lengths) + torch.tensor(counts) - 1
    expected = torch.minimum(torch.tensor(lengths)[:, None] + torch.arange(4), last.clamp(min=0)[:, None])
    assert torch.equal(positions, expected if limit is None else expected.clamp(max=limit - 1))
    assert past.tolist() == list(lengths)
    ends = [4 * number + max(count, 1) - 1 for number, count in enumerate(counts)]
    assert rows.tolist() == (ends if wanted == "last" else list(range(4 * len(pairs))))


def test_inputs_of_a_tree() -> None:
    request = read_request(torch.tensor([[1, 2, 3, 4]]), None, [-1, 0, 0, 1], [0, 3], 10)
    _, past, positions, rows, path = request.inputs((7,), None)
    assert (past.tolist(), positions.tolist(), rows.tolist()) == ([7], [[7, 8, 8, 9]], [0, 3])
    assert path.tolist() == [[[0, -1, -1, -1], [0, 1, -1, -1], [0, 2, -1, -1], [0, 1, 3, -1]]]


@given(parents=st.lists(st.integers(0, 8), min_size=1, max_size=9))
def test_ancestors(parents: list[int]) -> None:
    tree = [min(parent, row) - 1 for row, parent in enumerate(parents)]
    for row, path in enumerate(ancestors(tree).tolist()):
        expected = [row]
        while tree[expected[0]] >= 0:
            expected.insert(0, tree[expected[0]])
        assert path == expected + [-1] * (len(tree) - len(expected))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 11), size=st.integers(1, 5), counts=st.lists(st.integers(0, 11), min_size=2, max_size=2),
    wanted=st.one_of(st.sampled_from(["last", "all"]), st.lists(st.integers(0, 10), min_size=1, max_size=4)),
)  # fmt: skip
def test_chunks_give_what_the_whole_gives(rows: int, size: int, counts: list[int], wanted: Any) -> None:
    """Logits are stood for by the number of their row."""
    counts = [min(count, rows) for count in counts]
    chosen = wanted if isinstance(wanted, str) else [row % rows for row in wanted]
    ids = torch.arange(2 * rows).reshape(2, rows)
    request = read_request(ids, counts, None, chosen, 100)
    parts, fed = [], [0, 0]
    for number, part in enumerate(request.chunks(size)):
        assert part.rows <= size and part.ids.shape == part.wanted.new_empty(2, part.rows).shape
        parts.append((part.wanted + number * size)[:, :, None])
        fed = [have + count for have, count in zip(fed, part.counts, strict=True)]
    assert fed == counts
    assert torch.equal(request.gather(parts, size)[:, :, 0], request.wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS.int(), None, None, "last"), "torch.int32 (2, 3); expected int64"),
        ((IDS[0], None, None, "last"), "(3,); expected int64 [B, T]"),
        ((IDS[:, :0], None, None, "last"), "T >= 1"),
        ((IDS, [3], None, "last"), "counts [3] for ids (2, 3)"),
        ((IDS, [3, 4], None, "last"), "2 numbers of 0 to 3"),
        ((IDS, None, [-1, 0, 1], "last"), "a tree of rows is for one sequence"),
        ((IDS[:1], [2], [-1, 0, 1], "last"), "without padding"),
        ((IDS[:1], None, [-1, 0], "last"), "parents [-1, 0] for 3 rows"),
        ((IDS[:1], None, [-1, 1, 0], "last"), "each -1 or that of an earlier row"),
        ((IDS[:1], None, None, "first"), "logits_for='first'"),
        ((IDS[:1], None, None, [3]), "logits_for=[3]"),
        ((IDS[:1], None, None, []), "at least one number of 0 to 2"),
    ],
)
def test_mistakes_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DecodingError, match=re.escape(message)):
        read_request(*arguments, 10)


def test_tokens_out_of_range_are_named() -> None:
    with pytest.raises(
        IndexError, match=re.escape("token 9 (row 1 of sequence 1) is outside the model's table of 9")
    ):
        read_request(IDS, [3, 2], None, "last", 9)
    with pytest.raises(IndexError, match=re.escape("token -4 (row 2 of sequence 1)")):
        read_request(IDS, None, None, "last", 10)
    with pytest.raises(IndexError, match=re.escape("token 7 (row 0 of sequence 1)")):
        check_prompts([[1, 2], [7]], 7)


@pytest.mark.parametrize("prompts", [[], [[1], []], torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)])
def test_prompts_that_are_none_are_refused(prompts: Any) -> None:
    with pytest.raises(DecodingError, match="prompts"):
        check_prompts(prompts, 10)
