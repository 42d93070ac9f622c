"""torchweld::cached_rows and torchweld::cached_cumsum: what a causal convolution and a running sum keep of the past.

cached_rows(cache, past, positions, path, taps, dilation)
    shapes:   cache [B, 1, C, F] that holds the new rows already, past int64 [B], positions int64 [B, T]
              -> [B, T, taps, F]
    formula:  tap i of row t is the row of position  positions[b, t] - (taps - 1 - i) * dilation,  and 0 before
              position 0.  The last tap is the row itself.  C >= (taps - 1) * dilation + T.

cached_cumsum(cache, rows, past, path)
    shapes:   cache [B, 1, C, F] of sums as they were before the new rows, rows [B, 1, T, F] -> [B, 1, T, F], the sums
              at the new rows.  C >= T + 1 once they are appended.
    formula:  y[t] = y[the row before t] + rows[t];  in front of position 0 stands 0
    numerics: added one position after the other in the dtype of the cache, so that a sum has the same bits however
              many rows come at once.

past, path and slots are those of cached_attention.py: position j lies in slot j % C if j < past[b], else in slot
(past[b] + i) % C of its new row i, which is j - past[b], or path[b, t, j - past[b]] in a tree.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

SUMMED: Final = (torch.float32, torch.float64, torch.int64)
_ROWS_SCHEMA = "(Tensor cache, Tensor past, Tensor positions, Tensor? path, int taps, int dilation) -> Tensor"
_CUMSUM_SCHEMA = "(Tensor cache, Tensor rows, Tensor past, Tensor? path) -> Tensor"


def _check_places(name: str, cache: Tensor, past: Tensor, path: Tensor | None) -> None:
    if cache.dim() != 4 or cache.shape[1] != 1:
        raise ValueError(f"{name}: the cache is {tuple(cache.shape)}, expected [B, 1, C, F]")
    if past.dim() != 1 or past.dtype != torch.int64:
        raise ValueError(f"{name}: past is {past.dtype} of rank {past.dim()}; expected int64 [B]")
    if path is not None and (path.dim() != 3 or path.dtype != torch.int64):
        raise ValueError(f"{name}: path is {path.dtype} of rank {path.dim()}; expected int64 [B, T, T]")


def _check_rows(
    cache: Tensor, past: Tensor, positions: Tensor, path: Tensor | None, taps: int, dilation: int
) -> None:
    """Raise ValueError naming the argument that breaks the contract of the module docstring."""
    name = "torchweld::cached_rows"
    _check_places(name, cache, past, path)
    if positions.dim() != 2 or positions.dtype != torch.int64:
        given = f"{positions.dtype} of rank {positions.dim()}"
        raise ValueError(f"{name}: positions are {given}; expected int64 [B, T]")
    if taps < 1 or dilation < 1:
        raise ValueError(f"{name}: {taps} taps with dilation {dilation}; expected at least 1 of both")


def _slots(wanted: Tensor, past: Tensor, path: Tensor | None, capacity: int) -> Tensor:
    """The slots of positions [B, T, n] that rows see, int64 [B, T, n]; any slot for a position before 0."""
    new = wanted - past[:, None, None]
    row = new.clamp(min=0)
    if path is not None:
        row = path.gather(2, row.clamp(max=path.shape[2] - 1))
    return torch.where(new < 0, wanted, past[:, None, None] + row) % capacity


def cached_rows_reference(
    cache: Tensor, past: Tensor, positions: Tensor, path: Tensor | None, taps: int, dilation: int
) -> Tensor:
    """Plain-torch meaning of torchweld::cached_rows."""
    _check_rows(cache, past, positions, path, taps, dilation)
    back = torch.arange(taps - 1, -1, -1, device=past.device) * dilation
    wanted = positions[:, :, None] - back
    slots = _slots(wanted, past, path, cache.shape[2])
    sequences = torch.arange(cache.shape[0], device=past.device)[:, None, None]
    rows = cache[sequences, 0, slots]
    return torch.where(wanted[..., None] >= 0, rows, torch.zeros((), dtype=cache.dtype, device=cache.device))


@torch.library.custom_op("torchweld::cached_rows", mutates_args=(), schema=_ROWS_SCHEMA)
def cached_rows(
    cache: Tensor, past: Tensor, positions: Tensor, path: Tensor | None, taps: int, dilation: int
) -> Tensor:
    """Rows [B, T, taps, F] that a convolution reads; see the module docstring. Raises ValueError on bad arguments."""
    return cached_rows_reference(cache, past, positions, path, taps, dilation)


@cached_rows.register_fake
def _(
    cache: Tensor, past: Tensor, positions: Tensor, path: Tensor | None, taps: int, dilation: int
) -> Tensor:
    _check_rows(cache, past, positions, path, taps, dilation)
    return cache.new_empty((positions.shape[0], positions.shape[1], taps, cache.shape[3]))


def _check_cumsum(cache: Tensor, rows: Tensor, past: Tensor, path: Tensor | None) -> None:
    """Raise ValueError naming the argument that breaks the contract of the module docstring."""
    name = "torchweld::cached_cumsum"
    _check_places(name, cache, past, path)
    if rows.dim() != 4 or rows.shape[1] != 1 or rows.shape[3] != cache.shape[3]:
        shapes = f"{tuple(rows.shape)} for a cache {tuple(cache.shape)}"
        raise ValueError(f"{name}: rows {shapes}; expected [B, 1, T, F]")
    if rows.dtype != cache.dtype or cache.dtype not in SUMMED:
        names = ", ".join(map(str, SUMMED))
        raise ValueError(
            f"{name}: rows {rows.dtype} for a cache {cache.dtype}; expected one dtype of {names}"
        )


def cached_cumsum_reference(cache: Tensor, rows: Tensor, past: Tensor, path: Tensor | None) -> Tensor:
    """Plain-torch meaning of torchweld::cached_cumsum: row after row, all sequences at once."""
    _check_cumsum(cache, rows, past, path)
    sequences = torch.arange(cache.shape[0], device=past.device)
    before = cache[sequences, 0, (past - 1) % max(cache.shape[2], 1)] if cache.shape[2] else rows[:, 0, 0]
    start = torch.where(past[:, None] > 0, before, torch.zeros_like(before))
    sums = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for row in range(rows.shape[2]):
        above = start if row == 0 else sums[:, 0, row - 1]
        if path is not None:
            parent = _parents(path[:, row])
            above = torch.where(parent[:, None] >= 0, sums[sequences, 0, parent.clamp(min=0)], start)
        torch.add(above, rows[:, 0, row], out=sums[:, 0, row])
    return sums


def _parents(path: Tensor) -> Tensor:
    """The new row before one whose path [B, T] from the root is given; -1 for a root."""
    depth = (path >= 0).sum(1) - 1
    parent = path.gather(1, (depth - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(depth > 0, parent, -1)


@torch.library.custom_op("torchweld::cached_cumsum", mutates_args=(), schema=_CUMSUM_SCHEMA)
def cached_cumsum(cache: Tensor, rows: Tensor, past: Tensor, path: Tensor | None) -> Tensor:
    """Sums [B, 1, T, F] at the new rows; see the module docstring. Raises ValueError on bad arguments."""
    return cached_cumsum_reference(cache, rows, past, path)


@cached_cumsum.register_fake
def _(cache: Tensor, rows: Tensor, past: Tensor, path: Tensor | None) -> Tensor:
    _check_cumsum(cache, rows, past, path)
    return rows.new_empty(rows.shape)
