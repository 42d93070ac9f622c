"""torchweld::cached_running: cumulative sums, products, maxima and the like, continued from a cache.

cached_running(cache, rows, past, path, kind)
    shapes:   cache [B, 1, C, F] of values as they were before the new rows, rows [B, 1, T, F] -> [B, 1, T, F], the
              values at the new rows.  C >= T + 1 once they are appended.
    formula:  y[t] = combine(y[the row before t], rows[t]); in front of position 0 stands what changes nothing

    kind            combine            in front     dtypes
    sum             a + b              0            float32, float64, int64
    product         a * b              1            float32, float64, int64
    logsumexp       log(e^a + e^b)     -inf         float32, float64
    maximum         max(a, b)          -inf         all but complex ones; a NaN stays
    minimum         min(a, b)          inf          all but complex ones; a NaN stays

    numerics: one position after the other in the dtype of the cache, so that a value has the same bits however many
              rows come at once.

past, path and slots are those of cached_attention.py: position j lies in slot j % C if j < past[b], else in slot
(past[b] + i) % C of its new row i, which is j - past[b], or path[b, t, j - past[b]] in a tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from torchweld.graph.ops.cached_rows import check_places, parents_of

SUMMED: Final = (torch.float32, torch.float64, torch.int64)
_SCHEMA: Final = "(Tensor cache, Tensor rows, Tensor past, Tensor? path, str kind) -> Tensor"


@dataclass(frozen=True)
class Running:
    """How two values become one, what stands in front of the first, and in which dtypes; None for any real one.

    is_exact: `combine` rounds an element alike wherever it stands in a tensor.  torch's logaddexp has one code for
    whole vectors and another for what is left over, so that its sequences must not share a call.
    """

    combine: Callable[[Tensor, Tensor], Tensor]
    neutral: float
    dtypes: tuple[torch.dtype, ...] | None
    is_exact: bool = True


KINDS: Final = {
    "sum": Running(torch.add, 0, SUMMED),
    "product": Running(torch.mul, 1, SUMMED),
    "logsumexp": Running(torch.logaddexp, -math.inf, SUMMED[:2], is_exact=False),
    "maximum": Running(torch.maximum, -math.inf, None),
    "minimum": Running(torch.minimum, math.inf, None),
}


def neutral_value(kind: str, dtype: torch.dtype) -> float | int | bool:
    """What changes nothing in front of the first row; the least or the greatest number stands for an infinity."""
    value = KINDS[kind].neutral
    if dtype.is_floating_point or math.isfinite(value):
        return value
    if dtype == torch.bool:
        return value > 0
    limits = torch.iinfo(dtype)
    return limits.max if value > 0 else limits.min


def _check(cache: Tensor, rows: Tensor, past: Tensor, path: Tensor | None, kind: str) -> None:
    """Raise ValueError naming the argument that breaks the contract of the module docstring."""
    name = "torchweld::cached_running"
    check_places(name, cache, past, path)
    if kind not in KINDS:
        raise ValueError(f"{name}: kind {kind!r} is not one of {', '.join(KINDS)}")
    if rows.dim() != 4 or rows.shape[1] != 1 or rows.shape[3] != cache.shape[3]:
        shapes = f"{tuple(rows.shape)} for a cache {tuple(cache.shape)}"
        raise ValueError(f"{name}: rows {shapes}; expected [B, 1, T, F]")
    dtypes = KINDS[kind].dtypes
    good = not cache.is_complex() if dtypes is None else cache.dtype in dtypes
    if rows.dtype != cache.dtype or not good:
        names = "one real dtype" if dtypes is None else f"one dtype of {', '.join(map(str, dtypes))}"
        raise ValueError(f"{name}: rows {rows.dtype} for a cache {cache.dtype}; expected {names}")


def cached_running_reference(
    cache: Tensor, rows: Tensor, past: Tensor, path: Tensor | None, kind: str
) -> Tensor:
    """Plain-torch meaning of torchweld::cached_running: row after row."""
    _check(cache, rows, past, path, kind)
    values = torch.empty_like(rows, memory_format=torch.contiguous_format)
    batch = cache.shape[0]
    step = batch if KINDS[kind].is_exact else 1
    for first in range(0, batch, step):
        part = slice(first, first + step)
        _run(cache[part], rows[part], past[part], None if path is None else path[part], kind, values[part])
    return values


def _run(cache: Tensor, rows: Tensor, past: Tensor, path: Tensor | None, kind: str, values: Tensor) -> None:
    """Fill `values` for some sequences, all at once."""
    combine = KINDS[kind].combine
    sequences = torch.arange(cache.shape[0], device=past.device)
    before = cache[sequences, 0, (past - 1) % max(cache.shape[2], 1)] if cache.shape[2] else rows[:, 0, 0]
    start = torch.where(past[:, None] > 0, before, neutral_value(kind, cache.dtype))
    for row in range(rows.shape[2]):
        above = start if row == 0 else values[:, 0, row - 1]
        if path is not None:
            parent = parents_of(path[:, row])
            above = torch.where(parent[:, None] >= 0, values[sequences, 0, parent.clamp(min=0)], start)
        values[:, 0, row] = combine(above, rows[:, 0, row])


@torch.library.custom_op("torchweld::cached_running", mutates_args=(), schema=_SCHEMA)
def cached_running(cache: Tensor, rows: Tensor, past: Tensor, path: Tensor | None, kind: str) -> Tensor:
    """Values [B, 1, T, F] at the new rows; see the module docstring. Raises ValueError on bad arguments."""
    return cached_running_reference(cache, rows, past, path, kind)


@cached_running.register_fake
def _(cache: Tensor, rows: Tensor, past: Tensor, path: Tensor | None, kind: str) -> Tensor:
    _check(cache, rows, past, path, kind)
    return rows.new_empty(rows.shape)
