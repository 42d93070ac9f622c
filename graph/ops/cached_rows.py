"""torchweld::cached_rows: what a causal convolution keeps of the past.

cached_rows(cache, past, positions, path, taps, dilation)
    shapes:   cache [B, 1, C, F] that holds the new rows already, past int64 [B], positions int64 [B, T]
              -> [B, T, taps, F]
    formula:  tap i of row t is the row of position  positions[b, t] - (taps - 1 - i) * dilation,  and 0 before
              position 0.  The last tap is the row itself.  C >= (taps - 1) * dilation + T.

past, path and slots are those of cached_attention.py: position j lies in slot j % C if j < past[b], else in slot
(past[b] + i) % C of its new row i, which is j - past[b], or path[b, t, j - past[b]] in a tree.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_SCHEMA = "(Tensor cache, Tensor past, Tensor positions, Tensor? path, int taps, int dilation) -> Tensor"


def check_places(name: str, cache: Tensor, past: Tensor, path: Tensor | None) -> None:
    """Raise ValueError, in the name of an operation, for a cache, lengths or a path that are none."""
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
    check_places(name, cache, past, path)
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


def parents_of(path: Tensor) -> Tensor:
    """The new row before one whose path [B, T] from the root is given; -1 for a root."""
    depth = (path >= 0).sum(1) - 1
    parent = path.gather(1, (depth - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(depth > 0, parent, -1)
