"""What a generation did, in numbers: passes, guesses, acceptance, seconds. How they are shown is not decided here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pass:
    """One pass of the model behind a prompt.

    rows: tokens fed (summed over the batch). drafted: candidates among them. accepted: how many stood. given: tokens
    given out. asked: was the proposer asked (it may have abstained)? seconds: of the pass and the judgement of its
    logits; proposal_seconds: of the proposer.
    """

    rows: int
    drafted: int
    accepted: int
    given: int
    asked: bool
    proposal_seconds: float
    seconds: float


@dataclass
class PassLog:
    """Passes as they happen; `freeze` makes statistics of them."""

    strategy: str = "plain"
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    start_seconds: float = 0.0
    passes: list[Pass] = field(default_factory=list)

    def freeze(self, new_tokens: int) -> Statistics:
        """The statistics so far; new_tokens: given out, the prompt's own next token included."""
        lengths = Counter(entry.accepted for entry in self.passes if entry.drafted)
        return Statistics(
            strategy=self.strategy,
            prompt_tokens=self.prompt_tokens,
            new_tokens=new_tokens,
            passes=len(self.passes),
            speculative_passes=sum(1 for entry in self.passes if entry.drafted),
            rows=sum(entry.rows for entry in self.passes),
            drafted=sum(entry.drafted for entry in self.passes),
            accepted=sum(entry.accepted for entry in self.passes),
            accepted_lengths=tuple(lengths[length] for length in range(max(lengths, default=-1) + 1)),
            given_in_passes=sum(entry.given for entry in self.passes),
            first_token_seconds=self.prefill_seconds,
            decode_seconds=sum(entry.seconds + entry.proposal_seconds for entry in self.passes),
            proposal_seconds=sum(entry.proposal_seconds for entry in self.passes),
            start_seconds=self.start_seconds,
        )


@dataclass(frozen=True)
class Statistics:
    """Numbers of one generation (of a whole batch, where there is one).

    new_tokens: given out; the first comes from the prompt's own pass, which `passes` and `decode_seconds` leave out, so
    tokens_per_second is of the others. accepted_lengths[n]: speculative passes that accepted n guesses.
    first_token_seconds: of the prompt's pass and the choice of the first token. start_seconds: of the proposer, to
    read the prompt; not part of decode_seconds.
    """

    strategy: str
    prompt_tokens: int
    new_tokens: int
    passes: int
    speculative_passes: int
    rows: int
    drafted: int
    accepted: int
    accepted_lengths: tuple[int, ...]
    given_in_passes: int
    first_token_seconds: float
    decode_seconds: float
    proposal_seconds: float
    start_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens behind the first, per second of decoding; 0 where there was none."""
        return self.given_in_passes / self.decode_seconds if self.decode_seconds > 0.0 else 0.0

    @property
    def mean_accepted(self) -> float:
        """Accepted guesses per speculative pass; 0 where there was none."""
        return self.accepted / self.speculative_passes if self.speculative_passes else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the guesses that was accepted (guesses behind a refused one count as refused); 0 without guesses."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per pass behind the prompt; 0 without a pass. Plain decoding of one sequence has 1."""
        return self.given_in_passes / self.passes if self.passes else 0.0
