"""torchweld::append_rows and torchweld::cached_attention: attention over a cache that is written in place.

append_rows(cache, rows, past)
    shapes:   cache [B, H, C, D], rows [B, H, T, D] with T <= C, past int64 [B] -> the cache, with element
              [b, h, (past[b] + t) % C, :] = rows[b, h, t, :].  Functional here; the executable writes the cache itself.

cached_attention(query, key, value, past, path, mask, mask_kind, window, scale, soft_cap, sinks)
    formula:  as torchweld::attention, over the positions that a row sees, in their order
    shapes:   query [B, Hq, T, D], key [B, Hkv, C, D], value [B, Hkv, C, Dv], past int64 [B] -> [B, Hq, T, Dv]; key and
              value hold the new rows already.  Query head h reads key head h // (Hq // Hkv).
    rows:     row t of sequence b has depth t, or in a tree the depth d with path[b, t, d] == t; path int64 [B, T, T]:
              path[b, t, i] is the new row that is the ancestor of t at depth i, and -1 beyond the depth of t.
              Its position is p = past[b] + depth.
    masks:    "causal": positions j = 0..p are visible; "window": max(0, p - window + 1)..p.  Position j is in slot
              j % C if j < past[b], else in slot (past[b] + i) % C of its new row i (j - past[b], or
              path[b, t, j - past[b]]).  So C >= past + T without a window, and C >= window + T - 1 with one.
              A tensor mask comes on top: bool or additive float, broadcastable to [B, Hq, T, M], whose last axis counts
              positions j ("causal" only): M >= past + T, or M == 1.
    sinks:    [Hq], as in torchweld::attention
    numerics: as torchweld::attention.  Positions are summed in their order whatever the ring and the tree, so that a
              kernel can give a row the same bits however it came to be computed.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from torchweld.graph.ops.attention import _check_sinks, attention_reference

CACHED_KINDS: Final = ("causal", "window")

_APPEND_SCHEMA = "(Tensor cache, Tensor rows, Tensor past) -> Tensor"
_ATTENTION_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor past, Tensor? path, Tensor? mask, str mask_kind, int window,"
    " float scale, float soft_cap, Tensor? sinks=None) -> Tensor"
)


def _check_append(cache: Tensor, rows: Tensor, past: Tensor) -> None:
    """Raise ValueError naming the argument that breaks the contract of the module docstring."""
    if cache.dim() != 4 or rows.dim() != 4 or past.dim() != 1:
        ranks = (cache.dim(), rows.dim(), past.dim())
        raise ValueError(
            f"torchweld::append_rows: cache, rows and past have ranks {ranks}, expected 4, 4 and 1"
        )
    if rows.dtype != cache.dtype or past.dtype != torch.int64:
        dtypes = f"rows {rows.dtype} for a cache {cache.dtype}, past {past.dtype}"
        raise ValueError(f"torchweld::append_rows: {dtypes}; expected one dtype, and int64")
    if cache.shape[1] != rows.shape[1] or cache.shape[3] != rows.shape[3]:
        shapes = f"rows {tuple(rows.shape)} and a cache {tuple(cache.shape)}"
        raise ValueError(f"torchweld::append_rows: {shapes} differ in heads or features")


def append_rows_reference(cache: Tensor, rows: Tensor, past: Tensor) -> Tensor:
    """Plain-torch meaning of torchweld::append_rows: a copy of the cache with the rows in their slots."""
    _check_append(cache, rows, past)
    capacity, count = cache.shape[2], rows.shape[2]
    if rows.shape[0] != cache.shape[0] or past.shape[0] != cache.shape[0]:
        sizes = f"{rows.shape[0]} sequences of rows and {past.shape[0]} lengths"
        raise ValueError(f"torchweld::append_rows: {sizes} for a cache of {cache.shape[0]}")
    if count > capacity:
        raise ValueError(f"torchweld::append_rows: {count} rows for a cache of {capacity} slots")
    result = cache.clone(memory_format=torch.contiguous_format)
    if count:
        slots = (past[:, None] + torch.arange(count, device=past.device)) % capacity
        sequences = torch.arange(cache.shape[0], device=past.device)[:, None]
        result[sequences, :, slots] = rows.permute(0, 2, 1, 3)
    return result


@torch.library.custom_op("torchweld::append_rows", mutates_args=(), schema=_APPEND_SCHEMA)
def append_rows(cache: Tensor, rows: Tensor, past: Tensor) -> Tensor:
    """The cache [B, H, C, D] with new rows; see the module docstring. Raises ValueError on bad arguments."""
    return append_rows_reference(cache, rows, past)


@append_rows.register_fake
def _(cache: Tensor, rows: Tensor, past: Tensor) -> Tensor:
    _check_append(cache, rows, past)
    return cache.new_empty(cache.shape)


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, past: Tensor, path: Tensor | None, mask: Tensor | None,
    mask_kind: str, window: int,
) -> None:  # fmt: skip
    """Raise ValueError naming the argument that breaks the contract; the rest is checked by attention itself."""
    name = "torchweld::cached_attention"
    if mask_kind not in CACHED_KINDS:
        raise ValueError(f"{name}: mask_kind {mask_kind!r} is not one of {', '.join(CACHED_KINDS)}")
    if mask_kind == "window" and window < 1:
        raise ValueError(f"{name}: window must be at least 1 with mask_kind 'window', got {window}")
    if mask_kind == "window" and mask is not None:
        raise ValueError(
            f"{name}: a tensor mask counts positions and has no place in a ring (mask_kind 'window')"
        )
    if past.dim() != 1 or past.dtype != torch.int64:
        raise ValueError(f"{name}: past is {past.dtype} of rank {past.dim()}; expected int64 [B]")
    if path is not None and (path.dim() != 3 or path.dtype != torch.int64):
        raise ValueError(f"{name}: path is {path.dtype} of rank {path.dim()}; expected int64 [B, T, T]")
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        ranks = (query.dim(), key.dim(), value.dim())
        raise ValueError(f"{name}: query, key and value must have rank 4, got ranks {ranks}")
    if key.shape[1] != value.shape[1] or query.shape[3] != key.shape[3]:
        shapes = " and ".join(str(tuple(part.shape)) for part in (query, key, value))
        raise ValueError(f"{name}: {shapes} differ in features (query, key) or heads (key, value)")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        heads = f"{query.shape[1]} query heads cannot be shared out over {key.shape[1]} key heads"
        raise ValueError(f"{name}: {heads}")


def cached_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, past: Tensor, path: Tensor | None, mask: Tensor | None,
    mask_kind: str, window: int, scale: float, soft_cap: float, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Plain-torch meaning of torchweld::cached_attention, sequence by sequence; a tree row by row."""
    _check_attention(query, key, value, past, path, mask, mask_kind, window)
    _check_sinks(sinks, query.shape[1])
    batch, heads, count, _ = query.shape
    result = query.new_zeros((batch, heads, count, value.shape[3]), dtype=value.dtype)
    if mask is not None:
        mask = mask.expand(batch, heads, count, mask.shape[-1])
    for b in range(batch):
        length = int(past[b])
        new = torch.arange(count, device=query.device)
        rows = (
            [(new, new)] if path is None else [(new[t : t + 1], _ancestors(path[b, t])) for t in range(count)]
        )
        for queries, chain in rows:
            last = length + chain.numel() - 1
            first = max(0, last - queries.numel() + 1 - window + 1) if mask_kind == "window" else 0
            positions = torch.arange(first, last + 1, device=query.device)
            slots = torch.where(
                positions < length, positions, length + chain[(positions - length).clamp(min=0)]
            )
            extra = None if mask is None else mask[b : b + 1, :, queries]
            if extra is not None and extra.shape[-1] != 1:
                extra = extra[..., positions]
            keys, values = (side[b : b + 1, :, slots % key.shape[2]] for side in (key, value))
            result[b : b + 1, :, queries] = attention_reference(
                query[b : b + 1, :, queries], keys, values, extra, mask_kind, window, scale, soft_cap, sinks
            )
    return result


def _ancestors(path: Tensor) -> Tensor:
    """The new rows from the root to a row of a tree: `path` [T] up to its first -1."""
    beyond = (path < 0).nonzero()
    return path[: int(beyond[0])] if beyond.numel() else path


@torch.library.custom_op("torchweld::cached_attention", mutates_args=(), schema=_ATTENTION_SCHEMA)
def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, past: Tensor, path: Tensor | None, mask: Tensor | None,
    mask_kind: str, window: int, scale: float, soft_cap: float, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention over a cache, [B, Hq, T, Dv]; see the module docstring. Raises ValueError on bad arguments."""
    return cached_attention_reference(
        query, key, value, past, path, mask, mask_kind, window, scale, soft_cap, sinks
    )


@cached_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, past: Tensor, path: Tensor | None, mask: Tensor | None,
    mask_kind: str, window: int, scale: float, soft_cap: float, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_attention(query, key, value, past, path, mask, mask_kind, window)
    _check_sinks(sinks, query.shape[1])
    return value.new_empty((query.shape[0], query.shape[1], query.shape[2], value.shape[3]))
