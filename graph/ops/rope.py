"""torchweld::rope: rotary position embedding on the first R features of the last axis.

formula:  y[..., :R] = x[..., :R] * cos + rot(x[..., :R]) * sin;  y[..., R:] = x[..., R:]
          rot(x) = cat(-x[R/2:], x[:R/2]), or for interleaved pairs (x[2i], x[2i+1]) -> (-x[2i+1], x[2i])
shapes:   x [..., D]; cos and sin broadcastable to x[..., :R], R = cos.shape[-1] even, R <= D -> [..., D]
dtype:    what torch's promotion of x, cos and sin gives (no hidden cast), so casts around it stay visible.
source:   Su et al., RoFormer (2021); the two layouts are those of GPT-NeoX and GPT-J.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCHEMA = "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor"


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError naming the argument that breaks the contract of the module docstring."""
    if x.dim() == 0 or cos.dim() == 0 or sin.dim() == 0:
        raise ValueError("torchweld::rope: x, cos and sin need at least one axis")
    rotated, features = cos.shape[-1], x.shape[-1]
    if sin.shape[-1] != rotated:
        raise ValueError(f"torchweld::rope: cos has {rotated} features, sin has {sin.shape[-1]}")
    if rotated % 2 != 0 or rotated > features:
        raise ValueError(
            f"torchweld::rope: cannot rotate {rotated} of {features} features (even, at most all of x)"
        )
    if cos.dim() > x.dim() or sin.dim() > x.dim():
        raise ValueError(f"torchweld::rope: cos and sin have more axes than x ({x.dim()})")


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """rot(x) of the module docstring over the whole last axis, which must be even; same shape and dtype as
    x."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Plain-torch meaning of torchweld::rope; shapes, dtype and errors as in the module docstring."""
    _check(x, cos, sin)
    rotated = cos.shape[-1]
    head = x[..., :rotated]
    turned = head * cos + rotate(head, interleaved) * sin
    return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)


@torch.library.custom_op("torchweld::rope", mutates_args=(), schema=_SCHEMA)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R features of x [..., D] by cos, sin [..., R]; see the module docstring. Raises
    ValueError."""
    return rope_reference(x, cos, sin, interleaved)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    _check(x, cos, sin)
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), sin.dtype)
    return x.new_empty(x.shape, dtype=dtype)
