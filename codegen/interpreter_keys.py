"""Which keys of a cache a row sees, and where they are: a cached Attend (graph/terms.py) on whole tensors.

The keys are numbered: number e is position e of the text before the call, or new row e - past behind it; its slot is
e mod capacity either way.  All tensors have the rank of the interpreter's frame, with extent 1 where nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyDims:
    """The dimensions of the frame for batch entries, queries, keys, and (in a tree) the steps of a path."""

    batch: int
    query: int
    key: int
    step: int


@dataclass(frozen=True)
class NumberedKeys:
    """Per numbered key: its slot, its position for a query, and whether the query sees it."""

    slot: Tensor
    position: Tensor
    visible: Tensor


def number_keys(
    number: Tensor, past: Tensor, query: Tensor, path: Tensor | None, rows: int, capacity: int, window: int,
    dims: KeyDims,
) -> NumberedKeys:  # fmt: skip
    """The keys `number` (int64 along the keys) of a call with `rows` new rows.

    past: int64 per batch entry.  query: the numbers of the queries.  path: as in torchweld::cached_attention, along its
    steps; None without a tree.  window 0 stands for none.
    """
    row = number - past  # which new row, where it is not negative
    position, place = number, query + past
    visible = row < rows
    if path is not None:
        depth = (path >= 0).sum(dims.step, keepdim=True) - 1
        place = past + depth
        position = torch.where(row < 0, number, past + _of_rows(depth, row, dims))
        visible = visible & ((row < 0) | (path == row).any(dims.step, keepdim=True))
    visible = visible & (position <= place)
    if window:
        visible = visible & (position > place - window)
    return NumberedKeys(torch.remainder(number, max(capacity, 1)), position, visible)


def _of_rows(per_query: Tensor, row: Tensor, dims: KeyDims) -> Tensor:
    """Of a value per batch entry and query, the one of query `row` (a tensor along batch and keys)."""
    values = per_query.movedim((dims.batch, dims.query), (0, 1)).flatten(1)
    wanted = row.movedim((dims.batch, dims.key), (0, 1)).flatten(1)
    if values.shape[1] == 0 or wanted.shape[1] == 0:
        return torch.zeros_like(row)
    entries = max(len(values), len(wanted))
    found = values.expand(entries, -1).gather(1, wanted.clamp(0, values.shape[1] - 1).expand(entries, -1))
    shape = [1] * row.dim()
    shape[dims.batch], shape[dims.key] = found.shape
    return found.reshape(shape)
