"""What a decoding loop is asked for and what it gives out, for every strategy alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torchweld.decoding.step_model import DecodingError, StepModel
from torchweld.decoding.warp import Warp

Finish: TypeAlias = Literal["length", "eos", "limit", "stop"]
"""Why a text ended: `max_new_tokens` reached, an end token given, the model's `max_length` reached, a stop string."""


@dataclass(frozen=True)
class Request:
    """prompt: tokens, at least one. max_new_tokens: at most so many, at least one. eos: tokens after which a text ends.

    logprobs: give every token's natural-log probability too (the model's own, before any warp).
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    eos: frozenset[int] = frozenset()
    warp: Warp = field(default_factory=Warp)
    logprobs: bool = False


@dataclass(frozen=True)
class Given:
    """One new token of sequence `sequence`; `finish` says why it is the last, where it is."""

    token: int
    logprob: float | None = None
    finish: Finish | None = None
    sequence: int = 0


def check_request(request: Request, model: StepModel, name: str = "the prompt") -> None:
    """DecodingError for a prompt that is empty, out of the vocabulary or too long, and for nothing asked."""
    if not request.prompt:
        raise DecodingError(
            f"{name} has no tokens; give at least one (the model's start token, if it has one)"
        )
    for place, token in enumerate(request.prompt):
        if not 0 <= token < model.vocab_size:
            raise DecodingError(
                f"token {place} of {name} is {token}; expected 0 to {model.vocab_size - 1} (another tokenizer?)"
            )
    limit = model.max_length
    if limit is not None and len(request.prompt) > limit:
        raise DecodingError(
            f"{name} has {len(request.prompt)} tokens, more than the limit of {limit}: shorten it, "
            "or make the model with a larger max_length if its position table allows it"
        )
    if request.max_new_tokens < 1:
        raise DecodingError(f"max_new_tokens is {request.max_new_tokens}; expected at least 1")


def finish_of(token: int, length: int, request: Request, limit: int | None) -> Finish | None:
    """Why a text of `length` tokens, prompt included, ends with `token`; None if it goes on."""
    if token in request.eos:
        return "eos"
    if length - len(request.prompt) >= request.max_new_tokens:
        return "length"
    # The last token is not cached yet; the next pass would put it at position length - 1.
    return "limit" if limit is not None and length > limit else None


def roll_back(model: StepModel, lengths: Sequence[int]) -> None:
    """Forget what is cached beyond `lengths`, per sequence; nothing where there is no more than that."""
    if any(have > wish for have, wish in zip(model.lengths, lengths, strict=True)):
        model.truncate([min(have, wish) for have, wish in zip(model.lengths, lengths, strict=True)])
