"""Lookahead decoding: the model guesses for itself, by Jacobi iteration beside the verification of what it guessed.

    levels 0 .. N-2    guesses of the next tokens; level l + 1 is what the model said behind level l
    column i           level 0: token n + i (column 0 is the pending token, at n); level l: token n + l + i
    a pass             pending, level 0, ..., level N-2, and up to G guesses of N - 1 tokens from the pool
    visible            level 0, column i:  level 0, columns 0 .. i
                       level l, column i:  level 0, columns 0 .. i, levels 1 .. l of column i
                       guess, token j:     pending, the guess's tokens 0 .. j
    after it           column i, read down, and the model's new token behind it are an n-gram for the pool;
                       every level moves up by one

All rows see a path of consecutive positions that begins at the pending token, so a pass is a tree, in which paths with
a common beginning share their rows. The logits of a row are right for its path, whatever it was made for, so rows of
the window may be accepted as guesses are.

Source: Fu et al., Break the Sequential Dependency of LLM Inference Using Lookahead Decoding (2024).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torchweld.decoding.chance import Chance
from torchweld.decoding.logits import as_array
from torchweld.decoding.step_model import Budget, DecodingError, Outcome, Proposal
from torchweld.decoding.tree import ROOT, Tree, depths
from torchweld.decoding.warp import Warp

NGram = tuple[int, ...]


class NGramPool:
    """What followed a token: at most `size` continuations per token, the least recently seen one goes first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: dict[int, OrderedDict[NGram, None]] = {}

    def add(self, token: int, continuation: NGram) -> None:
        """`continuation` was seen behind `token`, just now."""
        known = self._entries.setdefault(token, OrderedDict())
        known[continuation] = None
        known.move_to_end(continuation)
        if len(known) > self.size:
            known.popitem(last=False)

    def add_text(self, text: Sequence[int], length: int, start: int = 0) -> None:
        """All continuations of `length` tokens in `text` whose last token is at `start` or later."""
        for end in range(max(start, length), len(text)):
            self.add(text[end - length], tuple(text[end - length + 1 : end + 1]))

    def guesses(self, token: int) -> Iterator[NGram]:
        """Continuations of `token`, the latest first."""
        return reversed(self._entries.get(token, OrderedDict()))

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))


class Window:
    """The Jacobi window: levels of guesses that grow to `n` - 1, then move up with every pass.

    levels[0] holds columns 1, 2, ... (column 0 is the pending token, which is no guess), the others columns 0, 1, ...
    Level 0 begins with tokens that `seed` picks from the prompt, `n` - 2 more of them than stay.
    """

    def __init__(self, prompt: Sequence[int], width: int, n: int, seed: int) -> None:
        self.n = n
        pick = random.Random(seed)
        self.levels: list[list[int]] = [[pick.choice(prompt) for _ in range(width + n - 3)]]

    @property
    def is_full(self) -> bool:
        """Are there all n - 1 levels?"""
        return len(self.levels) == self.n - 1

    def columns(self) -> list[list[int]]:
        """Per column the tokens of its path behind the pending one: level 0 up to this column, then its levels."""
        first, *others = self.levels
        return [first[:i] + [level[i] for level in others] for i in range(len(first) + 1)]

    def advance(self, pending: int, said: Sequence[int]) -> list[tuple[int, NGram]]:
        """Move by one token; `said` is what the model put behind the last row of each column (`columns`).

        Returns the n-grams that are complete, as (token, continuation).
        """
        if not self.is_full:
            # One token went by: what was column 1 is column 0 now, and what column 1 said is the first of a new level.
            self.levels = [*(level[1:] for level in self.levels), list(said[1:])]
            return []
        first, *others = self.levels
        columns = zip([pending, *first], zip(*others, said, strict=True), strict=True)
        self.levels = [others[0][1:], *others[1:], list(said)]
        return list(columns)


@dataclass(frozen=True)
class _Asked:
    """The last pass: the pending token, and per column which of the wanted rows ends it (None: the pending one)."""

    pending: int
    rows: tuple[int | None, ...]


