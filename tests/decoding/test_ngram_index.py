"""The n-gram index against a search through all places of all texts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweld.decoding.ngram_index import EAGER, LAX, STRICT, Abstain, NGramIndex

tokens = st.lists(st.integers(0, 3), max_size=30)
references = st.lists(tokens, max_size=3)


def agreement(source: list[int], place: int, text: list[int], deepest: int) -> int:
    """How many tokens before `place` in `source` agree with the end of `text`."""
    count = 0
    while count < min(place, len(text), deepest) and source[place - count - 1] == text[-count - 1]:
        count += 1
    return count


def search(
    index: NGramIndex, texts: list[list[int]], text: list[int], budget: int, abstain: Abstain
) -> list[int]:
    """What the index must propose, by looking at every place of every text."""
    spots = [(source, place) for source in [*texts, text] for place in range(1, len(source))]
    depths = [agreement(source, place, text, index.deepest) for source, place in spots]
    best = max(depths, default=0)
    if best < index.shortest:
        return []
    # The window of recent occurrences is taken where the n-gram of the table is found, before a match deepens.
    table = min(best, index.longest)
    near = [(spot, depth) for spot, depth in zip(spots, depths, strict=True) if depth >= table]
    voters = [spot for spot, depth in near[-index.recent :]]
    deepest = max(depth for _, depth in near[-index.recent :])
    voters = [spot for spot, depth in near[-index.recent :] if depth == deepest]
    drafted: list[int] = []
    while len(drafted) < budget:
        follows = []
        for source, place in voters:
            extended = source + drafted if source is text else source
            if place + len(drafted) < len(extended):
                follows.append(((source, place), extended[place + len(drafted)]))
        counts = Counter(token for _, token in reversed(follows))
        if not counts:
            break
        token, count = counts.most_common(1)[0]
        if not abstain.allows(deepest + len(drafted), count, len(follows)):
            break
        voters = [spot for spot, follower in follows if follower == token]
        drafted.append(token)
    return drafted


@given(references, tokens, st.integers(0, 8), st.sampled_from([LAX, STRICT, EAGER]), st.data())
def test_proposals_are_those_of_a_search(
    texts: list[list[int]], text: list[int], budget: int, abstain: Abstain, data: st.DataObject
) -> None:
    shortest = data.draw(st.integers(1, 3))
    longest = data.draw(st.integers(shortest, 5))
    index = NGramIndex(
        texts,
        shortest=shortest,
        longest=longest,
        deepest=data.draw(st.integers(longest, 9)),
        recent=data.draw(st.integers(1, 5)),
    )
    index.follow(text)
    assert index.propose(budget, abstain) == search(index, texts, text, budget, abstain)


@given(references, st.lists(tokens, min_size=1, max_size=5))
def test_a_changed_text_leaves_no_trace(texts: list[list[int]], versions: list[list[int]]) -> None:
    index = NGramIndex(texts)
    for version in versions:
        index.follow(version)
    fresh = NGramIndex(texts)
    fresh.follow(versions[-1])
    assert index.text == versions[-1]
    assert index._places == fresh._places and index._tokens == fresh._tokens


def test_the_longest_match_wins_over_a_more_frequent_one() -> None:
    index = NGramIndex()
    index.follow([1, 2, 3, 9, 2, 3, 7, 2, 3, 7, 1, 2, 3])
    assert index.propose(1, EAGER) == [9]


def test_a_period_repeats_beyond_the_end_of_the_text() -> None:
    index = NGramIndex()
    index.follow([4, 5, 6, 4, 5, 6, 4])
    assert index.propose(7) == [5, 6, 4, 5, 6, 4, 5]


def test_a_reference_is_copied_to_its_end_and_not_beyond() -> None:
    index = NGramIndex([[5, 6, 7, 8], [1, 1]])
    index.follow([3, 5, 6])
    assert index.propose(9, EAGER) == [7, 8]


def test_thin_votes_abstain() -> None:
    index = NGramIndex()
    index.follow([1, 2, 1, 3, 1])  # "1" was followed by 2 and by 3
    assert index.propose(3, LAX) == []
    assert index.propose(1, EAGER) == [3]
    index.follow([1, 2, 9, 1])  # "1" was seen once: LAX wants two samples of one agreeing token
    assert index.propose(3, LAX) == []
    assert index.propose(2, EAGER) == [2, 9]


def test_nothing_comes_from_nothing() -> None:
    index = NGramIndex()
    assert index.propose(4, EAGER) == []
    index.follow([1])
    assert index.propose(4, EAGER) == []
    index.follow([1, 1])
    assert index.propose(0, EAGER) == []


def test_sizes_and_tokens_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="1 <= shortest <= longest"):
        NGramIndex(shortest=3, longest=2)
    with pytest.raises(ValueError, match="recent >= 1"):
        NGramIndex(recent=0)
    with pytest.raises(ValueError, match="token -1 at 1"):
        NGramIndex().follow([0, -1])
    with pytest.raises(ValueError, match="one threshold"):
        Abstain((), (0.5,))
