"""One generation: the pieces of a text as they come, and what they were in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torchweld.decoding.request import Finish, Given
from torchweld.decoding.statistics import PassLog, Statistics
from torchweld.decoding.stop_strings import TextStream


class Codec(Protocol):
    """Text to tokens and back: what of a tokenizer is needed here."""

    @property
    def eos(self) -> Sequence[int]:
        """Tokens that end a text."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""


@dataclass(frozen=True)
class Piece:
    """One new token, the text that is certain with it ("" without a tokenizer), and why it is the last, if it is."""

    token: int
    text: str
    logprob: float | None
    finish: Finish | None


@dataclass(frozen=True)
class Generation:
    """What was generated.

    tokens: the new ones, an end token included. text: theirs, up to a stop string; None without a tokenizer. logprobs:
    per token, natural log of the model's own probability before any warp; None if not asked for. finish: why it ended,
    None where it was broken off. statistics: of the whole batch, where there is one.
    """

    tokens: tuple[int, ...]
    text: str | None
    logprobs: tuple[float, ...] | None
    finish: Finish | None
    stop_string: str | None
    statistics: Statistics


class TextSoFar:
    """One text as its tokens come: `push` tells whether a stop string is met, `note` makes the piece."""

    def __init__(self, codec: Codec | None, stops: Sequence[str], logprobs: bool) -> None:
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._text = None if codec is None else TextStream(codec.decode, stops)
        self._logprobs: list[float] | None = [] if logprobs else None
        self._pieces: list[str] = []

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met."""
        return None if self._text is None else self._text.stopped

    def push(self, token: int) -> bool:
        """Read the next token; `note` comes next. True where it completes a stop string."""
        self._pieces.append("" if self._text is None else self._text.push(token))
        return self.stop_string is not None

    def note(self, given: Given) -> Piece:
        """The piece of the token that was pushed last."""
        self.tokens.append(given.token)
        if self._logprobs is not None and given.logprob is not None:
            self._logprobs.append(given.logprob)
        if self._text is not None and given.finish is not None and self.stop_string is None:
            self._pieces[-1] += self._text.finish()
        self.finish = given.finish if self.stop_string is None else "stop"
        return Piece(given.token, self._pieces[-1], given.logprob, self.finish)

    def generation(self, statistics: Statistics) -> Generation:
        """What came so far."""
        return Generation(
            tokens=tuple(self.tokens),
            text=None if self._text is None else "".join(self._pieces),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            finish=self.finish,
            stop_string=self.stop_string,
            statistics=statistics,
        )


class Stream(Iterator[Piece]):
    """Pieces of one text as they come. `generation()` is what came so far, at any time; `close()` ends it early.

    However it ends, the model has cached the prompt and the tokens given out but the last.
    """

    def __init__(self, given: Iterator[Given], log: PassLog, text: TextSoFar) -> None:
        self._given, self._log, self._text = given, log, text

    def __next__(self) -> Piece:
        if self._text.finish is not None:
            raise StopIteration
        given = next(self._given)
        self._text.push(given.token)
        piece = self._text.note(given)
        if piece.finish is not None:
            self.close()
        return piece

    def close(self) -> None:
        """End the text here."""
        close = getattr(self._given, "close", None)
        if close is not None:
            close()

    def generation(self) -> Generation:
        """What came so far."""
        return self._text.generation(self._log.freeze(len(self._text.tokens)))