class LookaheadProposer:
    """Guesses by lookahead: `window` columns (W), n-grams of `ngram` tokens (N), `guesses` of them per pass (G).

    The defaults suit a CPU, where 8 rows cost about what one costs; papers use 60 to 120 rows on a GPU. from_text:
    n-grams of the prompt and of the text so far go to the pool as well. seed: picks the first guesses.
    Raises ValueError for sizes that make no window.
    """

    name = "lookahead"

    def __init__(
        self, *, window: int = 2, ngram: int = 3, guesses: int = 2, from_text: bool = True, seed: int = 0
    ) -> None:
        if window < 1 or ngram < 3 or guesses < 1:
            sizes = f"window={window}, ngram={ngram}, guesses={guesses}"
            raise ValueError(f"{sizes}; expected window >= 1, ngram >= 3, guesses >= 1")
        self.width, self.n, self.most = window, ngram, guesses
        self.from_text, self.seed = from_text, seed
        self.pool = NGramPool(guesses)
        self.window: Window | None = None
        self._seen = 0  # tokens of the text that are in the pool
        self._asked: _Asked | None = None

    @property
    def row_counts(self) -> tuple[int, ...]:
        """The rows of the largest pass but the pending one: a full window and all guesses, or a window that fills up
        (its level 0 is longer)."""
        full = (self.n - 1) * (self.width + self.most) - 1
        filling = [(1 + s) * (self.width + self.n - 3 - s) + s for s in range(self.n - 1)]
        return (max(full, *filling),)

    def start(self, prompt: Sequence[int], warp: Warp, chance: Chance) -> None:
        """Begin with an empty pool and tokens of the prompt; guesses are the model's best, not drawn."""
        if not prompt:
            raise DecodingError("lookahead needs a prompt of one token at least, to begin its window with")
        self.pool = NGramPool(self.most)
        self.window = Window(prompt, self.width, self.n, self.seed)
        self._seen, self._asked = 0, None

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        """The window and the guesses as one tree; nothing where the budget does not hold the window."""
        if self.window is None:
            raise DecodingError("lookahead was asked for guesses before start(prompt, ...)")
        if self.from_text:
            self.pool.add_text(context, self.n - 1, self._seen)
            self._seen = len(context)
        self._asked = None
        tree, window = Tree(), Tree()
        columns = self.window.columns()
        for column in columns:
            window.add(column)
        if len(window) > budget.rows or budget.depth < 1:
            return Proposal()
        self._add_guesses(tree, columns, context[-1], budget)
        ends = [([ROOT, *tree.add(column)])[-1] for column in columns]
        return self._as_proposal(tree, ends, context[-1], budget.depth)

    def _add_guesses(self, tree: Tree, columns: list[list[int]], pending: int, budget: Budget) -> None:
        """Guesses first, so that they are tried first; as many as leave room for the window."""
        for guess in self.pool.guesses(pending):
            trial = Tree()
            for path in (*columns, *_paths(tree), guess[: budget.depth]):
                trial.add(path)
            if len(trial) <= budget.rows:
                tree.add(guess[: budget.depth])

    def _as_proposal(self, tree: Tree, ends: list[int], pending: int, depth: int) -> Proposal:
        """The tree with the rows that may be accepted first; wanted is the end of every column."""
        levels = depths(tree.parents)
        order = sorted(range(len(tree)), key=lambda node: levels[node] > depth)
        place = {node: number for number, node in enumerate(order)}
        wanted = tuple(dict.fromkeys(place[end] for end in ends if end != ROOT))
        rows = tuple(wanted.index(place[end]) if end != ROOT else None for end in ends)
        self._asked = _Asked(pending, rows)
        return Proposal(
            tokens=tuple(tree.tokens[node] for node in order),
            parents=tuple(
                place[parent] if (parent := tree.parents[node]) != ROOT else ROOT for node in order
            ),
            candidates=sum(level <= depth for level in levels),
            wanted=wanted,
        )

    def observe(self, outcome: Outcome) -> None:
        """Read the model's guesses off the ends of the columns, and move the window."""
        asked, self._asked = self._asked, None
        if asked is None or outcome.logits is None or self.window is None:
            return
        logits = as_array(outcome.logits)
        said = [-1 if row is None else int(logits[row].argmax()) for row in asked.rows]
        for token, continuation in self.window.advance(asked.pending, said):
            self.pool.add(token, continuation)


def _paths(tree: Tree) -> list[list[int]]:
    """The tokens of all paths of a tree, in an order that makes the same tree again."""
    paths: list[list[int]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append([*(paths[parent] if parent != ROOT else []), token])
    return paths
