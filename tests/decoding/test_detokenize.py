"""Streaming text: whole characters, the same text as decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchweld.decoding.detokenize import Detokenizer
from torchweld.models.builtin import find_builtin
from torchweld.models.gguf import read_gguf
from torchweld.models.tokenizer import Tokenizer
from torchweld.models.tokenizer_gguf import tokenizer_from_gguf


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = tokenizer_from_gguf(read_gguf(find_builtin(request.param)))
    assert found is not None
    return found


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    return [detokenizer.push(token) for token in ids] + [detokenizer.finish()]


@settings(max_examples=150)
@given(text=st.text(max_size=30))
def test_pieces_join_to_the_text(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    pieces = stream(tokenizer, ids)
    if "\ufffd" in whole:  # this vocabulary lacks some bytes
        assert "\ufffd" in "".join(pieces)
    else:
        assert "".join(pieces) == whole


@settings(max_examples=150)
@given(data=st.data())
def test_any_tokens_at_all(data: st.DataObject, tokenizer: Tokenizer) -> None:
    # a model is free to give bytes that are no text
    special = st.sampled_from([0, 1, 2, 5, 107, 238, 300, 400, 450, 493])
    size = tokenizer.core.get_vocab_size()
    ids = data.draw(st.lists(special | st.integers(0, size - 1), max_size=25))
    whole, joined = tokenizer.decode(ids), "".join(stream(tokenizer, ids))
    if "\ufffd" in whole:
        # bytes that are no text: `tokenizers` may turn the text before them into signs as well
        assert "\ufffd" in joined
    else:
        assert joined == whole


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    text = "\U00012345 ok"  # a cuneiform sign, in neither vocabulary
    ids = tokenizer.encode(text)
    ids = ids[ids[0] == tokenizer.bos :]
    pieces = stream(tokenizer, ids)
    assert pieces[:3] == ["", "", ""] and pieces[3] == "\U00012345"


def test_a_text_that_ends_inside_a_character_says_so(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\U00012345")[:-1]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces[:-1]) == "a" and set(pieces[-1]) == {"\ufffd"}
    assert "".join(pieces) == tokenizer.decode(ids)


def test_bytes_that_never_become_text_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    byte = tokenizer.encode("\U00012345")[-1]
    detokenizer = Detokenizer(tokenizer.decode)
    assert any(detokenizer.push(byte) for _ in range(20))


def test_the_cost_does_not_grow() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join(map(chr, ids))

    detokenizer = Detokenizer(decode)  # type: ignore[arg-type]
    assert "".join(detokenizer.push(97 + n % 26) for n in range(500)) == "".join(
        chr(97 + n % 26) for n in range(500)
    )
    assert longest <= 4
