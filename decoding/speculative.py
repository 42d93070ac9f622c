"""Speculative decoding: propose, verify in one pass, accept, roll back. One loop for every source of guesses.

    while the text goes on:
        proposal = proposer.propose(text)             guesses behind the pending token: a path or a tree
        logits   = model.step([pending] + guesses)    one pass judges all of them
        verdict  = judge(proposal, logits)            accepted guesses, and one token more from the model
        model.keep / truncate                         the cache holds the text but its last token

The text has the distribution of plain decoding, token by token; without sampling it is the same text. With no guesses
a pass is a step of plain decoding, so the controller may fall back at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from torchweld.decoding.accept import Verdict, check_proposal, judge, judge_greedy
from torchweld.decoding.chance import Chance
from torchweld.decoding.choices import Chooser, may_choose
from torchweld.decoding.logits import as_array, log_probability
from torchweld.decoding.request import (
    Finish,
    Given,
    Request,
    check_request,
    finish_of,
    roll_back,
)
from torchweld.decoding.statistics import Pass, PassLog
from torchweld.decoding.step_model import (
    Budget,
    DecodingError,
    LogitsFor,
    Outcome,
    Proposal,
    Proposer,
    RowExact,
    StepModel,
)

NOTHING = Proposal()

MOST_ROWS = 1 << 12
"""Guesses in one pass at most, where the model sets no limit."""

Result = TypeVar("Result")


class Policy(Protocol):
    """Decides before every pass how many guesses it may have, and hears what came of it."""

    def rows(self, budget: Budget) -> int:
        """Guesses for the next pass, at most `budget.rows`; 0 for plain decoding."""

    def record(self, entry: Pass) -> None:
        """A pass happened."""


class Constant:
    """Always as many guesses as `count`, as far as the budget goes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def rows(self, budget: Budget) -> int:
        """See `Policy`."""
        return min(self.count, budget.rows)

    def record(self, entry: Pass) -> None:
        """Nothing is learned."""


def speculate(
    model: StepModel,
    request: Request,
    proposer: Proposer,
    *,
    policy: Policy,
    chance: Chance,
    log: PassLog,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Given]:
    """Yield the tokens behind the request's prompt, each pass's as soon as it is judged; the last says why it is.

    The model starts over with the prompt. However the loop ends (an error, Ctrl-C, the caller closing the iterator),
    the model then has cached the prompt and all tokens given out but the last. Raises DecodingError for a bad request,
    for a proposer that raises or breaks its contract, and for logits that hold NaN; the model's errors pass through.
    """
    check_request(request, model)
    return _Loop(model, request, proposer, policy, chance, log, clock).run()


