"""torchweld::attention: scaled dot-product attention with grouped heads and an explicit mask kind.

formula:  s[t, j] = scale * <q[t], k[j]>;  s = soft_cap * tanh(s / soft_cap) if soft_cap > 0
          y[t] = sum_j softmax_j(s[t, j] masked) * v[j]
sinks:    [Hq], a score per query head that takes part in the softmax and has the value 0 (gpt-oss):
          softmax_j = exp(s[t, j]) / (exp(sinks[h]) + sum_i exp(s[t, i])).  It is neither scaled, capped nor masked.
shapes:   query [B, Hq, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], Hq % Hkv == 0 -> [B, Hq, T, Dv];
          query head h reads key and value head h // (Hq // Hkv): nothing is repeated in memory.
masks:    "none"; "causal": key j is visible to query t iff j <= t + S - T; "window": also j > t + S - T -
          window. A tensor mask comes on top: bool (True = visible) or additive float, broadcastable to [B,
          Hq, T, S].
numerics: float32 inside (float64 for float64 inputs), result in the dtype of value. A query that sees no
          key gives 0, as torch.nn.functional.scaled_dot_product_attention does.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from torch import Tensor

MaskKind = Literal["none", "causal", "window"]
MASK_KINDS: Final[tuple[str, ...]] = get_args(MaskKind)

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, str mask_kind, int window, float scale,"
    " float soft_cap, Tensor? sinks=None) -> Tensor"
)


def positional_visibility(
    mask_kind: str, queries: int, keys: int, window: int, device: torch.device
) -> Tensor | None:
    """Which key each query sees by position alone: bool [queries, keys], True = visible; None for "none".

    Queries are the last `queries` of the `keys` positions, so a cache in front of them needs no other rule.
    """
    if mask_kind == "none":
        return None
    query_position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key_position = torch.arange(keys, device=device)[None, :]
    visible = key_position <= query_position
    if mask_kind == "window":
        visible = visible & (key_position > query_position - window)
    return visible


def _check_sinks(sinks: Tensor | None, query_heads: int) -> None:
    """Raise ValueError unless the sinks are one number per query head."""
    if sinks is not None and (
        sinks.dim() != 1 or sinks.shape[0] != query_heads or not sinks.is_floating_point()
    ):
        raise ValueError(
            f"torchweld::attention: sinks are {sinks.dtype} {tuple(sinks.shape)}; expected one floating-point"
            f" number for each of the {query_heads} query heads"
        )


def _check(query: Tensor, key: Tensor, value: Tensor, mask_kind: str, window: int) -> None:
    """Raise ValueError naming the argument that breaks the contract of the module docstring."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        ranks = (query.dim(), key.dim(), value.dim())
        raise ValueError(f"torchweld::attention: query, key and value must have rank 4, got ranks {ranks}")
    query_heads, key_heads = query.shape[1], key.shape[1]
    if key_heads != value.shape[1] or key.shape[2] != value.shape[2]:
        raise ValueError(
            f"torchweld::attention: key {tuple(key.shape)} and value {tuple(value.shape)} differ in heads"
            " or length"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"torchweld::attention: query has {query.shape[3]} features, key has {key.shape[3]}")
    if key_heads == 0 or query_heads % key_heads != 0:
        raise ValueError(
            f"torchweld::attention: {query_heads} query heads cannot be shared out over {key_heads} key heads"
        )
    if mask_kind not in MASK_KINDS:
        raise ValueError(
            f"torchweld::attention: mask_kind {mask_kind!r} is not one of {', '.join(MASK_KINDS)}"
        )
    if mask_kind == "window" and window < 1:
        raise ValueError(
            f"torchweld::attention: window must be at least 1 with mask_kind 'window', got {window}"
        )


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_kind: str,
    window: int,
    scale: float,
    soft_cap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Plain-torch meaning of torchweld::attention; shapes, masks and errors as in the module docstring."""
    _check(query, key, value, mask_kind, window)
    _check_sinks(sinks, query.shape[1])
    batch, heads, queries, features = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(compute).reshape(batch, key_heads, heads // key_heads, queries, features)
    scores = grouped @ key.to(compute).unsqueeze(2).transpose(-1, -2) * scale
    scores = scores.reshape(batch, heads, queries, keys)
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    visible = positional_visibility(mask_kind, queries, keys, window, query.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(compute)
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sink = sinks.to(compute).reshape(1, heads, 1, 1).expand(batch, heads, queries, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :keys]
    sees_nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = weights.masked_fill(sees_nothing, 0.0)
    grouped_weights = weights.reshape(batch, key_heads, heads // key_heads, queries, keys)
    mixed = grouped_weights @ value.to(compute).unsqueeze(2)
    return mixed.reshape(batch, heads, queries, value.shape[3]).to(value.dtype)


@torch.library.custom_op("torchweld::attention", mutates_args=(), schema=_SCHEMA)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_kind: str,
    window: int,
    scale: float,
    soft_cap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention, [B, Hq, T, Dv]; see the module docstring. Raises ValueError on bad
    arguments."""
    return attention_reference(query, key, value, mask, mask_kind, window, scale, soft_cap, sinks)


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_kind: str,
    window: int,
    scale: float,
    soft_cap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    _check(query, key, value, mask_kind, window)
    _check_sinks(sinks, query.shape[1])
    return value.new_empty((query.shape[0], query.shape[1], query.shape[2], value.shape[3]))
