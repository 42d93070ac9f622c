"""End a text before a stop string, wherever the borders of its tokens lie.

    stream = TextStream(tokenizer.decode, stops=["\\n\\n", "User:"])
    stream.push(token)     # text that is certain not to belong to a stop string
    stream.stopped         # the stop string that was met, or None
    stream.finish()        # text held back as a possible beginning of one

A stop string is met with the token that completes it, and the text ends before its first character. Of several,
the one that is complete first counts, and of those the longest: so how the text is cut into tokens, and how many
tokens a speculative pass accepts, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from torchweld.decoding.detokenize import Decode, Detokenizer


class StopFinder:
    """Passes text on and holds back what may be the beginning of a stop string; empty strings are refused."""

    def __init__(self, stops: Iterable[str]) -> None:
        self.stops = tuple(stops)
        if "" in self.stops:
            raise ValueError("an empty stop string would end every text at once; expected some characters")
        self.stopped: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain with `text`; all of it before the stop string if one is met, nothing after."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        kept = self._longest_beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """The text held back, since no stop string came of it."""
        text, self._held = self._held, ""
        return text

    def _longest_beginning(self, text: str) -> int:
        """Characters at the end of `text` that begin a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[len(text) - n :]) for s in self.stops)), 0)


class TextStream:
    """Text of tokens as they come, up to a stop string. Joined, the pieces are the whole text."""

    def __init__(self, decode: Decode, stops: Iterable[str] = ()) -> None:
        self._tokens = Detokenizer(decode)
        self._finder = StopFinder(stops)

    @property
    def stopped(self) -> str | None:
        """The stop string that was met; no text comes after it."""
        return self._finder.stopped

    def push(self, token: int) -> str:
        """The text that is certain with `token`."""
        return self._finder.push(self._tokens.push(token))

    def finish(self) -> str:
        """The rest, where the text ended without a stop string (with one that the last bytes complete, up to it)."""
        text = self._finder.push(self._tokens.finish())
        return text if self.stopped is not None else text + self._finder.finish()