@dataclass
class _Loop:
    """One text on its way; `text` is the prompt and what was given out."""

    model: StepModel
    request: Request
    proposer: Proposer
    policy: Policy
    chance: Chance
    log: PassLog
    clock: Callable[[], float]

    def run(self) -> Iterator[Given]:
        """See `speculate`."""
        request, begin = self.request, self.clock()
        self.text = list(request.prompt)
        logits = self.model.prefill([request.prompt])
        try:
            verdict = judge(NOTHING, logits, self.text, request.warp, self.chance)
            self.log.strategy, self.log.prompt_tokens = self.proposer.name, len(self.text)
            self.log.prefill_seconds = self.clock() - begin
            yield from self._give(verdict, logits)
            if self._finish(self.text[-1], len(self.text)) is None:
                begin = self.clock()
                self._asked(lambda: self.proposer.start(request.prompt, request.warp, self.chance))
                self.log.start_seconds = self.clock() - begin
            while self._finish(self.text[-1], len(self.text)) is None:
                yield from self._advance()
        finally:
            roll_back(self.model, [max(len(request.prompt), len(self.text) - 1)])

    def _advance(self) -> Iterator[Given]:
        """One pass; the text grows by what is given."""
        begin = self.clock()
        proposal, asked = self._propose()
        proposed = self.clock()
        verdict, logits = self._judged(proposal)
        _commit(self.model, len(self.text) - 1, proposal, verdict)
        wanted = None if logits is None else _wanted(proposal, logits)
        outcome = Outcome(verdict.accepted, verdict.tokens[-1], verdict.rows[-1], wanted)
        judged = self.clock()
        self._asked(lambda: self.proposer.observe(outcome))
        entry = Pass(
            rows=1 + len(proposal.tokens),
            drafted=proposal.candidate_count,
            accepted=len(verdict.accepted),
            given=self._given_count(verdict),
            asked=asked,
            proposal_seconds=proposed - begin + self.clock() - judged,
            seconds=judged - proposed,
        )
        self.policy.record(entry)
        self.log.passes.append(entry)
        yield from self._give(verdict, logits)

    def _judged(self, proposal: Proposal) -> tuple[Verdict, Tensor | None]:
        """What the pass says of a proposal, and its logits where somebody reads them."""
        model, request = self.model, self.request
        ids, options = _pass(self.text[-1], proposal)
        if (
            isinstance(model, Chooser)
            and not proposal.wanted
            and may_choose(model, request.warp, request.logprobs)
        ):
            choices = model.choose(ids, **options)
            return judge_greedy(proposal, self.text, partial(choices.token, 0)), None
        logits = model.step(ids, **options)[0]
        return judge(proposal, logits, self.text, request.warp, self.chance), logits

    def _propose(self) -> tuple[Proposal, bool]:
        """The proposal for the next pass, and whether the proposer was asked for it."""
        budget = self._budget()
        rows = self.policy.rows(budget)
        if not rows:
            return NOTHING, False
        allowed = Budget(rows, budget.depth)
        proposal = self._asked(lambda: self.proposer.propose(self.text, allowed))
        check_proposal(proposal, allowed, self.model.vocab_size, self.proposer.name)
        return proposal, True

    def _budget(self) -> Budget:
        """What may stand behind the pending token: the room in the cache, one token less than are still to be given,
        and no more rows than leave the bits of plain decoding."""
        limit, request = self.model.max_length, self.request
        depth = len(request.prompt) + request.max_new_tokens - len(self.text) - 1
        exact = self.model.exact_rows if isinstance(self.model, RowExact) else None
        room = MOST_ROWS if exact is None else exact - 1
        room = room if limit is None else min(room, limit - len(self.text))
        return Budget(room, min(depth, room)) if depth > 0 and room > 0 else Budget(0, 0)

    def _given_count(self, verdict: Verdict) -> int:
        """How many of the verdict's tokens come before the end of the text, its last one included."""
        for place, token in enumerate(verdict.tokens, start=1):
            if self._finish(token, len(self.text) + place):
                return place
        return len(verdict.tokens)

    def _give(self, verdict: Verdict, logits: Tensor | None) -> Iterator[Given]:
        """Give tokens out one by one, up to the end of the text."""
        for token, row in zip(verdict.tokens, verdict.rows, strict=True):
            wanted = logits is not None and self.request.logprobs
            logprob = log_probability(logits[row], token) if wanted else None  # type: ignore[index]
            self.text.append(token)
            finish = self._finish(token, len(self.text))
            yield Given(token, logprob, finish)
            if finish is not None:
                return

    def _finish(self, token: int, length: int) -> Finish | None:
        return finish_of(token, length, self.request, self.model.max_length)

    def _asked(self, call: Callable[[], Result]) -> Result:
        """The result of a call of the proposer; its errors are named as such."""
        try:
            return call()
        except Exception as error:
            raise DecodingError(
                f"the proposer {self.proposer.name!r} failed after {len(self.text)} tokens: "
                f"{type(error).__name__}: {error}"
            ) from error


class _Options(TypedDict, total=False):
    """Arguments of a step."""

    parents: Sequence[int] | None
    logits_for: LogitsFor


def _pass(pending: int, proposal: Proposal) -> tuple[Tensor, _Options]:
    """The arguments of the step that judges a proposal: it gives rows for the pending token, for the candidates, and
    for the wanted guesses that are no candidates."""
    ids = torch.tensor([[pending, *proposal.tokens]])
    if not proposal.tokens:
        return ids, {}
    parents = None if proposal.parents is None else [-1, *(parent + 1 for parent in proposal.parents)]
    rows = _rows_with_logits(proposal)
    return ids, {"parents": parents, "logits_for": "all" if len(rows) == ids.shape[1] else rows}


def _rows_with_logits(proposal: Proposal) -> list[int]:
    """Rows of the pass whose logits are read."""
    candidates = proposal.candidate_count
    extra = sorted({guess + 1 for guess in proposal.wanted if guess >= candidates})
    return [*range(1 + candidates), *extra]


def _wanted(proposal: Proposal, logits: Tensor) -> Tensor | None:
    """Logits of the guesses that the proposer wants to see."""
    if not proposal.wanted:
        return None
    places = {row: place for place, row in enumerate(_rows_with_logits(proposal))}
    # NumPy copies them: torch's threads would be in the way of the next pass (decoding/logits.py).
    return torch.from_numpy(as_array(logits)[[places[guess + 1] for guess in proposal.wanted]])


def _commit(model: StepModel, past: int, proposal: Proposal, verdict: Verdict) -> None:
    """Leave in the cache, behind `past` positions, the pending token and the accepted guesses."""
    if proposal.parents:  # a tree without guesses was a plain step
        model.keep([0, *(guess + 1 for guess in verdict.accepted)])
    elif len(verdict.accepted) < len(proposal.tokens):
        model.truncate(past + 1 + len(verdict.accepted))
