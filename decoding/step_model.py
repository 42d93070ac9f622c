"""What the decoding loops ask of a model and of a source of guesses.

A loop holds one invariant between two passes, for every sequence: the model has cached all tokens of the text but
the last. That last one, the *pending* token, is fed as row 0 of the next pass, with the guesses as rows 1, 2, ...
behind it. So a pass always has a row that plain decoding would have computed, and a pass without guesses is plain
decoding.

    pass        pending   guess 0   guess 1
    row            0         1         2
    its logits judge guess 0   guess 1   the token after
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from torchweld.decoding.chance import Chance
from torchweld.decoding.greedy import DecodingError as DecodingError
from torchweld.decoding.warp import Warp

LogitsFor: TypeAlias = "Literal['last', 'all'] | Sequence[int]"


class StepModel(Protocol):
    """A causal language model with a cache, for B sequences of different lengths.

    Every error leaves the cache as it was. Logits are of any float dtype; a row's logits are the same bits however
    many rows the call has (row invariance), on which equality with plain decoding rests.
    """

    @property
    def vocab_size(self) -> int:
        """V: tokens are 0 .. V - 1."""

    @property
    def max_length(self) -> int | None:
        """Positions at most, per sequence; None for no limit."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions cached, per sequence."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start over with B prompts of at least one token: logits [B, V] of the last token of each."""

    def step(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Tensor:
        """Feed `ids` int64 [B, T] behind what is cached.

        counts: how many rows of each sequence are real (0 .. T, the rest is padding on the right); all without it.
        parents (B = 1 only): the number of the new row before each, smaller than its own, -1 for the cached text.
        Result: logits [B, 1, V] of the last real row of each ("last"; anything where counts is 0), [B, T, V] ("all"),
        or [B, len(logits_for), V]. `lengths` grow by counts; with parents by T, until `keep` or `truncate`.
        """

    def truncate(self, length: int | Sequence[int]) -> tuple[int, ...]:
        """Roll back to `length` positions; returns how many went, per sequence. CacheError where impossible."""

    def keep(self, rows: Sequence[int]) -> None:
        """Right after a step with parents: of the new rows keep these (a path from the root, ascending), as the next
        positions, and forget the others."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A model that can be recognized in another process: what is measured of it may be stored under the digest."""

    @property
    def fingerprint(self) -> str | None:
        """Hexadecimal digest of what decides how long a pass takes; None where it cannot be known."""


@runtime_checkable
class RowExact(Protocol):
    """A model that says how far its rows do not depend on each other."""

    @property
    def exact_rows(self) -> int | None:
        """A pass of at most so many rows gives every row the bits that it has alone; None for any number."""


@dataclass(frozen=True)
class Budget:
    """How much a proposal may hold: `rows` tokens in all, and no path of candidates longer than `depth`."""

    rows: int
    depth: int

    @property
    def chain(self) -> int:
        """Tokens at most of a proposal that is one path."""
        return min(self.rows, self.depth)


@dataclass(frozen=True)
class Proposal:
    """Guesses of what follows the text, fed behind the pending token in one pass.

    tokens: the guesses; token i is row i + 1 of the pass.
    probabilities: float64 [candidates, V], row i the distribution (after warping) that tokens[i] was drawn from; None
        where tokens were not drawn but chosen (lookup, arg max): then the rule takes them for certain.
    parents: number of the guess before each, smaller than its own, -1 for the pending token; None for one path.
        Siblings are tried in their order. Two siblings with the same token share what follows them.
    candidates: the first so many tokens may be accepted, the others are rows that the proposer computes something with;
        None for all.
    wanted: numbers of guesses (often not candidates) whose logits `observe` gets.
    """

    tokens: tuple[int, ...] = ()
    probabilities: Tensor | None = None
    parents: tuple[int, ...] | None = None
    candidates: int | None = None
    wanted: tuple[int, ...] = ()

    @property
    def candidate_count(self) -> int:
        """How many of the tokens may be accepted."""
        return len(self.tokens) if self.candidates is None else self.candidates


@dataclass(frozen=True)
class Outcome:
    """What became of a proposal.

    accepted: numbers of the accepted guesses, along their path.
    token: what the model put behind them; it is the next pending token.
    row: which row of the logits that the pass returned gave `token`. The pass returned those of row 0, of the
        candidates, then of the wanted guesses that are no candidates.
    logits: [len(wanted), V], of the guesses in `wanted`; None where there are none.
    """

    accepted: tuple[int, ...]
    token: int
    row: int
    logits: Tensor | None = None


class Proposer(Protocol):
    """A source of guesses; what it guesses decides how fast decoding is, never what comes out.

    Calls: `start` once per text (the model has the prompt by then); then `observe` after every pass, and `propose`
    before those that are to have guesses (the controller decides; an empty proposal abstains). Between two starts the
    context only grows, by what `observe` told; the pending token is its last.
    """

    @property
    def name(self) -> str:
        """How messages and statistics call it: "draft", "lookup", ..."""

    @property
    def row_counts(self) -> tuple[int, ...] | None:
        """Sizes of proposal that make sense, ascending, where it proposes no chains of any length; None for chains."""

    def start(self, prompt: Sequence[int], warp: Warp, chance: Chance) -> None:
        """A new text begins. Draw guesses from `chance` and warp them with `warp`, as the model's tokens are."""

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        """Guesses behind `context` (all tokens, the pending one last), within the budget; an empty proposal abstains.

        `context` is the loop's own list: read it, do not keep it.
        """

    def observe(self, outcome: Outcome) -> None:
        """What came of a pass: the last proposal's fate; nothing accepted where there was none."""
