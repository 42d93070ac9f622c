"""Measure what a precision costs on a text: KL, agreement and perplexity of a language model, errors of an encoder.

Language models run as they generate: the derived step, in chunks of MANY_ROWS and of FEW_ROWS rows behind a growing
cache, because precisions mean another arithmetic for up to 16 rows than for more (codegen/cpp_packed.py). In a chunk
every row gets its logits, so the output head meets as many rows as the layers do; when a prompt is read it meets one.

The reference is the captured graph in float64. Its logits of 2,000 tokens would take 4.2 GB for 262,144 words: it is
run once up to the hidden states, and the head then block by block, together with all that is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from torchweld.codegen.cpp_packed import PRECISIONS
from torchweld.graph.logits import kl_rows
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal
from torchweld.graph.sequence import describe_refusal
from torchweld.optimizer.compile import Options
from torchweld.optimizer.compile_step import compile_step, normalise
from torchweld.optimizer.reference_logits import ReferenceLogits, split_reference
from torchweld.optimizer.report_quality import LanguageQuality
from torchweld.optimizer.step_runner import StepRunner
from torchweld.passes.rewrite_kv_cache import StepProgram, derive_step

MANY_ROWS: Final = 512
FEW_ROWS: Final = 8
ROWS: Final = (FEW_ROWS, MANY_ROWS)
LEAST_TAIL: Final = 32
"""A block shorter than this joins the one before it: it would fall among the few rows."""
COMPARED_AT_ONCE: Final = 1 << 19
"""Logits in float64 at once; more would leave the caches of the CPU."""

Advance = Callable[[int], object]


class QualityError(ValueError):
    """What cannot be measured, and why."""


@dataclass
class Tally:
    """Sums over the positions of one precision at one number of rows. nll: of the tokens that came next.

    Plain numbers: small tensors between the large ones that come and go would keep the freed memory in pieces.
    """

    positions: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    agreed: int = 0
    predicted: int = 0
    nll_sum: float = 0.0

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll_sum / self.predicted)

    def predict(self, log_p: Tensor, following: Tensor) -> None:
        """Count log-probabilities [n, V] and the tokens that came, int64 [n], or [n - 1] at the end of a text."""
        chosen = log_p[: len(following)].gather(-1, following[:, None])
        self.nll_sum -= chosen.sum().item()
        self.predicted += len(following)

    def compare(self, log_p: Tensor, best: Tensor, logits: Tensor, following: Tensor) -> None:
        """Count logits [n, V] against the reference: log-probabilities float64 [n, V] and likeliest tokens [n]."""
        log_q = logits.double().log_softmax(-1)
        kl = kl_rows(log_p, log_q)
        self.positions += len(kl)
        self.kl_sum += kl.sum().item()
        self.kl_max = max(self.kl_max, kl.max().item())
        self.agreed += int((logits.argmax(-1) == best).sum())
        self.predict(log_q, following)


@dataclass(frozen=True)
class Block:
    """The reference in float64 for some positions: log-probabilities [n, V], the likeliest token, the one that came.

    following: int64 [n], or [n - 1] at the end of a text.
    """

    log_p: Tensor
    best: Tensor
    following: Tensor


def measure_language(
    program: Program,
    ids: Tensor,
    *,
    text: str,
    options: Options | None = None,
    precisions: Sequence[str] = PRECISIONS,
    advance: Advance = lambda count: None,
) -> tuple[LanguageQuality, ...]:
    """Compare every precision with float64 on the tokens int64 [S] of `text` (its name, for the report).

    program: captured, of ids [B, S] -> logits; it stays as it is. advance: told of positions done; there are
    `work_of` of them. A text longer than the model's positions is read in passages.  Raises QualityError for a model
    without a derived cache or without a visible output head, BuildError where it cannot be compiled.
    """
    reference, step = _reference(program), _step(program)
    check_text(ids)
    chosen = options or Options()
    passages = tuple(split_passages(ids, step.limit))
    hidden = []
    for passage in passages:
        hidden.append(reference.hidden(passage))
        advance(len(passage))
    compiled = {
        precision: compile_step(step, replace(chosen, precision=precision, strict=True))  # type: ignore[arg-type]
        for precision in precisions
    }
    tallies = {(precision, rows): Tally() for precision in precisions for rows in ROWS}
    expected = Tally()
    for passage, states in zip(passages, hidden, strict=True):
        runners = {
            (precision, rows): StepRunner(step, compiled[precision], len(passage))
            for precision, rows in tallies
        }
        for start, end in blocks(len(passage), MANY_ROWS):
            block = _reference_block(reference, states[start:end], passage[start + 1 : end + 1])
            expected.predict(block.log_p, block.following)
            for (precision, rows), runner in runners.items():
                _compare_block(runner, passage[start:end], block, rows, tallies[precision, rows])
                advance(end - start)
    return tuple(
        _quality(precision, rows, tally, expected, text) for (precision, rows), tally in tallies.items()
    )


def work_of(tokens: int, precisions: Sequence[str] = PRECISIONS) -> int:
    """How many positions `advance` hears of for a text."""
    return tokens * (1 + len(ROWS) * len(precisions))


def check_text(ids: Tensor) -> None:
    """QualityError for a text of fewer tokens than make a measurement."""
    if len(ids) < LEAST_TAIL:
        raise QualityError(f"the text has {len(ids)} tokens; expected at least {LEAST_TAIL}")


def split_passages(ids: Tensor, limit: int | None) -> Iterator[Tensor]:
    """The text in passages of at most `limit` positions (None: one passage); a short rest is left out."""
    size = len(ids) if limit is None else min(limit, len(ids))
    if size < LEAST_TAIL:
        raise QualityError(f"the model reads {size} positions; expected at least {LEAST_TAIL}")
    for start in range(0, len(ids), size):
        passage = ids[start : start + size]
        if len(passage) >= LEAST_TAIL:
            yield passage


def blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of `size` of `count` positions; a rest below LEAST_TAIL joins the last one."""
    start = 0
    while start < count:
        end = count if count - start < size + LEAST_TAIL else start + size
        yield start, end
        start = end


