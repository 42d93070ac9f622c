"""torchweld::causal_convolution: a convolution over the last axis in which nothing looks ahead.

formula:  y[b, o, t] = bias[o] + sum over c, i of weight[o, c, i] * x[b, g * I + c, t - (K - 1 - i) * dilation],
          with x = 0 in front of t = 0 and g = o // (O / groups)
shapes:   x [B, groups * I, S], weight [O, I, K], bias [O] or None -> [B, O, S]
numerics: those of torch.nn.functional.conv1d behind (K - 1) * dilation columns of zeros
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, int dilation, int groups) -> Tensor"


def _check(x: Tensor, weight: Tensor, dilation: int, groups: int) -> None:
    """Raise ValueError naming the argument that breaks the contract of the module docstring."""
    name = "torchweld::causal_convolution"
    if x.dim() != 3 or weight.dim() != 3:
        raise ValueError(f"{name}: x and weight have ranks {x.dim()} and {weight.dim()}, expected 3 and 3")
    if dilation < 1 or groups < 1:
        raise ValueError(f"{name}: dilation {dilation} and {groups} groups; expected at least 1 of both")
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups != 0:
        channels = f"{x.shape[1]} channels in {groups} groups for a weight {tuple(weight.shape)}"
        raise ValueError(
            f"{name}: {channels} [O, I, K]; expected groups * I channels and O a multiple of groups"
        )


def causal_convolution_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int
) -> Tensor:
    """Plain-torch meaning of torchweld::causal_convolution."""
    _check(x, weight, dilation, groups)
    padded = F.pad(x, ((weight.shape[2] - 1) * dilation, 0))
    return F.conv1d(padded, weight, bias, dilation=dilation, groups=groups)


@torch.library.custom_op("torchweld::causal_convolution", mutates_args=(), schema=_SCHEMA)
def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int) -> Tensor:
    """A causal convolution [B, O, S]; see the module docstring. Raises ValueError on bad arguments."""
    return causal_convolution_reference(x, weight, bias, dilation, groups)


@causal_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int) -> Tensor:
    _check(x, weight, dilation, groups)
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2]))
