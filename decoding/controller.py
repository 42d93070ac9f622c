"""How many guesses the next pass gets, so that speculation is never noticeably slower than plain decoding.

    gain of k guesses    E(k) / (v(k + 1) + k c)     tokens per cost of a plain pass
    E(k)                 (1 - a^(k+1)) / (1 - a)     tokens a pass gives, a the rate at which guesses are accepted
    v(M), c              cost of an M-row pass and of one guess, in plain passes

Every pass takes the k of the greatest gain, 0 if none is above 1. That alone would pay for every mistake, so there is
an account besides: speculation may lose `STAKE` plain passes at first and `SHARE` of all tokens later; what it gains
goes to the account. A pass that could overdraw it, were all guesses refused, is not made. When guesses do not pay, they
are tried again after 32 tokens, then 64, ... 512. The account covers decoding, not the draft's reading of the prompt.

source: the model of Leviathan et al. 2023; the account is ours
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torchweld.decoding.pass_costs import PassCosts
from torchweld.decoding.statistics import Pass
from torchweld.decoding.step_model import Budget

STAKE: Final = 0.5
"""Plain passes that speculation may lose before it has gained any."""
SHARE: Final = 0.015
"""Of every token's plain cost, what speculation may lose besides. Both together: 3 % of 34 tokens and more."""
MOST_SAVED: Final = 8.0
"""Plain passes of gain that the account keeps, so that a good beginning does not pay for a long bad end."""
MARGIN: Final = 1.02
"""A gain below this is not worth the noise."""
FIRST_PAUSE, LONGEST_PAUSE = 32, 512
"""Tokens after which guesses are tried again."""
MEMORY: Final = 0.95
"""What one pass leaves of the weight of those before it."""
HOPE: Final = 0.6
"""The rate of acceptance before anything is known."""
UNKNOWN_GUESS: Final = 0.3
"""Cost of one guess of a chain before it is known, in plain passes; then only one is tried."""
UNKNOWN_ROW: Final = 0.04
"""What a row more costs where passes were not measured, in plain passes."""
REFRESH: Final = 64
"""Passes after which a plain one is made to see what it costs now (texts grow)."""
PLAIN_FIRST: Final = 2
"""Plain passes at first, the faster of which says what one costs."""
TRIAL: Final = 4
"""Passes in a row for which proposals that are no chains are tried again: a lookahead window has to fill first."""