def _reference(program: Program) -> ReferenceLogits:
    reference = split_reference(program)
    if isinstance(reference, Refusal):
        raise QualityError(f"{program.name} has no float64 reference: {describe_refusal(reference)}")
    return reference


def _step(program: Program) -> StepProgram:
    step = derive_step(normalise(program)[0])
    if isinstance(step, Refusal):
        raise QualityError(f"{program.name} does not decode with a cache: {describe_refusal(step)}")
    if step.encoder is not None:
        raise QualityError(f"{program.name} reads an encoder; expected a model of tokens alone")
    return step


def _reference_block(reference: ReferenceLogits, hidden: Tensor, following: Tensor) -> Block:
    """Logits become log-probabilities in place: they are the largest thing in memory."""
    log_p = reference.logits(hidden)
    best = log_p.argmax(-1)
    size = _rows_at_once(log_p)
    for start in range(0, len(log_p), size):
        part = log_p[start : start + size]
        part -= part.logsumexp(-1, keepdim=True)
    return Block(log_p, best, following)


def _compare_block(runner: StepRunner, ids: Tensor, block: Block, rows: int, tally: Tally) -> None:
    """Run the tokens of a block in chunks of `rows` rows and compare with the reference."""
    size = len(ids) if rows == MANY_ROWS else rows
    for start in range(0, len(ids), size):
        logits = runner(ids[start : start + size])
        for first in range(0, len(logits), _rows_at_once(logits)):
            part = logits[first : first + _rows_at_once(logits)]
            here = slice(start + first, start + first + len(part))
            tally.compare(block.log_p[here], block.best[here], part, block.following[here])


def _rows_at_once(logits: Tensor) -> int:
    return max(1, COMPARED_AT_ONCE // logits.shape[-1])


def _quality(precision: str, rows: int, tally: Tally, expected: Tally, text: str) -> LanguageQuality:
    return LanguageQuality(
        precision, rows, tally.kl_sum / tally.positions, tally.kl_max, tally.agreed / tally.positions,
        tally.perplexity, expected.perplexity, tally.positions, text,
    )  # fmt: skip
