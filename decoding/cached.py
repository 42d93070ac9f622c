"""Decode with the cache that is derived from a program without one.

model = CachedModel(capture(llama, (ids,)))
logits = model.prefill(ids)              # [B, 1, V] of the last position
logits = model.step(next_ids)            # one token, or k of them
model.truncate(model.length - 2)         # roll back
tokens = list(generate_cached(model, ids, 24))
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from torchweld.decoding.cache import Cache, CacheError
from torchweld.decoding.greedy import DecodingError, next_token
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.graph.sequence import describe_refusal
from torchweld.optimizer.compile import Compiled, Options, compile_program
from torchweld.passes import CANONICALIZE, RECOGNIZE
from torchweld.passes.rewrite_kv_cache import LogitsFor, StepProgram, derive_step

TYPICAL_PAST = 256
"""Positions in the cache for which fusions are priced."""


class NotDecodable(ValueError):
    """No cache can be derived from this program: names the node, its op and its source line, and why."""

    def __init__(self, name: str, refusal: Refusal) -> None:
        super().__init__(f"{name} does not decode with a cache: {describe_refusal(refusal)}")
        self.refusal = refusal


def normalised(program: Program) -> Program:
    """A copy of `program` in the spelling that `derive_step` reads."""
    copy = program.copied()
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(copy.graph_module, pass_)
    return copy


def derive(program: Program, logits: LogitsFor = "last") -> StepProgram:
    """The step program of a captured program. Raises NotDecodable."""
    step = derive_step(normalised(program), logits)
    if isinstance(step, Refusal):
        raise NotDecodable(program.name, step)
    return step


class CachedModel:
    """A compiled step and its cache: a causal language model with state, for B rows of equal length.

    max_length: positions at most; the model's own limit (a position table) holds too. The step that gives the
    logits of all positions is compiled at its first use. Raises NotDecodable. Not for several threads at once.
    """

    def __init__(
        self, program: Program, *, options: Options | None = None, max_length: int | None = None
    ) -> None:
        self._source = normalised(program)
        self._name, self._options = program.name, options or Options()
        self._steps: dict[LogitsFor, Compiled] = {}
        last = self._derive("last")
        limits = [limit for limit in (max_length, last.limit) if limit is not None]
        self.states = last.states
        self.max_length = min(limits, default=None)
        self._steps["last"] = self._compile(last)
        self.cache = Cache(self.states, batch=1, max_length=self.max_length)

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self.cache.length

    def compiled(self, logits: LogitsFor = "last") -> Compiled:
        """The compiled step, with its report."""
        if logits not in self._steps:
            self._steps[logits] = self._compile(self._derive(logits))
        return self._steps[logits]

    def prefill(self, ids: Tensor, *, logits: LogitsFor = "last") -> Tensor:
        """Start over with `ids` int64 [B, T]: logits [B, 1, V] of the last position, or [B, T, V] of all.

        Errors as for `step`; the cache before is kept then.
        """
        before = self.cache
        self.cache = Cache(
            self.states, batch=ids.shape[0] if ids.dim() == 2 else 1, max_length=self.max_length
        )
        try:
            return self.step(ids, logits=logits)
        except Exception:
            self.cache = before
            raise

    def step(self, ids: Tensor, *, logits: LogitsFor = "last") -> Tensor:
        """Feed `ids` int64 [B, T], T >= 1, behind what is cached: logits [B, 1, V], or [B, T, V] of all.

        Raises CacheError for another batch and beyond the limit, DecodingError for ids of another shape or dtype,
        IndexError for a token out of range. The cache is then as it was.
        """
        if ids.dim() != 2 or ids.shape[1] == 0 or ids.dtype != torch.int64:
            raise DecodingError(
                f"the tokens are {ids.dtype} {tuple(ids.shape)}; expected int64 [B, T] with T >= 1"
            )
        if ids.shape[0] != self.cache.batch:
            raise CacheError(
                f"{ids.shape[0]} rows of tokens for a cache of {self.cache.batch}: prefill starts another"
            )
        self.cache.check_room(ids.shape[1])
        result, *rows = self.compiled(logits)(ids, *self.cache.views())
        tensors = [row for row in rows if isinstance(row, Tensor)]
        assert isinstance(result, Tensor)
        self.cache.append(tensors)
        return result

    def truncate(self, length: int) -> int:
        """Roll back to `length` positions; returns how many went. CacheError where that is impossible."""
        return self.cache.truncate(length)

    def _compile(self, step: StepProgram) -> Compiled:
        """Compiled for the call that comes most often: one token behind a past of some length."""
        tokens, *pasts = (node.meta["val"] for node in step.program.placeholders)
        example = torch.ones(1, 1, dtype=tokens.dtype)
        # Only the shapes are read: one element stands for the whole past.
        filled = [
            torch.empty((), dtype=past.dtype).expand(TYPICAL_PAST, 1, *past.shape[2:]) for past in pasts
        ]
        return compile_program(step.program, options=self._options, example_inputs=(example, *filled))

    def _derive(self, logits: LogitsFor) -> StepProgram:
        step = derive_step(self._source, logits)
        if isinstance(step, Refusal):
            raise NotDecodable(self._name, step)
        return step


def generate_cached(
    model: CachedModel, ids: Tensor, max_new_tokens: int, eos: Collection[int] = ()
) -> Iterator[int]:
    """Yield up to `max_new_tokens` greedy tokens, as `decoding.greedy.generate` does by recomputing.

    ids: the prompt, int64 [1, S] with S >= 1; it replaces what the model has cached. Of equal logits the lowest
    token wins. Raises DecodingError for another prompt and for NaN, CacheError beyond the limit.
    """
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise DecodingError(
            f"the prompt is {ids.dtype} {tuple(ids.shape)}; expected int64 [1, S] with S >= 1"
        )
    for count in range(max_new_tokens):
        logits = model.step(ids) if count else model.prefill(ids)
        token = next_token(logits, 1)
        if token in eos:
            return
        yield token
        ids = torch.tensor([[token]], device=ids.device)