class Controller:
    """See the module. most: guesses at most. row_counts: the sizes that the proposer has, where it makes no chains.

    costs: measured v(M); without them a row more is taken to cost `UNKNOWN_ROW`. guess_seconds: of one guess, where it
    was measured (a draft); without it the first one is a surprise, and may overdraw the account once.
    """

    def __init__(
        self,
        costs: PassCosts | None = None,
        *,
        most: int = 15,
        row_counts: Sequence[int] | None = None,
        guess_seconds: float | None = None,
    ) -> None:
        self.costs, self.most = costs, most
        self.row_counts = None if row_counts is None else tuple(row_counts)
        self.account = STAKE
        self._ratios: dict[int, float] = {}  # v(M) as far as it was asked for
        self._plain = float("inf")  # seconds of a plain pass
        self._plain_passes = 0
        self._since_plain = 0
        self._stretch = 1.0  # measured cost of speculative passes against `costs`
        self._guess = guess_seconds  # seconds of one guess
        self._tried, self._stood = 0.0, 0.0  # guesses judged and accepted, of chains
        self._by_size: dict[int, tuple[float, float]] = {}  # passes and accepted guesses, of other proposals
        self._asked = 0  # the size of proposal asked for last; one may come out smaller
        self._pause, self._quiet = FIRST_PAUSE, 0
        self._trial = 0  # passes still to try

    def rows(self, budget: Budget) -> int:
        """See `Policy`."""
        if self._plain_passes < PLAIN_FIRST or self._since_plain >= REFRESH:
            return 0
        affordable = [count for count in self._sizes(budget) if self.worst_loss(count) <= self.account]
        if not affordable:
            return 0
        best = max(affordable, key=self.gain)
        if self._quiet >= self._pause:
            self._trial = 1 if self.row_counts is None else TRIAL
        if self.gain(best) > MARGIN or self._trial > 0:
            self._asked = best
            return best
        return 0

    def record(self, entry: Pass) -> None:
        """See `Policy`."""
        self.account += SHARE * entry.given
        self._quiet += entry.given
        if entry.rows == 1:
            self._record_plain(entry.seconds)
            self.account -= entry.proposal_seconds / self._plain  # of a proposer that had no guess
        else:
            self._record_guesses(entry)
        self.account = min(self.account, MOST_SAVED)

    def gain(self, count: int) -> float:
        """Tokens that a pass of `count` guesses gives for the cost of one plain pass."""
        return self.expected_tokens(count) / self._cost(count)

    def worst_loss(self, count: int) -> float:
        """Plain passes lost if all of `count` guesses are refused."""
        return self._cost(count) - 1.0

    def expected_tokens(self, count: int) -> float:
        """Tokens that a pass of `count` guesses gives, the one behind them included."""
        if self.row_counts is not None:
            passes, stood = self._by_size.get(count, (0.0, 0.0))
            return 1.0 + (stood + TRIAL) / (passes + TRIAL)  # hope: one guess stands
        rate = self.acceptance_rate
        return float(count + 1) if rate >= 1.0 else (1.0 - rate ** (count + 1)) / (1.0 - rate)

    @property
    def acceptance_rate(self) -> float:
        """How probable it is that a guess stands if those before it do."""
        return (self._stood + HOPE) / (self._tried + 1.0)

    def _sizes(self, budget: Budget) -> Sequence[int]:
        """Sizes of proposal that may be asked for."""
        if self.row_counts is not None:
            sizes = [count for count in self.row_counts if count <= budget.rows]
        else:
            sizes = list(range(1, min(self.most, budget.chain) + 1))
        # An unknown cost is tried in the smallest size.
        return sizes[:1] if self._guess is None else sizes

    def _cost(self, count: int) -> float:
        """Plain passes that a pass of `count` guesses costs."""
        unknown = UNKNOWN_GUESS if self.row_counts is None else 0.0
        guess = unknown if self._guess is None else self._guess / self._plain
        return self._table(1 + count) * self._stretch + guess * count

    def _table(self, rows: int) -> float:
        if rows not in self._ratios:
            unknown = 1.0 + UNKNOWN_ROW * (rows - 1)
            self._ratios[rows] = unknown if self.costs is None else self.costs.ratio(rows)
        return self._ratios[rows]

    def _record_plain(self, seconds: float) -> None:
        """A pass of one row: plain, or one for which the proposer had no guess."""
        if self._plain_passes < PLAIN_FIRST:
            self._plain = min(self._plain, seconds)
        else:
            # One stumble of the machine must not make speculation look cheap.
            self._plain += 0.2 * (min(seconds, 2.0 * self._plain) - self._plain)
        self._plain_passes += 1
        self._since_plain = 0

    def _record_guesses(self, entry: Pass) -> None:
        cost = entry.seconds / self._plain
        self._since_plain += 1
        self.account -= cost + entry.proposal_seconds / self._plain - entry.given
        self._stretch += 0.2 * (min(cost / self._table(entry.rows), 10.0) - self._stretch)
        guess = entry.proposal_seconds / (entry.rows - 1)
        self._guess = guess if self._guess is None else self._guess + 0.2 * (guess - self._guess)
        judged = entry.accepted + int(entry.accepted < entry.drafted)
        self._tried = MEMORY * self._tried + judged
        self._stood = MEMORY * self._stood + entry.accepted
        passes, stood = self._by_size.get(self._asked, (0.0, 0.0))
        self._by_size[self._asked] = MEMORY * passes + 1.0, MEMORY * stood + entry.accepted
        if self._quiet >= self._pause and not entry.accepted:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif entry.accepted:
            self._pause = FIRST_PAUSE
        self._quiet, self._trial = 0, max(0, self._trial - 1)


def break_even(costs: PassCosts, guess_cost: float = 0.0, most: int = 15) -> float | None:
    """The least rate of acceptance at which some number of guesses up to `most` costs no more than plain decoding.

    guess_cost: of one guess, in plain passes. None where not even a rate of 1 pays.
    """

    def pays(rate: float) -> bool:
        costs_of_pass = ((k, costs.ratio(k + 1) + k * guess_cost) for k in range(1, most + 1))
        return any(sum(rate**i for i in range(k + 1)) >= cost for k, cost in costs_of_pass)

    if not pays(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
