"""The text that ships is plain English, varied, and long enough for the models that we know."""

from __future__ import annotations

import importlib.util
import re

import pytest

from torchweld.models.builtin import BUILTINS
from torchweld.models.load import load_model
from torchweld.optimizer.sample_text import TOKENS, english_text


def test_prose() -> None:
    text = english_text()
    words = re.findall(r"[A-Za-z']+", text)
    assert len(words) > 1700
    assert text.isascii() and "  " not in text and text.endswith("\n")
    assert len(set(map(str.lower, words))) > 600
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) >= 30


@pytest.mark.parametrize("name", sorted(BUILTINS))
def test_is_long_enough(name: str) -> None:
    if importlib.util.find_spec(BUILTINS[name].package) is None:
        pytest.skip(f"{BUILTINS[name].package} is not installed")
    tokenizer = load_model(name).tokenizer
    assert tokenizer is not None
    assert len(tokenizer.encode(english_text())) >= TOKENS
