"""Tokens to text as they come: whole characters only, at a cost that does not grow with the text.

    stream = Detokenizer(tokenizer.decode)
    stream.push(120)      # ""   the first byte of a character
    stream.push(243)      # "é"  its last one
    stream.finish()       # what a text that ends inside a character still has to show

Decoding token by token is wrong: a character may take several tokens, and a tokenizer may drop the space in front
of a text but not the one in front of a word. So a few tokens before the new ones are decoded again with them, and
the difference is what is new. Source: the windowed decoding of vLLM and of Hugging Face's text streamer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

Decode = Callable[[Sequence[int]], str]
"""Token ids to text; special tokens are left out."""

_UNFINISHED: Final = "\ufffd"
# A character of UTF-8 has at most 4 bytes, so at most 4 tokens: far more than that are bytes that become no text.
_MOST_PENDING: Final = 16


class Detokenizer:
    """Text of a growing sequence of tokens. The pieces joined are the text of all tokens, wherever that is UTF-8."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain with `token`; empty inside a character and for special tokens."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith(_UNFINISHED) and len(self._pending) < _MOST_PENDING:
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """What was held back: a text may end inside a character."""
        text = self._new_text() if self._pending else ""
        self._shown, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._shown) if self._shown else ""
        return self._decode([*self._shown, *self._pending])[len(before) :]
