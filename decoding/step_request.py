"""What a step was asked for, checked, and turned into the inputs of a step program.

    request = read_request(ids, counts, parents, logits_for, tokens=49152)
    compiled(*request.inputs(lengths=(7, 3), limit=2048), *caches)

Nothing here depends on what is cached but `inputs`, so every mistake is found before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from torchweld.decoding.greedy import DecodingError
from torchweld.decoding.step_model import LogitsFor


@dataclass(frozen=True)
class StepRequest:
    """ids [B, T], how many rows of each sequence are real, the tree, and which rows of each sequence get logits."""

    ids: Tensor
    counts: tuple[int, ...]
    parents: tuple[int, ...] | None
    wanted: Tensor
    """int64 [B, n]: numbers of rows; nobody writes to it."""
    tokens: list[list[int]]
    """What is in `ids`."""

    @property
    def rows(self) -> int:
        """T."""
        return self.ids.shape[1]

    def inputs(self, lengths: Sequence[int], limit: int | None) -> tuple[Tensor, ...]:
        """ids, past, positions, rows and, for a tree, path: the inputs of a step program in front of the caches.

        lengths: positions cached of each sequence.  limit: positions that the model has; padding stays below it.
        """
        past, chosen = torch.tensor(lengths, dtype=torch.int64), self.flat_rows()
        if self.parents is not None:
            path = ancestors(self.parents)
            depth = (path >= 0).sum(1) - 1
            return self.ids, past, (past[:, None] + depth), chosen, path[None]
        return self.ids, past, torch.tensor(self.positions(lengths, limit), dtype=torch.int64), chosen

    def positions(self, lengths: Sequence[int], limit: int | None) -> list[list[int]]:
        """[B, T]: the position of every row that is no path of a tree; padding has the last one."""
        rows = []
        for length, real in zip(lengths, self.counts, strict=True):
            last = max(length + real - 1, 0)
            if limit is not None and last >= limit:
                last = limit - 1
            row = list(range(length, min(length + self.rows, last + 1)))
            rows.append(row + [last] * (self.rows - len(row)))
        return rows

    def flat_rows(self) -> Tensor:
        """int64 [B n]: `wanted` among the rows of all sequences."""
        batch, count = self.ids.shape
        if batch == 1:
            return self.wanted.flatten()
        return (self.wanted + torch.arange(batch)[:, None] * count).flatten()

    def chunks(self, size: int) -> Iterator[StepRequest]:
        """The same rows in requests of at most `size` rows, each asking for all rows or its last."""
        for start in range(0, self.rows, size):
            ids = self.ids[:, start : start + size]
            counts = tuple(min(max(count - start, 0), ids.shape[1]) for count in self.counts)
            inside = (self.wanted >= start) & (self.wanted < start + size)
            everything = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
            # Every sequence gets equally many logits per call: the last row where one is enough, else all.
            few = int(inside.sum(1).max()) <= 1
            wanted = (self.wanted - start).where(inside, 0).amax(1, keepdim=True) if few else everything
            tokens = [row[start : start + size] for row in self.tokens]
            yield replace(self, ids=ids.contiguous(), counts=counts, wanted=wanted, tokens=tokens)

    def gather(self, parts: Sequence[Tensor], size: int) -> Tensor:
        """The logits [B, n, V] of `wanted` from those of the `chunks`."""
        if len(parts) == 1 and parts[0].shape[1] == self.wanted.shape[1] == 1:
            return parts[0]
        results = []
        for sequence, rows in enumerate(self.wanted.tolist()):
            picked = [
                part[sequence, 0 if part.shape[1] == 1 else row % size]
                for row in rows
                for part in (parts[row // size],)
            ]
            results.append(torch.stack(picked))
        return torch.stack(results)


def read_request(
    ids: Tensor,
    counts: Sequence[int] | None,
    parents: Sequence[int] | None,
    logits_for: LogitsFor,
    tokens: int,
) -> StepRequest:
    """Check the arguments of a step; `tokens`: how many tokens the model knows.

    Raises DecodingError for what does not fit, IndexError for a token out of range.
    """
    if ids.dim() != 2 or 0 in ids.shape or ids.dtype != torch.int64:
        raise DecodingError(
            f"the tokens are {ids.dtype} {tuple(ids.shape)}; expected int64 [B, T] with T >= 1"
        )
    batch, rows = ids.shape
    real = (rows,) * batch if counts is None else tuple([int(count) for count in counts])
    if len(real) != batch or not all(0 <= count <= rows for count in real):
        raise DecodingError(
            f"counts {list(real)} for ids {tuple(ids.shape)}: expected {batch} numbers of 0 to {rows}"
        )
    tree = None if parents is None else _check_tree(tuple(parents), batch, rows, real)
    clean = ids.contiguous()
    if min(real) < rows:
        clean = ids.masked_fill(torch.arange(rows) >= torch.tensor(real)[:, None], 0)
    given = check_tokens(clean, tokens)
    return StepRequest(clean, real, tree, _wanted(logits_for, batch, rows, real), given)


def check_prompts(prompts: Sequence[Sequence[int]] | Tensor, tokens: int) -> list[Tensor]:
    """Prompts as int64 [S] each. Raises DecodingError for none and for an empty one, IndexError out of range."""
    if isinstance(prompts, Tensor) and (prompts.dim() != 2 or prompts.dtype != torch.int64):
        given = f"{prompts.dtype} {tuple(prompts.shape)}"
        raise DecodingError(f"the prompts are {given}; expected int64 [B, S], or lists of tokens")
    rows = [torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts]
    if not rows or any(row.dim() != 1 or row.numel() == 0 for row in rows):
        sizes = [tuple(row.shape) for row in rows]
        raise DecodingError(
            f"{len(rows)} prompts of shapes {sizes}; expected at least one, each of one token or more"
        )
    for sequence, row in enumerate(rows):
        check_tokens(row[None], tokens, sequence)
    return rows


def check_tokens(ids: Tensor, tokens: int, first: int = 0) -> list[list[int]]:
    """The numbers of ids [B, T]. IndexError where one is not 0 to `tokens` - 1."""
    given: list[list[int]] = ids.tolist()
    if min(map(min, given)) >= 0 and max(map(max, given)) < tokens:
        return given
    sequence, row = ((ids < 0) | (ids >= tokens)).nonzero()[0].tolist()
    where = f"token {int(ids[sequence, row])} (row {row} of sequence {first + sequence})"
    raise IndexError(f"{where} is outside the model's table of {tokens} tokens; expected 0 to {tokens - 1}")


def ancestors(parents: Sequence[int]) -> Tensor:
    """path int64 [T, T]: path[t, i] is the ancestor of row t at depth i, itself at its own depth, -1 beyond."""
    path = torch.full((len(parents), len(parents)), -1, dtype=torch.int64)
    depths: list[int] = []
    for row, parent in enumerate(parents):
        depth = depths[parent] + 1 if parent >= 0 else 0
        depths.append(depth)
        if depth:
            path[row, :depth] = path[parent, :depth]
        path[row, depth] = row
    return path


def _check_tree(parents: tuple[int, ...], batch: int, rows: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    if batch != 1 or counts[0] != rows:
        raise DecodingError(
            f"a tree of rows is for one sequence without padding; got {batch} and counts {list(counts)}"
        )
    if len(parents) != rows or not all(-1 <= parent < row for row, parent in enumerate(parents)):
        expected = f"{rows} numbers, each -1 or that of an earlier row"
        raise DecodingError(f"parents {list(parents)} for {rows} rows; expected {expected}")
    return parents


def _wanted(logits_for: LogitsFor, batch: int, rows: int, counts: tuple[int, ...]) -> Tensor:
    """Numbers of the rows that get logits, int64 [B, n]."""
    if isinstance(logits_for, str) and logits_for in ("last", "all"):
        return _named_rows(logits_for, batch, rows, counts)
    if isinstance(logits_for, str) or not len(logits_for) or not all(0 <= row < rows for row in logits_for):
        given = repr(logits_for) if isinstance(logits_for, str) else list(logits_for)
        raise DecodingError(
            f"logits_for={given}: expected 'last', 'all', or at least one number of 0 to {rows - 1}"
        )
    return torch.tensor(tuple(logits_for)).expand(batch, -1)


@lru_cache(maxsize=64)
def _named_rows(logits_for: str, batch: int, rows: int, counts: tuple[int, ...]) -> Tensor:
    """The last real row of each sequence ("last"), or all rows; nobody writes to the result."""
    if logits_for == "last":
        return torch.tensor(counts)[:, None].clamp(min=1) - 1
    return torch.arange(rows).expand(batch, -1)
