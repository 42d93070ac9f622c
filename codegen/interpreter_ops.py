"""What pointwise operations and folds mean on the carriers of the reference interpreter, as plain torch functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FOLDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(-1),
    "prod": lambda x: x.prod(-1),
    "max": lambda x: x.amax(-1),
    "min": lambda x: x.amin(-1),
    "any": lambda x: (x != 0).any(-1),
    "all": lambda x: (x != 0).all(-1),
    "argmax": lambda x: x.argmax(-1),
    "argmin": lambda x: x.argmin(-1),
}
"""Folds over the last dimension, which is not empty."""


def _safe(divisor: Tensor) -> Tensor:
    """Integers divide by 1 instead of 0: a guarded division is evaluated where its value is thrown away, too."""
    return divisor if divisor.is_floating_point() else divisor.masked_fill(divisor == 0, 1)


POINTWISE: Mapping[str, Callable[..., Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "not": torch.logical_not,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "sign": torch.sign,
    "relu": torch.relu,
    "bitwise_not": torch.bitwise_not,
    "add": lambda a, b: a | b if a.dtype == torch.bool else a + b,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: torch.true_divide(a, b),
    "floordiv": lambda a, b: torch.floor_divide(a, _safe(b)),
    "mod": lambda a, b: torch.remainder(a, _safe(b)),
    "pow": torch.pow,
    "max": torch.maximum,
    "min": torch.minimum,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift,
    "atan2": torch.atan2,
    "where": torch.where,
}
"""The meaning of every pointwise operation; `cast` and `bitcast` need dtypes and stand in the interpreter."""
