"""The same inputs for every system: drawn once, from a seed that belongs to the workload.

Tokens are drawn from the middle of the vocabulary, where no special tokens are. What a token is does not change how
long it takes (nothing here is sparse), so one prompt stands for all; a system that remembers prompts needs fresh ones
and draws them with other seeds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

_VOCABULARY: Final = range(1_000, 28_000)
ANSWER_TOKENS: Final = 24
"""Tokens of the prompt, and of each sentence, by which systems are compared."""
ANSWER_NUMBERS: Final = 512
"""At most so many of a result are compared: the first logits or features."""

LEAST_SECONDS: Final = 0.25
"""Of one sample of an encoder, whose calls are short."""


def tokens(count: int, seed: int = 0) -> list[int]:
    """`count` tokens, always the same for one seed."""
    draw = random.Random(seed * 1_000_003 + count)
    return [draw.choice(_VOCABULARY) for _ in range(count)]


def sentences(batch: int, length: int) -> list[list[int]]:
    """`batch` different sentences of `length` tokens."""
    return [tokens(length, seed) for seed in range(batch)]


def answer_prompt() -> list[int]:
    """The prompt whose last logits every language model is asked for."""
    return tokens(ANSWER_TOKENS)


def answer_sentences() -> list[list[int]]:
    """The sentences whose first vector every encoder is asked for."""
    return sentences(2, ANSWER_TOKENS)


def agreement(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The cosine of two answers; None where their lengths differ or one of them is zero."""
    if len(one) != len(other):
        return None
    product = sum(a * b for a, b in zip(one, other, strict=True))
    length = (sum(a * a for a in one) * sum(b * b for b in other)) ** 0.5
    return product / length if length else None
