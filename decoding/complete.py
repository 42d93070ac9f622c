"""Complete a text: prompt in, text out as it comes, tokens per second at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import Tensor

from torchweld.decoding.cached import CachedModel, NotDecodable, generate_cached
from torchweld.decoding.greedy import DecodingError, LogitsModel, generate
from torchweld.models.errors import ModelFileError
from torchweld.models.load import LoadedModel
from torchweld.models.tokenizer import Tokenizer
from torchweld.optimizer.commands.baseline import decoded_model
from torchweld.optimizer.commands.subject import Subject, Wish, capture_subject, compile_subject, load_subject

_CHAT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Completion:
    """New tokens, their text, and wall-clock seconds for all of them (prompt included)."""

    tokens: tuple[int, ...]
    text: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


LONG_TEXT = 96
"""New tokens from which deriving and compiling a step pays against recomputing with a stored plan."""


def complete(
    spec: str, wish: Wish, prompt: str, tokens: int, *, eager: bool, chat: bool, cache: bool | None = None
) -> None:
    """Load MODEL, optimize it unless `eager`, and print its completion of `prompt` as it comes.

    cache: decode with the derived KV cache, or recompute every position; None lets the number of tokens decide.
    Where no cache can be derived, the reason goes to stderr and every position is recomputed.
    Raises ModelFileError for a model that is no language model or has no tokenizer.
    """
    subject = load_subject(spec, wish)
    tokenizer = language_tokenizer(subject.loaded, spec)
    model: LogitsModel | CachedModel | None = None
    if eager:
        model = logits_of(decoded_model(subject.loaded.module))
    elif cache or (cache is None and tokens >= LONG_TEXT):
        model = _cached_model(subject, wish)
    if model is None:
        model = logits_of(compile_subject(subject, wish))
    text = _CHAT.format(prompt=prompt) if chat else prompt
    done = complete_text(model, tokenizer, text, tokens, on_text=_writer(sys.stdout))
    how = "with the derived cache" if isinstance(model, CachedModel) else "by recomputation"
    print()
    print(f"{len(done.tokens)} tokens, {done.tokens_per_second:.1f} tokens/s {how}", file=sys.stderr)


def _cached_model(subject: Subject, wish: Wish) -> CachedModel | None:
    """The model with a derived cache; None, with the reason on stderr, where none can be derived."""
    try:
        return CachedModel(capture_subject(subject), options=wish.options())
    except NotDecodable as reason:
        print(f"{reason}; recomputing every position", file=sys.stderr)
        return None


def logits_of(model: Callable[[Tensor], object]) -> LogitsModel:
    """A model whose result is promised to be logits; DecodingError at the call that breaks the promise."""

    def call(ids: Tensor, /) -> Tensor:
        logits = model(ids)
        if not isinstance(logits, Tensor):
            raise DecodingError(f"the model returns a {type(logits).__name__}; expected a tensor of logits")
        return logits

    return call


def language_tokenizer(loaded: LoadedModel, spec: str) -> Tokenizer:
    """The tokenizer of a causal language model; ModelFileError if it has none or is of another kind."""
    if loaded.kind != "decoder":
        raise ModelFileError(
            spec, f"is a {loaded.architecture} {loaded.kind}", "a language model such as smollm2"
        )
    if loaded.tokenizer is None:
        raise ModelFileError(spec, "has no tokenizer", "tokenizer.json beside the weights, or a GGUF file")
    return loaded.tokenizer


def complete_text(
    model: LogitsModel | CachedModel,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    *,
    on_text: Callable[[str], None] | None = None,
    seconds: float = math.inf,
) -> Completion:
    """Greedy completion of `prompt` by at most `tokens` tokens; `on_text` gets each new piece of text.

    seconds: stop after the first token that comes later than this.

    Raises ModelFileError for a prompt without tokens.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ModelFileError("prompt", "has no tokens", "some text")
    start = time.perf_counter()
    new: list[int] = []
    text = ""
    for token in _stream(model, _row(ids), tokens, tokenizer.eos):
        new.append(token)
        longer = tokenizer.decode(new)
        # A character of several tokens decodes to U+FFFD until its last token is there.
        if on_text is not None and not longer.endswith("\ufffd"):
            on_text(longer[len(text) :])
            text = longer
        if time.perf_counter() - start > seconds:
            break
    return Completion(tuple(new), tokenizer.decode(new), time.perf_counter() - start)


def _stream(
    model: LogitsModel | CachedModel, ids: Tensor, tokens: int, eos: Collection[int]
) -> Iterator[int]:
    if isinstance(model, CachedModel):
        return generate_cached(model, ids, tokens, eos)
    return generate(model, ids, tokens, eos)


def _row(ids: list[int]) -> Tensor:
    return torch.tensor([ids], dtype=torch.int64)


def _writer(stream: TextIO) -> Callable[[str], None]:
    def write(piece: str) -> None:
        stream.write(piece)
        stream.flush()

    return write
