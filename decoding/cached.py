"""Decode with the cache that is derived from a program without one.

model = CachedModel.from_module(llama)
logits = model.prefill([[5, 17, 3], [8, 2]])       # [2, V] of the last tokens
logits = model.step(torch.tensor([[4], [9]]))      # [2, 1, V]; k tokens, or a tree of them, in the same way
model.truncate(2)                                  # roll back

An encoder-decoder takes its source when a text begins: model.prefill([[0]], input_ids=source).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from torchweld.codegen.cache import make_key
from torchweld.codegen.cpp_packed import FEW_ROWS
from torchweld.decoding.cache import SPARE_ROWS, Cache, CacheError
from torchweld.decoding.choices import Choices, choices_of
from torchweld.decoding.encoder import Encoded, Encoder
from torchweld.decoding.greedy import DecodingError
from torchweld.decoding.step_inputs import PreparedStep, StepInputs
from torchweld.decoding.step_model import LogitsFor
from torchweld.decoding.step_request import StepRequest, check_prompts, read_request
from torchweld.decoding.step_source import NotDecodable, StepSource, derive, normalised
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Compiled, Options

__all__ = ["CacheError", "CachedModel", "NotDecodable", "derive", "normalised"]

CHUNK = 512
"""Rows of a sequence that run at once: more would cost memory (activations, larger rings) and gain no speed."""
NO_ROWS = torch.zeros(0, dtype=torch.int64)
NO_CHOICES = Choices(torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64))
PREPARED_STEPS = 32
"""Shapes of steps whose calls are kept ready."""
GUESSES = 64
"""A step of so many rows may be one that verifies guesses: its larger ring stays until the next call, for truncate."""


class CachedModel:
    """A compiled step and its cache: a causal language model with state, for sequences of different lengths.

    It satisfies decoding/step_model.py.  max_length: positions at most; the model's own limit (a position table) holds
    too.  spare: rows that window layers keep beyond their window, for steps of so many rows and rolling them back.
    up_front: take the memory for max_length at every prefill.  The step for trees is compiled at its first use.
    tokens: the input that is the decoder's text, where a program has several that could be; `encoder` reads the others.
    Raises NotDecodable. Not for several threads at once.
    """

    def __init__(
        self,
        program: Program | StepSource,
        *,
        options: Options | None = None,
        max_length: int | None = None,
        spare: int = SPARE_ROWS,
        up_front: bool = False,
        tokens: str | None = None,
    ) -> None:
        self._spare, self._up_front = spare, up_front
        if not isinstance(program, StepSource):
            captured = program
            program = StepSource(lambda: captured, options, tokens=tokens)
        self._source = program
        step, compiled = self._source.compiled(is_tree=False)
        self.encoder = None if step.encoder is None else Encoder(step.encoder, self._source.options)
        self._encoded = Encoded()
        self._limit = step.limit
        limits = [limit for limit in (max_length, step.limit) if limit is not None]
        self.states = step.states
        self.vocab_size = step.vocabulary
        self.max_length = min(limits, default=None)
        self._tokens = step.token_limit
        self._steps = {False: compiled}
        self._chooses = {False: step.chooses}
        self.cache = self._new_cache(1)

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        example: Tensor | Mapping[str, Tensor] | None = None,
        *,
        options: Options | None = None,
        tokens: str | None = None,
        **settings: object,
    ) -> CachedModel:
        """Capture `model` (of ids [B, S] -> logits, or a Hugging Face causal language model) and derive its step; of a
        model of torchweld.models that was compiled before, the step comes from the cache.

        example: int64 [2, 7] ids, say, that the model accepts, or all inputs of an encoder-decoder by name, of
        different lengths; made up without it.  tokens, settings: those of CachedModel.
        Raises CaptureError and NotDecodable.
        """
        source = StepSource.of_module(model, example, options, tokens=tokens)
        return cls(source, **settings)  # type: ignore[arg-type]

    def with_cache(
        self, *, max_length: int | None = None, spare: int = SPARE_ROWS, up_front: bool = False
    ) -> CachedModel:
        """The same compiled step with a cache of its own, empty and perhaps of another layout; see the class."""
        other = copy(self)
        limits = [limit for limit in (max_length, self._limit) if limit is not None]
        other.max_length, other._spare, other._up_front = min(limits, default=None), spare, up_front
        other.cache, other._encoded = other._new_cache(1), Encoded()
        return other

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
    def exact_rows(self) -> int | None:
        """See `RowExact`: products in bfloat16 or int8 are other ones beyond 16 rows."""
        executable = self.compiled().executable
        return None if executable is None or executable.precision == "f32" else FEW_ROWS

    @property
    def length(self) -> int:
        """Positions cached of the longest sequence."""
        return self.cache.length

    def compiled(self, *, is_tree: bool = False) -> Compiled:
        """The compiled step, with its report."""
        if is_tree not in self._steps:
            step, self._steps[is_tree] = self._source.compiled(is_tree=is_tree)
            self._chooses[is_tree] = step.chooses
        return self._steps[is_tree]

    def prefill(self, prompts: Sequence[Sequence[int]] | Tensor, **encoder_inputs: Tensor) -> Tensor:
        """Start over with B prompts of at least one token: logits [B, V] of the last token of each.

        encoder_inputs: the sources of B texts, by the names of the model's inputs; the encoder runs once for them.
        Without any the sources of the prefill before stay.  Errors as for `step`; what was before is kept then.
        """
        rows = check_prompts(prompts, self._known_tokens())
        before, encoded_before = self.cache, self._encoded
        self._encoded = self._encode(encoder_inputs, len(rows))
        self.cache = self._new_cache(len(rows))
        try:
            self.cache.check_room([row.shape[0] for row in rows])
            parts = [self._feed_alone(rows, first, last) for first, last in _runs(rows)]
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
            self.cache.settle()
            return logits
        except BaseException:
            self.cache, self._encoded = before, encoded_before
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
        request = self._request(ids, counts, parents, logits_for)
        if request.rows <= CHUNK or request.parents is not None:
            return self._run(request)[0]
        before = self.cache
        self.cache = before.fork()
        try:
            return self._feed(request)
        except BaseException:
            self.cache = before
            raise

    def choose(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Choices:
        """As `step`, with the greatest logit and its token of every row that `step` would give the logits of.

        No logits are stored where the output head can search its products; the choices are the same bits anyway.
        """
        request = self._request(ids, counts, parents, logits_for)
        is_tree = request.parents is not None
        self.compiled(is_tree=is_tree)
        if request.rows > CHUNK or not self._chooses[is_tree]:
            return choices_of(self.step(ids, counts=counts, parents=parents, logits_for=logits_for))
        return self._run(request, is_choice=True)[1]

    def _request(
        self,
        ids: Tensor,
        counts: Sequence[int] | None,
        parents: Sequence[int] | None,
        logits_for: LogitsFor,
    ) -> StepRequest:
        """A step that was asked for, checked against what is cached."""
        request = read_request(ids, counts, parents, logits_for, self._known_tokens())
        self.cache.check_room(request.counts)
        self._check_encoded(self._encoded, self.cache.batch)
        return request

    def truncate(self, length: int | Sequence[int]) -> tuple[int, ...]:
        """Roll back to `length` positions; returns how many went, per sequence. CacheError where that is impossible."""
        return self.cache.truncate(length)

    def keep(self, rows: Sequence[int]) -> None:
        """After a step with parents: keep these new rows, a path from the root, as the next positions."""
        self.cache.keep(rows)

    def _encode(self, inputs: Mapping[str, Tensor], batch: int) -> Encoded:
        """What the steps of `batch` texts read of the encoder."""
        if inputs and self.encoder is None:
            raise DecodingError(f"the model reads tokens alone; it has no input {', '.join(inputs)}")
        if inputs and self.encoder is not None:
            return self.encoder.run(inputs, batch)
        self._check_encoded(self._encoded, batch)
        return self._encoded

    def _check_encoded(self, encoded: Encoded, batch: int) -> None:
        """DecodingError where the model has an encoder and `encoded` is not of `batch` sources."""
        if self.encoder is not None and encoded.batch != batch:
            names = ", ".join(f"{name}=..." for name in self.encoder.inputs)
            raise DecodingError(
                f"{batch} texts and {encoded.batch} encoded sources: begin with prefill(prompts, {names})"
            )

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
        parts = [self._run(part, first, last)[0] for part in request.chunks(CHUNK)]
        return request.gather(parts, CHUNK)

    def _run(
        self, request: StepRequest, first: int = 0, last: int | None = None, *, is_choice: bool = False
    ) -> tuple[Tensor, Choices]:
        """One call of the compiled step for sequences `first` to `last`: logits [B, n, V], or choices [B, n]; the other
        is of no rows."""
        cache = self.cache
        is_tree = request.parents is not None
        compiled = self.compiled(is_tree=is_tree)
        here = range(cache.batch)[first:last]
        rows, counts = [0] * cache.batch, [0] * cache.batch
        for sequence, count in zip(here, request.counts, strict=True):
            rows[sequence], counts[sequence] = request.rows, count
        cache.settle()
        cache.reserve(rows)
        cache.will_write(rows)
        try:
            prepared = None
            if request.rows <= GUESSES and not is_tree and len(here) == cache.batch:
                prepared = self._prepared(compiled, request, is_choice)
            logits, *found = (
                self._call(compiled, request, is_choice, first, last)
                if prepared is None
                else prepared(request, cache.lengths, self.max_length)
            )
            cache.advance(counts, request.parents)
        except BaseException:
            cache.settle()
            raise
        if request.rows > GUESSES:
            cache.settle()
        assert isinstance(logits, Tensor)
        if is_choice:
            shape = len(here), request.wanted.shape[1]
            scores, best = found
            assert isinstance(scores, Tensor) and isinstance(best, Tensor)
            return logits, Choices(scores.reshape(shape), best.reshape(shape))
        return logits if len(here) == 1 else logits.reshape(len(here), -1, self.vocab_size), NO_CHOICES

    def _prepared(self, compiled: Compiled, request: StepRequest, is_choice: bool) -> PreparedStep | None:
        """The inputs and the call for requests of this shape with the cache where it is; None where the step does not
        prepare calls."""
        cache, chosen = self.cache, is_choice if self._chooses[False] else None
        key = (id(compiled), request.rows, request.wanted.shape[1], chosen)
        known: tuple[Compiled, PreparedStep | None] | None = cache.calls.get(key)  # type: ignore[assignment]
        if known is None:
            if len(cache.calls) >= PREPARED_STEPS:
                cache.calls.clear()
            inputs, tensors = StepInputs(cache.batch, *key[1:]), cache.tensors()
            call = compiled.prepare(*inputs.tensors, *self._encoded.part(0, None), *tensors)
            step = None if call is None else PreparedStep(inputs, call, len(tensors))
            known = cache.calls[key] = compiled, step  # the first, so that its id stays its own
        return known[1]

    def _call(
        self, compiled: Compiled, request: StepRequest, is_choice: bool, first: int, last: int | None
    ) -> Sequence[object]:
        """One call with new tensors for this request: logits, and what the step found beside them."""
        cache = self.cache
        tensors = cache.tensors(first, last)
        encoded = self._encoded.part(first, last)
        inputs = list(request.inputs(cache.lengths[first:last], self.max_length))
        if self._chooses[request.parents is not None]:
            inputs[3:4] = [NO_ROWS, inputs[3]] if is_choice else [inputs[3], NO_ROWS]
        results: list[Any] = list(compiled(*inputs, *encoded, *tensors))
        written = results[1 : 1 + len(tensors)]
        if not all(map(is_, tensors, written)):
            _keep_written(tensors, written)
        return [results[0], *results[1 + len(tensors) :]]


def _keep_written(tensors: Sequence[Tensor], written: Sequence[object]) -> None:
    """What a step that runs eagerly gives are copies."""
    for held, result in zip(tensors, written, strict=True):
        assert isinstance(result, Tensor)
        if result.data_ptr() != held.data_ptr():
            held.copy_(result)


def _runs(rows: list[Tensor]) -> Iterator[tuple[int, int]]:
    """Bounds of neighbours of equal length: they run together, without padding."""
    first = 0
    for last in range(1, len(rows) + 1):
        if last == len(rows) or rows[last].shape != rows[first].shape:
            yield first, last
            first = last
