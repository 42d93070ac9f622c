"""A StepModel that also shows the hidden states behind its logits, for proposers that guess from them.

    model = HiddenModel.from_program(capture(llama, (ids,)))
    logits = model.prefill([prompt])     # [1, V], as from any StepModel
    model.hidden                         # [1, 1, d]: of the row that gave them

The model underneath returns logits and hidden state in one row (passes/expose_hidden.py); here they part.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchweld.decoding.cached import CachedModel, NotDecodable, normalised
from torchweld.decoding.step_model import DecodingError, Fingerprinted, LogitsFor, RowExact, StepModel
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal
from torchweld.optimizer.compile import Compiled, Options
from torchweld.passes.expose_hidden import expose_hidden


class HiddenModel:
    """See `StepModel`. step: a model whose rows are V logits and then `features` numbers of hidden state.

    head: the program from hidden state to logits, where there is one; proposers share it.
    """

    def __init__(self, step: StepModel, features: int, head: Program | None = None) -> None:
        if not 0 < features < step.vocab_size:
            raise ValueError(
                f"{features} hidden features in rows of {step.vocab_size}; expected fewer, above 0"
            )
        self.vocab_size = step.vocab_size - features
        self.features, self.head = features, head
        self._step = step
        self._hidden: Tensor | None = None

    @classmethod
    def from_program(
        cls, program: Program, *, options: Options | None = None, max_length: int | None = None
    ) -> HiddenModel:
        """Derive cache and hidden states from a captured program. Raises NotDecodable."""
        exposed = expose_hidden(normalised(program))
        if isinstance(exposed, Refusal):
            raise NotDecodable(program.name, exposed)
        step = CachedModel(exposed.program, options=options, max_length=max_length)
        return cls(step, exposed.features, exposed.head)

    @property
    def max_length(self) -> int | None:
        """See `StepModel`."""
        return self._step.max_length

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `StepModel`."""
        return self._step.lengths

    @property
    def fingerprint(self) -> str | None:
        """See `Fingerprinted`."""
        return self._step.fingerprint if isinstance(self._step, Fingerprinted) else None

    @property
    def exact_rows(self) -> int | None:
        """See `RowExact`."""
        return self._step.exact_rows if isinstance(self._step, RowExact) else None

    def compiled(self, *, is_tree: bool = False) -> Compiled:
        """The compiled step underneath, with its report. DecodingError where nothing compiled it."""
        if not isinstance(self._step, CachedModel):
            raise DecodingError(
                f"the step is a {type(self._step).__name__}; expected a CachedModel, which is compiled"
            )
        return self._step.compiled(is_tree=is_tree)

    @property
    def hidden(self) -> Tensor:
        """[B, R, d], of the R rows whose logits the last call returned (R = 1 for prefill)."""
        if self._hidden is None:
            raise DecodingError("there is no hidden state before the first prefill")
        return self._hidden

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `StepModel`."""
        rows = self._step.prefill(prompts)
        self._hidden = rows[:, None, self.vocab_size :]
        return rows[:, : self.vocab_size]

    def step(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Tensor:
        """See `StepModel`."""
        rows = self._step.step(ids, counts=counts, parents=parents, logits_for=logits_for)
        self._hidden = rows[..., self.vocab_size :]
        return rows[..., : self.vocab_size]

    def truncate(self, length: int | Sequence[int]) -> tuple[int, ...]:
        """See `StepModel`."""
        return self._step.truncate(length)

    def keep(self, rows: Sequence[int]) -> None:
        """See `StepModel`."""
        self._step.keep(rows)
