"""A model that compares the bits of its logits, row by row, with those that plain decoding gave behind the same text.

    known = {}
    plain = generate(WatchedModel(model, known, record=True), prompt)     remembers a digest per text
    generate(WatchedModel(other, known), prompt, proposer=...)            raises BitsDiffer at the first other bit

It keeps what the cache keeps, as tokens: so it knows behind which text every row stands, in a chain, a tree or a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.decoding.step_model import LogitsFor, StepModel

Text = tuple[int, ...]


class BitsDiffer(Exception):
    """Logits [V] behind `text` that are not those of plain decoding."""

    def __init__(self, text: Text, logits: Tensor) -> None:
        super().__init__(f"the logits behind {len(text)} tokens are not those of plain decoding")
        self.text, self.logits = text, logits


class WatchedModel:
    """See `StepModel`. known: a digest per text; with `record` new ones are added, without it they are passed over.

    compared: rows so far that `known` had a digest for.
    """

    def __init__(self, model: StepModel, known: dict[Text, bytes], *, record: bool = False) -> None:
        self.model, self.known, self.record = model, known, record
        self.compared = 0
        self._texts: list[list[int]] = []
        self._parents: list[int] | None = None  # of the newest rows, while they are a tree

    @property
    def vocab_size(self) -> int:
        """See `StepModel`."""
        return self.model.vocab_size

    @property
    def max_length(self) -> int | None:
        """See `StepModel`."""
        return self.model.max_length

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `StepModel`."""
        return self.model.lengths

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `StepModel`."""
        logits = self.model.prefill(prompts)
        self._texts, self._parents = [list(prompt) for prompt in prompts], None
        for text, row in zip(self._texts, logits, strict=True):
            self._look(tuple(text), row)
        return logits

    def step(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Tensor:
        """See `StepModel`."""
        logits = self.model.step(ids, counts=counts, parents=parents, logits_for=logits_for)
        real = [ids.shape[1]] * len(self._texts) if counts is None else list(counts)
        for text, row_ids, count, found in zip(self._texts, ids.tolist(), real, logits, strict=True):
            rows = _chosen(logits_for, ids.shape[1], count)
            for row, row_logits in zip(rows, found, strict=True):
                if 0 <= row < count:
                    path = _path(row, parents)
                    self._look((*text, *(row_ids[place] for place in path)), row_logits)
            text.extend(row_ids[:count])
        self._parents = None if parents is None else list(parents)
        return logits

    def truncate(self, length: int | Sequence[int]) -> tuple[int, ...]:
        """See `StepModel`."""
        removed = self.model.truncate(length)
        for text, count in zip(self._texts, removed, strict=True):
            del text[len(text) - count :]
        return removed

    def keep(self, rows: Sequence[int]) -> None:
        """See `StepModel`."""
        self.model.keep(rows)
        assert self._parents is not None, "the model would have refused"
        (text,) = self._texts
        start = len(text) - len(self._parents)
        text[start:] = [text[start + row] for row in rows]

    def _look(self, text: Text, logits: Tensor) -> None:
        expected = self.known.get(text)
        if expected is None:
            if self.record:
                self.known[text] = digest(logits)
            return
        self.compared += 1
        if digest(logits) != expected:
            raise BitsDiffer(text, logits.clone())


def digest(logits: Tensor) -> bytes:
    """Sixteen bytes that tell the bits of logits [V] apart."""
    return hashlib.blake2b(logits.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


def _chosen(logits_for: LogitsFor, rows: int, count: int) -> Sequence[int]:
    if logits_for == "last":
        return [count - 1]
    return range(rows) if logits_for == "all" else [int(row) for row in logits_for]


def _path(row: int, parents: Sequence[int] | None) -> list[int]:
    """Numbers of the rows from the root to `row`."""
    if parents is None:
        return list(range(row + 1))
    path: list[int] = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path[::-1]
