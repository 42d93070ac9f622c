"""Stop strings: met wherever tokens are cut, never shown, and nothing else is lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweld.decoding.stop_strings import StopFinder, TextStream


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: look at every beginning of the text, shortest first."""
    for end in range(len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


WORDS = st.text(alphabet="ab\n", max_size=12)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3)


@given(text=WORDS, stops=STOPS, cuts=st.lists(st.integers(0, 12), max_size=5))
def test_like_the_definition_however_it_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    finder = StopFinder(stops)
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    shown = "".join(finder.push(text[a:b]) for a, b in pairwise(borders))
    before, stop = expected(text, stops)
    assert finder.stopped == stop
    assert shown + ("" if stop else finder.finish()) == before


@given(text=WORDS, stops=STOPS)
def test_what_was_shown_is_never_taken_back(text: str, stops: list[str]) -> None:
    finder, before = StopFinder(stops), expected(text, stops)[0]
    shown = ""
    for character in text:
        shown += finder.push(character)
        assert before.startswith(shown)


def test_only_a_possible_beginning_is_held() -> None:
    finder = StopFinder(["User:"])
    assert [finder.push(piece) for piece in ("Hello ", "Us", "e it ", "U", "ser", ":", "x")] == [
        "Hello ",
        "",
        "Use it ",
        "",
        "",
        "",
        "",
    ]
    assert finder.stopped == "User:"


def test_without_stops_all_passes() -> None:
    finder = StopFinder(())
    assert finder.push("anything") == "anything" and finder.finish() == "" and finder.stopped is None


def test_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty stop string"):
        StopFinder(["x", ""])


def test_stream_over_tokens() -> None:
    letters = TextStream(lambda ids: "".join(map(chr, ids)), ["END"])
    shown = [letters.push(ord(letter)) for letter in "an EN END or"]
    assert "".join(shown) == "an EN " and letters.stopped == "END" and letters.finish() == ""


def test_stream_gives_back_what_it_held() -> None:
    letters = TextStream(lambda ids: "".join(map(chr, ids)), ["END"])
    assert "".join(letters.push(ord(letter)) for letter in "the EN") == "the "
    assert letters.finish() == "EN" and letters.stopped is None


def test_a_stop_that_only_the_last_bytes_complete() -> None:
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"), ["\ufffd"])
    assert stream.push(97) == "a" and stream.push(0xC3) == ""
    assert stream.finish() == "" and stream.stopped == "\ufffd"
