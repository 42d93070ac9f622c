"""Every spelling of attention that we know ends as one torchweld::attention, with the same numbers.

The table is the specification: one small function per spelling. What is refused beside it is in
test_recognize_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.support import Case, draw
from torchweld.passes import CANONICALIZE, recognize_attention

ATTENTION = torch.ops.torchweld.attention.default
HEADS, SIZE, LENGTH, BATCH = 4, 8, 5, 2
WIDTH = HEADS * SIZE
Function = Callable[..., Any]
Found = tuple[str, int, bool, float, int] | tuple[str, int, bool, float, int, bool]
"""(mask kind, window, is there a tensor mask, soft cap, key heads, sinks)."""
PLAIN: Found = ("none", 0, False, 0.0, HEADS)
CAUSAL: Found = ("causal", 0, False, 0.0, HEADS)
SUNK: Found = ("causal", 0, False, 0.0, HEADS, True)
BIASED: Found = ("causal", 0, True, 0.0, HEADS)
GROUPED: Found = ("none", 0, False, 0.0, 2)
GROUPED_CAUSAL: Found = ("causal", 0, False, 0.0, 2)


def qkv(heads: int = HEADS, key_heads: int = HEADS) -> tuple[Tensor, ...]:
    """[batch, positions, heads, features]: batch and positions vary."""
    return (
        draw(BATCH, LENGTH, heads, SIZE),
        draw(BATCH, LENGTH, key_heads, SIZE, seed=1),
        draw(BATCH, LENGTH, key_heads, 6, seed=2),
    )


def below(x: Tensor) -> Tensor:
    """The causal triangle for the positions of x, True = visible."""
    place = torch.arange(x.shape[-2])
    return place[None, :] <= place[:, None]


def hidden(x: Tensor, value: float = -math.inf) -> Tensor:
    """The causal triangle as added numbers."""
    return torch.full((x.shape[-2], x.shape[-2]), value, dtype=x.dtype).triu(1)


def naive(q: Any, k: Any, v: Any) -> Any:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def upcast(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.mT / math.sqrt(SIZE) + hidden(q, torch.finfo(q.dtype).min)
    return F.dropout(F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype), 0.1, m.training) @ v


def stable(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.mT * 0.5 + hidden(q)
    return (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1) @ v


def spelled_softmax(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.mT * 0.5 + hidden(q)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def late_division(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = (q @ k.mT * 0.5).masked_fill(~below(q), -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights @ v / weights.sum(-1, keepdim=True)


def alibi(m: Any, q: Any, k: Any, v: Any) -> Any:
    """Falcon: the bias is added before the scale."""
    bias = m.slopes[:, None, None] * torch.arange(q.shape[2])[None, None, :]
    scores = (q @ k.mT + bias[None]) * 0.5 + hidden(q, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def alibi_by_distance(m: Any, q: Any, k: Any, v: Any) -> Any:
    place = torch.arange(q.shape[2])
    bias = -(place[:, None] - place[None, :]).abs() * m.slopes[:, None, None]
    return (q @ k.mT * 0.5 + bias).masked_fill(~below(q), -math.inf).softmax(-1) @ v


def learned_bias(m: Any, q: Any, k: Any, v: Any) -> Any:
    """T5: a table of one number per head and bucket of the distance, no scale."""
    place = torch.arange(q.shape[2])
    bucket = (place[:, None] - place[None, :]).clamp(0, 7)
    bias = F.embedding(bucket, m.table).permute(2, 0, 1)[None]
    return (q @ k.mT + (bias + hidden(q))).softmax(-1) @ v


def capped(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = torch.tanh(q @ k.mT * 0.5 / 30.0) * 30.0
    return (scores + hidden(q)).softmax(-1) @ v


def scalar_capped(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = m.cap * torch.tanh(q @ k.mT * 0.5 / m.cap)
    return scores.masked_fill(~below(q), -math.inf).softmax(-1) @ v


def clamped(m: Any, q: Any, k: Any, v: Any) -> Any:
    """XGLM: nothing may fall below the lowest number."""
    lowest = torch.finfo(q.dtype).min
    mask = torch.where(below(q), torch.tensor(0.0, dtype=q.dtype), lowest)
    return torch.max(q @ k.mT * 0.5 + mask, torch.tensor(lowest, dtype=q.dtype)).softmax(-1) @ v


def sinks(m: Any, q: Any, k: Any, v: Any) -> Any:
    """GPT-OSS: one more logit per head takes part in the softmax."""
    scores = q @ k.mT * 0.5 + hidden(q)
    sink = m.slopes.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def stable_sinks(m: Any, q: Any, k: Any, v: Any) -> Any:
    """As transformers writes it."""
    scores = q @ k.mT * 0.5 + hidden(q, torch.finfo(q.dtype).min)
    both = torch.cat([scores, m.slopes.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    weights = F.softmax(both, dim=-1, dtype=both.dtype)[..., :-1]
    return F.dropout(weights, 0.1, m.training).to(v.dtype) @ v


def sinks_in_front(m: Any, q: Any, k: Any, v: Any) -> Any:
    sink = m.slopes[None, :, None, None].expand(q.shape[0], HEADS, q.shape[2], 1)
    scores = torch.cat([sink, (q @ k.mT * 0.5).masked_fill(~below(q), -math.inf)], -1)
    return scores.softmax(-1)[..., 1:] @ v


def sinks_late_scale(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = torch.where(below(q), q @ k.mT, torch.finfo(q.dtype).min) / 2.0
    sink = m.slopes.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def sinks_of_groups(m: Any, q: Any, k: Any, v: Any) -> Any:
    q = q.unflatten(1, (2, 2))
    scores = q @ k[:, :, None].mT * 0.5 + hidden(q)
    sink = m.slopes.view(1, 2, 2, 1, 1).expand(*scores.shape[:-1], 1)
    return (torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v[:, :, None]).flatten(1, 2)


def where_tensor(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.mT * 0.5
    lowest = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.where(below(q), scores, lowest).softmax(-1) @ v


def mask_before_scale(m: Any, q: Any, k: Any, v: Any) -> Any:
    """GPT-J before 2023: the mask first, the scale behind it."""
    scores = torch.where(below(q), q @ k.mT, torch.finfo(q.dtype).min)
    return (scores / 2.0).softmax(-1) @ v


def wide_mask(m: Any, q: Any, k: Any, v: Any) -> Any:
    return ((q @ k.mT) * 0.5 + hidden(q)[None]).softmax(-1) @ v


def added_twice(m: Any, q: Any, k: Any, v: Any) -> Any:
    return (q @ k.mT * 0.5 + hidden(q) + torch.zeros(q.shape[2], q.shape[2], dtype=q.dtype)).softmax(-1) @ v


def multiplied_mask(m: Any, q: Any, k: Any, v: Any) -> Any:
    """GPT (2018): scores * b - 1e10 * (1 - b) with the triangle b as numbers."""
    triangle = below(q).to(q.dtype)
    return (q @ k.mT * 0.5 * triangle + -1e10 * (1 - triangle)).softmax(-1) @ v


def merged(m: Any, q: Any, k: Any, v: Any) -> Any:
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    return torch.bmm((torch.bmm(q * 0.5, k.transpose(1, 2)) + hidden(q)).softmax(-1), v)


def merged_and_split(m: Any, q: Any, k: Any, v: Any) -> Any:
    """BART: scores as [batch * heads, t, s], the mask added to [batch, heads, t, s]."""
    batch, heads, length, _ = q.shape
    q, k, v = (part.reshape(batch * heads, length, -1) for part in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, length, length) + hidden(q)[None, None]
    weights = scores.view(batch * heads, length, length).softmax(-1)
    return torch.bmm(weights, v).view(batch, heads, length, -1).transpose(1, 2)


def einsum(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
    return torch.einsum("bhqk,bkhd->bqhd", (scores + hidden(q.transpose(1, 2))).softmax(-1), v)


def einsum_heads_first(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.5 + hidden(q)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def grouped_product(m: Any, q: Any, k: Any, v: Any) -> Any:
    """Groups of query heads as an axis of their own: [batch, key heads, group, t, d]."""
    q = q.unflatten(1, (2, 2))
    return ((q @ k[:, :, None].mT * 0.5 + hidden(q)).softmax(-1) @ v[:, :, None]).flatten(1, 2)


def grouped_einsum(m: Any, q: Any, k: Any, v: Any) -> Any:
    q = q.unflatten(1, (2, 2))
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * 0.5 + hidden(q)
    return torch.einsum("bhgqk,bhkd->bhgqd", scores.softmax(-1), v).flatten(1, 2)


def repeat_by_expand(x: Any, groups: int, axis: int = 1) -> Tensor:
    shape = list(x.shape)
    return (
        x.unsqueeze(axis + 1).expand(*shape[: axis + 1], groups, *shape[axis + 1 :]).flatten(axis, axis + 1)
    )


def repeat_positions_first(m: Any, q: Any, k: Any, v: Any) -> Any:
    k, v = repeat_by_expand(k, 2, 2), repeat_by_expand(v, 2, 2)
    return naive(*(part.transpose(1, 2) for part in (q, k, v)))


def interleave_positions_first(m: Any, q: Any, k: Any, v: Any) -> Any:
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=-2)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden(q))


def stacked(m: Any, q: Any, k: Any, v: Any) -> Any:
    k, v = (torch.stack((part, part), dim=2).flatten(1, 2) for part in (k, v))
    return naive(q, k, v)


def expanded_heads(m: Any, q: Any, k: Any, v: Any) -> Any:
    k, v = k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1)
    return F.scaled_dot_product_attention(q, k, v)


def tiled_head(m: Any, q: Any, k: Any, v: Any) -> Any:
    return naive(q, k.repeat(1, HEADS, 1, 1), v.repeat(1, HEADS, 1, 1))


def fused_split(m: Any, x: Any) -> Any:
    q, k, v = F.linear(x, m.qkv).split(WIDTH, dim=-1)
    q, k, v = (part.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def fused_chunk(m: Any, x: Any) -> Any:
    q, k, v = F.linear(x, m.qkv).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (HEADS, SIZE)).permute(0, 2, 1, 3) for part in (q, k, v))
    return ((q @ k.mT * 0.5 + hidden(q)).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def fused_view(m: Any, x: Any) -> Any:
    q, k, v = F.linear(x, m.qkv).view(*x.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=below(q)).transpose(1, 2).flatten(2)


def fused_interleaved(m: Any, x: Any) -> Any:
    """GPT-NeoX: the three parts of a head side by side."""
    parts = F.linear(x, m.qkv).view(*x.shape[:2], HEADS, 3 * SIZE).transpose(1, 2)
    q, k, v = parts.chunk(3, dim=-1)
    return (q @ k.mT * 0.5).masked_fill(~below(q), torch.finfo(q.dtype).min).softmax(-1) @ v


def fused_groups(m: Any, x: Any) -> Any:
    """Falcon: per key head its query heads, then key, then value."""
    parts = F.linear(x, m.wide).view(*x.shape[:2], 2, 4, SIZE)
    q, k, v = parts[..., :-2, :].flatten(2, 3), parts[..., [-2], :], parts[..., [-1], :]
    k, v = (part.expand(-1, -1, -1, 2, -1).flatten(2, 3) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def multi_query_split(m: Any, x: Any) -> Any:
    """GPT-BigCode: all query heads against one key head, queries laid in one axis with the positions."""
    q, k, v = F.linear(x, m.qkv[: WIDTH + 2 * SIZE]).split((WIDTH, SIZE, SIZE), dim=-1)
    q = q.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k[:, None], v[:, None], is_causal=True, enable_gqa=True)


def positions_before_batch(m: Any, x: Any) -> Any:
    """nn.MultiheadAttention: [positions, batch, features], merged batch and heads."""
    x = x.transpose(0, 1)
    length, batch, _ = x.shape
    q, k, v = (
        part.reshape(length, batch * HEADS, SIZE).transpose(0, 1) for part in F.linear(x, m.qkv).chunk(3, -1)
    )
    mixed = torch.bmm(torch.baddbmm(hidden(q)[None], q * 0.5, k.transpose(1, 2)).softmax(-1), v)
    return mixed.transpose(0, 1).reshape(length, batch, -1).transpose(0, 1)


def bare_exponentials(m: Any, q: Any, k: Any, v: Any) -> Any:
    """Overflows where a softmax does not: not the same function."""
    weights = torch.exp(q @ k.mT * 0.5)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def undivided(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.mT * 0.5
    return torch.exp(scores - scores.amax(-1, keepdim=True)) @ v


def wrong_sum(m: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.mT * 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-2, keepdim=True)) @ v


def negative_scale(m: Any, q: Any, k: Any, v: Any) -> Any:
    return ((q @ k.mT + below(q).to(q.dtype)) * -0.5).softmax(-1) @ v


def mixed_groups(m: Any, q: Any, k: Any, v: Any) -> Any:
    q, k, v = (part.unflatten(1, (2, 2)) for part in (q, k, v))
    return ((q @ k.mT * 0.5).softmax(-1) @ v).flatten(1, 2)


def mask_of_groups(m: Any, q: Any, k: Any, v: Any) -> Any:
    q, k, v = q.unflatten(1, (2, 2)), k[:, :2, None], v[:, :2, None]
    return ((q @ k.mT * 0.5 + m.slopes.view(2, 2, 1, 1)).softmax(-1) @ v).flatten(1, 2)


def mask_of_heads(m: Any, q: Any, k: Any, v: Any) -> Any:
    mask = m.slopes[:, None, None] * (torch.arange(q.shape[2])[:, None] + torch.arange(q.shape[2])[None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def repeat_heads_first(m: Any, q: Any, k: Any, v: Any) -> Any:
    return naive(q, repeat_by_expand(k, 2), repeat_by_expand(v, 2))


def top_left(m: Any, q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def bottom_right(m: Any, q: Any, k: Any, v: Any) -> Any:
    keys, queries = torch.arange(k.shape[2]), torch.arange(q.shape[2]) + k.shape[2] - q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys[None, :] <= queries[:, None])


def three_axes(m: Any, x: Any) -> Any:
    return F.scaled_dot_product_attention(x, x * 0.5, x + 1, is_causal=True)


FUSED = {"qkv": draw(3 * WIDTH, WIDTH, seed=7) / 4, "wide": draw(2 * 4 * SIZE, WIDTH, seed=8) / 4}
TABLE = {
    "slopes": draw(HEADS, seed=4).abs() / 4,
    "table": draw(8, HEADS, seed=5),
    "cap": torch.tensor(30.0, dtype=torch.float64),
}


@dataclass(frozen=True)
class Spelled:
    """A function of query, key and value (`heads_first`: [batch, heads, positions, features]) or of x alone, and
    what must be found in it."""

    function: Function
    found: Found = CAUSAL
    inputs: Sequence[Tensor] = qkv()
    weights: Mapping[str, Tensor] = field(default_factory=lambda: {**TABLE, **FUSED})
    heads_first: bool = True

    def __call__(self, m: Any, *parts: Tensor) -> Any:
        return self.function(m, *(part.transpose(1, 2) if self.heads_first else part for part in parts))


def of_x(function: Function, found: Found = CAUSAL) -> Spelled:
    return Spelled(function, found, (draw(BATCH, LENGTH, WIDTH),), heads_first=False)


SHORT = (draw(BATCH, 3, HEADS, SIZE, seed=6), *qkv()[1:])
SPELLINGS: dict[str, Spelled] = {
    "multiplied scale": Spelled(lambda m, q, k, v: naive(q, k, v), PLAIN),
    "divided scale, upcast, dropout": Spelled(upcast),
    "scale on the query": Spelled(lambda m, q, k, v: ((q * 0.5) @ k.mT).softmax(-1) @ v, PLAIN),
    "scale on the key": Spelled(lambda m, q, k, v: (q @ (k * 0.5).mT).softmax(-1) @ v, PLAIN),
    "half of the scale on both": Spelled(lambda m, q, k, v: (q / 2 @ (k.mT / 2)).softmax(-1) @ v, PLAIN),
    "maximum taken off": Spelled(stable),
    "softmax by exp and sum": Spelled(spelled_softmax),
    "division behind the values": Spelled(late_division),
    "ALiBi before the scale": Spelled(alibi, BIASED),
    "ALiBi by distance, without batch": Spelled(alibi_by_distance, BIASED),
    "learned bias": Spelled(learned_bias, BIASED),
    "soft cap": Spelled(capped, ("causal", 0, False, 30.0, HEADS)),
    "soft cap from a buffer": Spelled(scalar_capped, ("causal", 0, False, 30.0, HEADS)),
    "clamped at the lowest number": Spelled(clamped),
    "where with a tensor": Spelled(where_tensor),
    "mask before the scale": Spelled(mask_before_scale),
    "mask with an axis in front": Spelled(wide_mask),
    "two masks": Spelled(added_twice),
    "sinks": Spelled(sinks, SUNK),
    "sinks, maximum taken off": Spelled(stable_sinks, SUNK),
    "sinks in front": Spelled(sinks_in_front, SUNK),
    "sinks, mask before the scale": Spelled(sinks_late_scale, SUNK),
    "sinks of groups": Spelled(sinks_of_groups, (*GROUPED_CAUSAL, True), qkv(4, 2)),
    "merged batch and heads": Spelled(merged, ("causal", 0, False, 0.0, 1)),
    "merged and split again": Spelled(merged_and_split),
    "einsum, positions first": Spelled(einsum, heads_first=False),
    "einsum, heads first": Spelled(einsum_heads_first),
    "groups as an axis": Spelled(grouped_product, GROUPED_CAUSAL, qkv(4, 2)),
    "groups as an axis, einsum": Spelled(grouped_einsum, GROUPED_CAUSAL, qkv(4, 2)),
    "expand": Spelled(repeat_heads_first, GROUPED, qkv(4, 2)),
    "expand, positions first": Spelled(repeat_positions_first, GROUPED, qkv(4, 2), heads_first=False),
    "repeat_interleave, positions first": Spelled(
        interleave_positions_first, GROUPED_CAUSAL, qkv(4, 2), heads_first=False
    ),
    "stack": Spelled(stacked, GROUPED, qkv(4, 2)),
    "one head expanded": Spelled(expanded_heads, ("none", 0, False, 0.0, 1), qkv(4, 1)),
    "one head tiled": Spelled(tiled_head, ("none", 0, False, 0.0, 1), qkv(4, 1)),
    "fused qkv by split": of_x(fused_split),
    "fused qkv by chunk": of_x(fused_chunk),
    "fused qkv by view": of_x(fused_view),
    "fused qkv, interleaved": of_x(fused_interleaved),
    "fused qkv in groups": of_x(fused_groups, GROUPED_CAUSAL),
    "multi query": of_x(multi_query_split, ("causal", 0, False, 0.0, 1)),
    "positions before batch": of_x(positions_before_batch, ("causal", 0, False, 0.0, 1)),
    "is_causal, fewer queries": Spelled(top_left, ("none", 0, True, 0.0, HEADS), SHORT),
    "bottom right by a mask": Spelled(bottom_right, CAUSAL, SHORT),
    "a mask of heads": Spelled(mask_of_heads, ("none", 0, True, 0.0, HEADS)),
    "three axes": of_x(three_axes, ("causal", 0, False, 0.0, 1)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_becomes_attention(name: str) -> None:
    spelled = SPELLINGS[name]
    dynamic: dict[str, Sequence[int]] = {f"inputs_{number}": (0, 1) for number in range(len(spelled.inputs))}
    case = Case(spelled, *spelled.inputs, dynamic=dynamic, **spelled.weights)
    outcome = case.run(*CANONICALIZE, recognize_attention)[-1]
    assert (outcome.applied, outcome.refused) == (1, ())
    node = case.only(ATTENTION)
    key: Any = node.args[1]
    kind, window, soft_cap = node.args[4], node.args[5], node.args[7]
    shown = (kind, window, node.args[3] is not None, soft_cap, key.meta["val"].shape[1])
    assert shown == spelled.found[:5]
    assert (len(node.args) == 9) == (spelled.found[5:] == (True,))
    assert node.meta["mask_proof"]
    case.assert_same_numbers(exact=False)
    other = [draw(1, part.shape[1] + 4, *part.shape[2:], seed=9 + n) for n, part in enumerate(spelled.inputs)]
    case.assert_same_numbers(*other, exact=False)


NOT_OURS: dict[str, tuple[Function, str]] = {
    "hidden by a number near the scores": (multiplied_mask, "stands between the scores and the softmax"),
    "softmax without its maximum": (bare_exponentials, ""),
    "weights that are not divided by their sum": (undivided, ""),
    "sum over the queries": (wrong_sum, ""),
    "negative scale behind the mask": (negative_scale, "a mask stands before the scale or the soft cap"),
    "groups that read different keys": (mixed_groups, "do not have the axes"),
    "a mask per group": (mask_of_groups, "a mask has an axis of groups"),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_only_looks_like_attention(name: str) -> None:
    function, reason = NOT_OURS[name]
    case = Case(Spelled(function), *qkv(), dynamic=True, **TABLE)
    outcome = case.run(*CANONICALIZE, recognize_attention)[-1]
    assert outcome.applied == 0 and (reason == "") == (not outcome.refused)
    assert all(reason in refusal.reason for refusal in outcome.refused)
    case.assert_same_numbers(exact=False)
