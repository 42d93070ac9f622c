"""Decode with the cache that is derived from a program without one.

model = CachedModel.from_module(llama)
logits = model.prefill([[5, 17, 3], [8, 2]])       # [2, V] of the last tokens
logits = model.step(torch.tensor([[4], [9]]))      # [2, 1, V]; k tokens, or a tree of them, in the same way
model.truncate(2)                                  # roll back
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from torchweld.codegen.cache import make_key
from torchweld.decoding.cache import SPARE_ROWS, Cache, CacheError
from torchweld.decoding.capture_causal import capture_causal
from torchweld.decoding.greedy import DecodingError, next_token
from torchweld.decoding.step_model import LogitsFor
from torchweld.decoding.step_request import StepRequest, check_prompts, read_request
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.graph.sequence import describe_refusal
from torchweld.optimizer.compile import Compiled, Options, compile_program
from torchweld.passes import CANONICALIZE, RECOGNIZE
from torchweld.passes.fill_padding_mask import fill_padding_mask
from torchweld.passes.rewrite_kv_cache import StepProgram, derive_step, with_tree

__all__ = ["CacheError", "CachedModel", "NotDecodable", "derive", "generate_cached", "normalised"]

TYPICAL_PAST = 256
"""Positions in the cache for which fusions are priced."""
CHUNK = 512
"""Rows of a sequence that run at once: more would cost memory (activations, larger rings) and gain no speed."""


class NotDecodable(ValueError):
    """No cache can be derived from this program: names the node, its op and its source line, and why."""

    def __init__(self, name: str, refusal: Refusal) -> None:
        super().__init__(f"{name} does not decode with a cache: {describe_refusal(refusal)}")
        self.refusal = refusal


def normalised(program: Program) -> Program:
    """A copy of `program` in the spelling that `derive_step` reads; an attention mask over tokens is all ones there."""
    copy = fill_padding_mask(program).copied()
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(copy.graph_module, pass_)
    return copy


def derive(program: Program) -> StepProgram:
    """The step program of a captured program. Raises NotDecodable."""
    step = derive_step(normalised(program))
    if isinstance(step, Refusal):
        raise NotDecodable(program.name, step)
    return step


class CachedModel:
    """A compiled step and its cache: a causal language model with state, for sequences of different lengths.

    It satisfies decoding/step_model.py.  max_length: positions at most; the model's own limit (a position table) holds
    too.  spare: rows that window layers keep beyond their window, for steps of so many rows and rolling them back.
    up_front: take the memory for max_length at every prefill.  The step for trees is compiled at its first use.
    Raises NotDecodable. Not for several threads at once.
    """

    def __init__(
        self,
        program: Program,
        *,
        options: Options | None = None,
        max_length: int | None = None,
        spare: int = SPARE_ROWS,
        up_front: bool = False,
    ) -> None:
        step = derive(program)
        self._step, self._options = step, options or Options()
        self._spare, self._up_front = spare, up_front
        if step.program.fake_inputs[0].dtype != torch.int64:  # type: ignore[attr-defined]
            raise NotDecodable(
                program.name, Refusal("the input holds no tokens (int64)", step.program.placeholders[0])
            )
        limits = [limit for limit in (max_length, step.limit) if limit is not None]
        self.states = step.states
        self.vocab_size = step.vocabulary
        self.max_length = min(limits, default=None)
        self._tokens = step.token_limit
        self._steps = {False: self._compile(step)}
        self.cache = self._new_cache(1)

    @classmethod
    def from_module(cls, model: nn.Module, example: Tensor | None = None, **settings: object) -> CachedModel:
        """Capture `model` (of ids [B, S] -> logits, or a Hugging Face causal language model) and derive its step.

        example: int64 [2, 7] ids, say, that the model accepts; made up without it.  settings: those of CachedModel.
        Raises CaptureError and NotDecodable.
        """
        return cls(capture_causal(model, example), **settings)  # type: ignore[arg-type]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions cached, per sequence."""
        return self.cache.lengths

    @property
    def fingerprint(self) -> str | None:
        """Digest of what decides how long a pass takes: the step's C++, its threads, the shapes of its weights; None
        where the step runs eagerly."""
        executable = self.compiled().executable
        if executable is None:
            return None
        weights = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in executable.plan.constants.values()]
        return make_key(executable.source, str(executable.threads), *weights)

    @property
    def length(self) -> int:
        """Positions cached of the longest sequence."""
        return self.cache.length

    def compiled(self, *, is_tree: bool = False) -> Compiled:
        """The compiled step, with its report."""
        if is_tree not in self._steps:
            self._steps[is_tree] = self._compile(with_tree(self._step) if is_tree else self._step)
        return self._steps[is_tree]

    def prefill(self, prompts: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Start over with B prompts of at least one token: logits [B, V] of the last token of each.

        Errors as for `step`; the cache before is kept then.
        """
        rows = check_prompts(prompts, self._known_tokens())
        before = self.cache
        self.cache = self._new_cache(len(rows))
        try:
            self.cache.check_room([row.shape[0] for row in rows])
            return torch.cat([self._feed_alone(rows, first, last) for first, last in _runs(rows)])
        except BaseException:
            self.cache = before
            raise

    def step(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Tensor:
        """Feed `ids` int64 [B, T], T >= 1, behind what is cached; see StepModel.step.

        Logits [B, 1, V] of the last real row ("last"), [B, T, V] ("all"), or [B, n, V] of n chosen rows. Logits of rows
        that are padding mean nothing. Raises CacheError for another batch and beyond the limit, DecodingError for
        arguments that do not fit, IndexError for a token out of range. The cache is then as it was.
        """
        request = read_request(ids, counts, parents, logits_for, self._known_tokens())
        self.cache.check_room(request.counts)
        if request.rows <= CHUNK or request.parents is not None:
            return self._run(request)
        before = self.cache
        self.cache = before.fork()
        try:
            return self._feed(request)
        except BaseException:
            self.cache = before
            raise

    def truncate(self, length: int | Sequence[int]) -> tuple[int, ...]:
        """Roll back to `length` positions; returns how many went, per sequence. CacheError where that is impossible."""
        return self.cache.truncate(length)

    def keep(self, rows: Sequence[int]) -> None:
        """After a step with parents: keep these new rows, a path from the root, as the next positions."""
        self.cache.keep(rows)

    def _known_tokens(self) -> int:
        return self.vocab_size if self._tokens is None else self._tokens

    def _new_cache(self, batch: int) -> Cache:
        return Cache(self.states, batch, self.max_length, spare=self._spare, up_front=self._up_front)

    def _feed_alone(self, rows: list[Tensor], first: int, last: int) -> Tensor:
        """Prompts of sequences `first` to `last`, all of one length, without padding: logits [last - first, V]."""
        request = read_request(torch.stack(rows[first:last]), None, None, "last", self._known_tokens())
        return self._feed(request, first, last)[:, 0]

    def _feed(self, request: StepRequest, first: int = 0, last: int | None = None) -> Tensor:
        """Run a request in chunks of rows; its logits in the order that was asked for."""
        parts = [self._run(part, first, last) for part in request.chunks(CHUNK)]
        return request.gather(parts, CHUNK)

    def _run(self, request: StepRequest, first: int = 0, last: int | None = None) -> Tensor:
        """One call of the compiled step for sequences `first` to `last`: logits [B, n, V]."""
        cache = self.cache
        compiled = self.compiled(is_tree=request.parents is not None)
        here = range(cache.batch)[first:last]
        lengths = cache.lengths[first:last]
        rows = [request.rows if sequence in here else 0 for sequence in range(cache.batch)]
        cache.reserve(rows)
        cache.will_write(rows)
        try:
            tensors = cache.tensors(first, last)
            logits, *written = compiled(*request.inputs(lengths, self.max_length), *tensors)
            for held, result in zip(tensors, written, strict=True):
                assert isinstance(result, Tensor)
                if result.data_ptr() != held.data_ptr():  # an eager run gives copies
                    held.copy_(result)
            counts = dict(zip(here, request.counts, strict=True))
            cache.advance([counts.get(sequence, 0) for sequence in range(cache.batch)], request.parents)
        finally:
            cache.settle()
        assert isinstance(logits, Tensor)
        return logits.reshape(len(lengths), -1, self.vocab_size)

    def _compile(self, step: StepProgram) -> Compiled:
        """Compiled for the call that comes most often: one token behind a past of some length."""
        examples = []
        for node in step.program.placeholders:
            value = node.meta["val"]
            if value.dim() == 4:
                # Only the shapes are read: one element stands for the whole past.
                shape = (1, value.shape[1], TYPICAL_PAST + 1, value.shape[3])
                examples.append(torch.empty((), dtype=value.dtype).expand(shape))
            else:
                examples.append(torch.zeros((1,) * value.dim(), dtype=value.dtype))
        return compile_program(step.program, options=self._options, example_inputs=tuple(examples))


def _runs(rows: list[Tensor]) -> Iterator[tuple[int, int]]:
    """Bounds of neighbours of equal length: they run together, without padding."""
    first = 0
    for last in range(1, len(rows) + 1):
        if last == len(rows) or rows[last].shape != rows[first].shape:
            yield first, last
            first = last


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
        logits = model.step(ids) if count else model.prefill(ids)[:, None]
        token = next_token(logits, 1)
        if token in eos:
            return
        yield token
        ids = torch.tensor([[token]], device=ids.device)
