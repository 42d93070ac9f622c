"""One index of n-grams over reference texts, the prompt and what was generated: what followed this text before?

    index = NGramIndex(references=[[5, 6, 7, 8]])
    index.follow([1, 2, 5, 6])       # the text so far; what it has in common with the last call is kept
    index.propose(4)                 # [7, 8]: what followed "5, 6"

Longest match first: the occurrences whose last tokens agree with the end of the text over the most tokens are taken,
and vote on the next token. Those that agree with the winner stay and vote on the token after it, until the
vote is too thin (`Abstain`), the occurrences end, or the budget is spent.

Source: prompt lookup (transformers `PromptLookupCandidateGenerator`), inference with reference (LLMA, Yang et al.,
2023), and the thresholds of llama.cpp's n-gram cache, which keep it from slowing text where nothing repeats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

BORDER = -1
"""Stands between texts, so that no n-gram reaches from one into the next; tokens are not negative."""


@dataclass(frozen=True)
class Abstain:
    """When a vote on the next token is too thin to be drafted.

    samples[m - 1], shares[m - 1]: occurrences at least, and the winner's share of them at least, where m tokens
    agree; the last entries hold for all longer agreements.
    """

    samples: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples or not self.shares:
            raise ValueError("an Abstain rule needs one threshold at least for samples and for shares")

    def allows(self, agreeing: int, votes: int, total: int) -> bool:
        """May a token with `votes` of `total` occurrences be drafted where `agreeing` tokens agree?"""
        samples = self.samples[min(agreeing, len(self.samples)) - 1]
        share = self.shares[min(agreeing, len(self.shares)) - 1]
        return total >= samples and votes >= share * total


LAX = Abstain(samples=(2, 2, 1, 1), shares=(0.66, 0.5, 0.5, 0.5))
"""llama.cpp's thresholds for n-grams of the text itself."""
STRICT = Abstain(samples=(4, 3, 2, 2), shares=(0.75, 0.66, 0.66, 0.66))
"""llama.cpp's thresholds for n-grams of other texts."""
EAGER = Abstain(samples=(1,), shares=(0.0,))
"""Never abstain: what Hugging Face's prompt lookup and LLMA do."""


class NGramIndex:
    """Occurrences of all n-grams, `shortest` <= n <= `longest`, of some reference texts and of a text that grows.

    deepest: a match counts up to this many tokens (beyond `longest` by comparison). recent: at most this many
    occurrences vote, the latest ones, which bounds the work where one n-gram fills the text. Appending a token
    costs longest - shortest + 1 dictionary entries. Raises ValueError for sizes that make no sense and for
    negative tokens.
    """

    def __init__(
        self,
        references: Sequence[Sequence[int]] = (),
        *,
        shortest: int = 1,
        longest: int = 4,
        deepest: int = 32,
        recent: int = 64,
    ) -> None:
        if not 1 <= shortest <= longest <= deepest or recent < 1:
            sizes = f"shortest={shortest}, longest={longest}, deepest={deepest}, recent={recent}"
            raise ValueError(f"{sizes}; expected 1 <= shortest <= longest <= deepest and recent >= 1")
        self.shortest, self.longest, self.deepest, self.recent = shortest, longest, deepest, recent
        self._tokens: list[int] = []
        self._places: dict[
            tuple[int, ...], list[int]
        ] = {}  # n-gram -> places of the tokens behind it, ascending
        self._start = 0  # of the text that is being appended
        for reference in references:
            self._extend(reference)
            self._tokens.append(BORDER)
            self._start = len(self._tokens)

    @property
    def text(self) -> list[int]:
        """The text so far, without the references."""
        return self._tokens[self._start :]

    def follow(self, text: Sequence[int]) -> None:
        """Let the text so far be `text`: what it shares with the one before stays, the rest is exchanged."""
        known = len(self._tokens) - self._start
        wanted = list(text)
        if self._tokens[self._start :] != wanted[:known]:
            known = _common(self._tokens, self._start, wanted)
            self._truncate(self._start + known)
        self._extend(wanted[known:])

    def propose(self, budget: int, abstain: Abstain = LAX) -> list[int]:
        """At most `budget` tokens that may come next; empty where nothing matches or the vote is too thin.

        Of equal votes the token of the latest occurrence wins.
        """
        places, agreeing = self._match()
        drafted: list[int] = []
        while places and len(drafted) < budget:
            following = {place: self._read(place, drafted) for place in reversed(places)}
            token, votes = Counter(following.values()).most_common(1)[0]
            if not abstain.allows(agreeing, votes, len(places)):
                break
            drafted.append(token)
            agreeing += 1
            stay = [place + 1 for place in places if following[place] == token]
            places = [place for place in stay if self._read(place, drafted) != BORDER]
        return drafted

    def _read(self, place: int, drafted: Sequence[int]) -> int:
        """The token there; behind the end of the text the draft goes on, so that a period repeats without end."""
        behind = place - len(self._tokens)
        return drafted[behind] if behind >= 0 else self._tokens[place]

    def _match(self) -> tuple[list[int], int]:
        """Places behind the longest match with the end of the text, ascending, and the length of that match."""
        length = len(self._tokens) - self._start
        for n in range(min(self.longest, length), self.shortest - 1, -1):
            found = self._places.get(tuple(self._tokens[-n:]))
            if found:
                return self._deepen(found[-self.recent :], n)
        return [], 0

    def _deepen(self, places: list[int], agreeing: int) -> tuple[list[int], int]:
        """Of these places those that agree furthest back; only an n-gram of full length can agree further."""
        limit = min(self.deepest, len(self._tokens) - self._start)
        while agreeing >= self.longest and agreeing < limit:
            wanted = self._tokens[-agreeing - 1]
            further = [p for p in places if p > agreeing and self._tokens[p - agreeing - 1] == wanted]
            if not further:
                break
            places, agreeing = further, agreeing + 1
        return places, agreeing

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if token < 0:
                raise ValueError(f"token {token} at {len(self._tokens) - self._start}: expected 0 or more")
            end = len(self._tokens)
            for key in self._keys(end):
                self._places.setdefault(key, []).append(end)
            self._tokens.append(token)

    def _truncate(self, length: int) -> None:
        """Take tokens off the end; their places are the last ones of their n-grams."""
        while len(self._tokens) > length:
            self._tokens.pop()
            for key in self._keys(len(self._tokens)):
                places = self._places[key]
                places.pop()
                if not places:
                    del self._places[key]

    def _keys(self, end: int) -> list[tuple[int, ...]]:
        """The n-grams of the present text that end right before `end`."""
        longest = min(self.longest, end - self._start)
        return [tuple(self._tokens[end - n : end]) for n in range(self.shortest, longest + 1)]


def _common(tokens: list[int], start: int, wanted: list[int]) -> int:
    """How many tokens from `start` on agree with `wanted`."""
    for number, (mine, given) in enumerate(zip(tokens[start:], wanted, strict=False)):
        if mine != given:
            return number
    return min(len(tokens) - start, len(wanted))
