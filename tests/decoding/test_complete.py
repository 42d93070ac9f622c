"""Text in, text out: what is streamed, what is returned, and which models are refused."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn

from torchweld.decoding.complete import complete_text, language_tokenizer
from torchweld.models.errors import ModelFileError
from torchweld.models.load import LoadedModel
from torchweld.models.tokenizer import Tokenizer

WORDS = ("zero", "one", "two", "three", "four", "end")


def word_tokenizer() -> Tokenizer:
    def build() -> Core:
        core = Core(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="zero"))
        core.pre_tokenizer = WhitespaceSplit()
        return core

    return Tokenizer(Path("words"), build, None, (5,))


def byte_tokenizer() -> Tokenizer:
    """One token per byte of "é", as byte-level vocabularies have them."""

    def build() -> Core:
        core = Core(WordLevel({"Ã": 0, "©": 1, "x": 2}, unk_token="x"))
        core.decoder = decoders.ByteLevel()
        return core

    return Tokenizer(Path("bytes"), build, None, ())


def successor(ids: Tensor) -> Tensor:
    return torch.nn.functional.one_hot((ids + 1) % len(WORDS), len(WORDS)).float()


def test_completion_and_stream_agree() -> None:
    pieces: list[str] = []
    done = complete_text(successor, word_tokenizer(), "zero one", 10, on_text=pieces.append)
    assert done.tokens == (2, 3, 4)
    assert done.text == "two three four" == "".join(pieces)
    assert len(pieces) == 3
    assert done.tokens_per_second == pytest.approx(3 / done.seconds)


def test_length_limit() -> None:
    assert complete_text(successor, word_tokenizer(), "zero", 2).tokens == (1, 2)


def test_time_limit_still_gives_one_token() -> None:
    assert complete_text(successor, word_tokenizer(), "zero", 4, seconds=0.0).tokens == (1,)


def test_half_a_character_is_not_shown() -> None:
    pieces: list[str] = []
    model = {1: 0, 2: 1, 3: 2}  # length so far -> next token

    def spell(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full_like(ids, model[ids.shape[1]]), 3).float()

    done = complete_text(spell, byte_tokenizer(), "x", 3, on_text=pieces.append)
    assert pieces == ["é", "x"]
    assert done.text == "éx"


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ModelFileError, match="prompt: has no tokens"):
        complete_text(successor, word_tokenizer(), "  ", 2)


def test_only_language_models_complete() -> None:
    encoder = LoadedModel(nn.Identity(), word_tokenizer(), (), "m", "bert", Path("m"), "encoder")
    with pytest.raises(ModelFileError, match="is a bert encoder; expected a language model"):
        language_tokenizer(encoder, "m")
    mute = LoadedModel(nn.Identity(), None, (), "m", "llama", Path("m"), "decoder")
    with pytest.raises(ModelFileError, match="has no tokenizer"):
        language_tokenizer(mute, "m")
