"""A StepModel without a cache: every step runs the model over the whole text again.

    model = RecomputeModel(lambda ids: gpt(input_ids=ids).logits, vocab_size=50257)
    print(generate(model, tokens).tokens)

Cost grows with the square of the length. It takes any causal model as it is, also one from which no cache can be
derived, and it is what a derived cache is compared with. Rows are the same bits in every call only if the model's own
kernels see to that; torch's do not promise it, so near-ties may fall either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.decoding.cache import CacheError
from torchweld.decoding.greedy import LogitsModel
from torchweld.decoding.step_model import DecodingError, LogitsFor


class RecomputeModel:
    """See `StepModel`. forward: ids int64 [1, S] -> logits [1, S, V]; vocab_size: V, checked at every call."""

    def __init__(self, forward: LogitsModel, vocab_size: int, max_length: int | None = None) -> None:
        self.vocab_size, self.max_length = vocab_size, max_length
        self._forward = forward
        self._texts: list[list[int]] = []
        self._tree: tuple[list[int], list[int]] | None = None  # tokens and parents, until keep or truncate

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `StepModel`."""
        extra = len(self._tree[0]) if self._tree else 0
        return tuple(len(text) + extra for text in self._texts)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `StepModel`."""
        if not prompts or not all(prompts):
            raise DecodingError(
                "a prompt has no tokens; expected at least one prompt, of at least one token each"
            )
        for prompt in prompts:
            self._check_tokens(prompt)
            self._check_room(0, len(prompt))
        logits = torch.stack([self._run(list(prompt))[-1] for prompt in prompts])
        self._texts, self._tree = [list(prompt) for prompt in prompts], None
        return logits

    def step(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Tensor:
        """See `StepModel`. Raises CacheError for another batch, beyond the limit, and behind a tree not yet pruned."""
        rows = self._rows(ids, counts)
        if parents is not None:
            return self._tree_step(rows, list(parents), counts, logits_for)
        results = [
            self._run([*text, *new])[len(text) :] if new else torch.zeros(0, self.vocab_size)
            for text, new in zip(self._texts, rows, strict=True)
        ]
        picked = [_pick(result, ids.shape[1], logits_for) for result in results]
        for text, new in zip(self._texts, rows, strict=True):
            text.extend(new)
        return torch.stack(picked)

    def truncate(self, length: int | Sequence[int]) -> tuple[int, ...]:
        """See `StepModel`."""
        before = self.lengths
        wanted = [length] * len(before) if isinstance(length, int) else list(length)
        if len(wanted) != len(before):
            raise CacheError(f"{len(wanted)} lengths for {len(before)} sequences; expected one each")
        for have, wish in zip(before, wanted, strict=True):
            if not 0 <= wish <= have:
                raise CacheError(f"cannot truncate {have} positions to {wish}: expected 0 to {have}")
        if self._tree and wanted[0] > len(self._texts[0]) and wanted[0] != before[0]:
            raise CacheError("cannot truncate inside a tree: keep one of its paths, or truncate to before it")
        if wanted != list(before):
            self._tree = None
        for text, wish in zip(self._texts, wanted, strict=True):
            del text[wish:]
        return tuple(have - wish for have, wish in zip(before, wanted, strict=True))

    def keep(self, rows: Sequence[int]) -> None:
        """See `StepModel`."""
        if self._tree is None:
            raise CacheError("there is no tree to keep rows of; keep comes right after a step with parents")
        tokens, parents = self._tree
        path = [-1, *rows]
        for before, row in zip(path, rows, strict=False):
            if not 0 <= row < len(tokens) or parents[row] != before:
                raise CacheError(
                    f"rows {list(rows)} are no path from the root: row {row} does not follow row {before}"
                )
        self._texts[0].extend(tokens[row] for row in rows)
        self._tree = None

    def _tree_step(
        self, rows: list[list[int]], parents: list[int], counts: Sequence[int] | None, logits_for: LogitsFor
    ) -> Tensor:
        """Every row by a run over its own path."""
        if len(rows) != 1 or counts is not None or len(parents) != len(rows[0]):
            raise CacheError("a tree needs one sequence, no counts, and a parent for every row")
        if any(not -1 <= parent < row for row, parent in enumerate(parents)):
            raise CacheError(f"parents {parents}: each must be -1 or a smaller row number")
        tokens = rows[0]
        paths: list[list[int]] = []
        for token, parent in zip(tokens, parents, strict=True):
            paths.append([*(paths[parent] if parent >= 0 else []), token])
        logits = torch.stack([self._run([*self._texts[0], *path])[-1] for path in paths])
        picked = _pick(logits, len(tokens), logits_for)
        self._tree = tokens, parents
        return picked[None]

    def _rows(self, ids: Tensor, counts: Sequence[int] | None) -> list[list[int]]:
        """The real tokens of every sequence, checked."""
        if ids.dim() != 2 or ids.shape[1] == 0 or ids.dtype != torch.int64:
            raise DecodingError(
                f"the tokens are {ids.dtype} {tuple(ids.shape)}; expected int64 [B, T] with T >= 1"
            )
        if self._tree is not None:
            raise CacheError(
                "the last step was a tree: keep one of its paths, or truncate it, before the next step"
            )
        batch, count = ids.shape
        counts = [count] * batch if counts is None else list(counts)
        if not batch == len(counts) == len(self._texts):
            raise CacheError(
                f"{batch} rows of tokens and {len(counts)} counts for {len(self._texts)} sequences"
            )
        rows = []
        for row, real, text in zip(ids.tolist(), counts, self._texts, strict=True):
            if not 0 <= real <= count:
                raise CacheError(f"counts {counts}; expected 0 to {count}")
            self._check_tokens(row[:real])
            self._check_room(len(text), real)
            rows.append(row[:real])
        return rows

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise IndexError(f"token {token} is out of range: expected 0 to {self.vocab_size - 1}")

    def _check_room(self, length: int, new: int) -> None:
        if self.max_length is not None and length + new > self.max_length:
            raise CacheError(
                f"{length} positions and {new} new ones are more than the limit of {self.max_length}"
            )

    @torch.inference_mode()
    def _run(self, tokens: list[int]) -> Tensor:
        """Logits [S, V] of a whole text."""
        logits = self._forward(torch.tensor([tokens]))
        if logits.shape != (1, len(tokens), self.vocab_size):
            expected = (1, len(tokens), self.vocab_size)
            raise DecodingError(f"the model gave logits {tuple(logits.shape)}; expected {expected}")
        return logits[0]


def _pick(logits: Tensor, count: int, logits_for: LogitsFor) -> Tensor:
    """Of logits [real rows, V] those asked for; rows of padding hold zeros."""
    padded = torch.cat([logits, logits.new_zeros(count - logits.shape[0], logits.shape[1])])
    if logits_for == "all":
        return padded
    if logits_for == "last":
        last = max(0, logits.shape[0] - 1)
        return padded[last : last + 1]
    return padded[list(map(int, logits_for))]
