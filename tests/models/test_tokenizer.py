"""Tokenizers from GGUF vocabularies and tokenizer.json: known ids, round trips, bad vocabularies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchweld.models.builtin import find_builtin
from torchweld.models.errors import ModelFileError
from torchweld.models.gguf import GgufFile, Value, read_gguf
from torchweld.models.safetensors import read_config
from torchweld.models.tokenizer import ChatTemplate, TextError, Tokenizer, tokenizer_from_folder
from torchweld.models.tokenizer_gguf import tokenizer_from_gguf


@pytest.fixture(scope="module")
def smollm2_file() -> GgufFile:
    return read_gguf(find_builtin("smollm2"))


@pytest.fixture(scope="module")
def smollm2(smollm2_file: GgufFile) -> Tokenizer:
    tokenizer = tokenizer_from_gguf(smollm2_file)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def gemma3() -> Tokenizer:
    tokenizer = tokenizer_from_gguf(read_gguf(find_builtin("gemma3")))
    assert tokenizer is not None
    return tokenizer


TEXTS = ["Hello world", "  two  spaces ", "line\n\nline\t.", "don't 2024 café 日本語 🦖", "x" * 50, ""]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str, smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text
    assert gemma3.decode(gemma3.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(
        st.characters(max_codepoint=0xD7FF, exclude_categories=("Cc",), exclude_characters="<"), max_size=40
    )
)
def test_byte_level_round_trip(text: str, smollm2: Tokenizer) -> None:
    # no control characters, no higher planes: some of their bytes have no token in this vocabulary;
    # no special tokens, which begin with <
    assert smollm2.decode(smollm2.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=40))
def test_sentence_piece_round_trip(text: str, gemma3: Tokenizer) -> None:
    # every character has a token or bytes; only SentencePiece's own sign for a space does not come back
    assert gemma3.decode(gemma3.encode(text)) == text.replace("▁", " ")


def test_half_a_surrogate_pair_is_no_text(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    for tokenizer in (smollm2, gemma3):
        with pytest.raises(TextError, match=r"'\\udcff' at character 2 is half a surrogate pair"):
            tokenizer.encode("ab\udcff")


def test_vocabulary_and_special_texts(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    assert len(smollm2.get_vocab()) == 49152 and len(gemma3.get_vocab()) == 262144
    assert (smollm2.get_vocab()["<|im_end|>"], gemma3.get_vocab()["<end_of_turn>"]) == (2, 106)
    assert isinstance(smollm2.chat, ChatTemplate) and smollm2.chat.bos_token == "<|im_start|>"
    assert gemma3.chat is None


@pytest.mark.parametrize(
    ("pre", "flag", "expected"),
    [("smollm", None, None), ("llama-bpe", None, 1), ("llama-bpe", False, None), ("smollm", True, 1)],
)
def test_who_begins_with_the_start_token(
    pre: str, flag: bool | None, expected: int | None, smollm2_file: GgufFile
) -> None:
    metadata = dict(changed(smollm2_file, pre=pre).metadata)
    del metadata["tokenizer.ggml.add_bos_token"]
    if flag is not None:
        metadata["tokenizer.ggml.add_bos_token"] = flag
    file = GgufFile(
        smollm2_file.path, smollm2_file.version, metadata, smollm2_file.tensors, smollm2_file._map
    )
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer is not None and tokenizer.bos == expected
    assert (tokenizer.encode("Hello")[0] == 1) is (expected == 1)


def test_whole_words_first(smollm2_file: GgufFile) -> None:
    # llama-bpe takes a word that is a token as it is, even if no merge makes it
    file = changed(smollm2_file, pre="llama-bpe", add_bos_token=False, merges=("t h",))
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer is not None and len(tokenizer.encode("Hello")) == 1
    plain = tokenizer_from_gguf(changed(smollm2_file, merges=("t h",)))
    assert plain is not None and len(plain.encode("Hello")) == 5


def test_smollm2_ids(smollm2: Tokenizer) -> None:
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    turn = smollm2.encode("<|im_start|>user\n12<|im_end|>")
    assert (turn[0], turn[-1]) == (1, 2) and len(turn) == 6  # digits are tokens of their own
    assert smollm2.eos == (0, 2)
    assert smollm2.bos is None


def test_gemma3_ids(gemma3: Tokenizer) -> None:
    assert gemma3.encode("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    assert gemma3.encode("\n\n") == [2, 108]
    assert gemma3.encode("<bos>The") == [2, 818]  # not twice
    assert gemma3.encode("\x07")[1:] == [238 + 7]  # a character without a token becomes bytes
    assert gemma3.eos == (1, 106)


def test_minilm_text_is_not_padded() -> None:
    folder = find_builtin("minilm")
    tokenizer = tokenizer_from_folder(folder, read_config(folder))
    assert tokenizer is not None
    assert tokenizer.encode("A man is eating food.") == [101, 1037, 2158, 2003, 5983, 2833, 1012, 102]


def changed(file: GgufFile, **values: Value) -> GgufFile:
    metadata = dict(file.metadata) | {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return GgufFile(file.path, file.version, metadata, file.tensors, file._map)


def test_bad_vocabularies(smollm2_file: GgufFile) -> None:
    with pytest.raises(ModelFileError, match=r"unknown tokenizer.ggml.model 'wordy'; expected one of gpt2"):
        tokenizer_from_gguf(changed(smollm2_file, model="wordy"))
    with pytest.raises(ModelFileError, match="eos_token_id"):
        tokenizer_from_gguf(changed(smollm2_file, eos_token_id=10**6))
    lazy: list[tuple[dict[str, Value], str]] = [
        ({"pre": "other"}, "unknown tokenizer.ggml.pre 'other'"),
        ({"merges": ("ab",)}, "merge 'ab'"),
        ({"merges": ("zq qz",)}, "the vocabulary makes no tokenizer"),
        ({"merges": 5}, "an array of strings"),
    ]
    for values, words in lazy:
        tokenizer = tokenizer_from_gguf(changed(smollm2_file, **values))
        assert tokenizer is not None
        with pytest.raises(ModelFileError, match=words):
            tokenizer.encode("x")
