"""Tokenizers from GGUF vocabularies and tokenizer.json: known ids, round trips, bad vocabularies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchweld.models.builtin import find_builtin
from torchweld.models.errors import ModelFileError
from torchweld.models.gguf import GgufFile, Value, read_gguf
from torchweld.models.safetensors import read_config
from torchweld.models.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf


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
@given(text=st.text(st.characters(max_codepoint=0xD7FF, exclude_categories=("Cc",)), max_size=40))
def test_byte_level_round_trip(text: str, smollm2: Tokenizer) -> None:
    # no control characters, no higher planes: some of their bytes have no token in this vocabulary
    assert smollm2.decode(smollm2.encode(text)) == text


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
