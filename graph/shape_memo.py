"""Remember what shape rules gave: in a model of equal layers almost every one is asked again.

    memo = ShapeMemo()
    value = memo.run(op, fake_args, fake_kwargs)

A shape rule under a FakeTensorMode depends on the op, on dtype, device, sizes, strides and offset of its operands, and
on plain arguments; with symbolic sizes it costs milliseconds.  What is remembered is the very meta value, so nodes of
equal shapes share one FakeTensor: metas are read and never written.  Operands that say more (constants with a value,
sparse or quantized tensors, size arithmetic) are not remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

PLAIN: Final = (
    bool,
    int,
    float,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class _Unknown(Exception):
    """An operand that has no key."""


class ShapeMemo:
    """Of one FakeTensorMode; results of torch's ops that are one tensor.  recalled: how many were not run again."""

    def __init__(self) -> None:
        self._known: dict[Hashable, FakeTensor] = {}
        self.recalled = 0

    def run(
        self, target: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> object:
        """`target(*args, **kwargs)`, or what it gave for such operands before."""
        key = _key(target, args, kwargs)
        if key in self._known:
            self.recalled += 1
            return self._known[key]
        value = target(*args, **kwargs)
        if key is not None and isinstance(value, FakeTensor) and value.constant is None:
            self._known[key] = value
        return value


def _key(
    target: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Hashable | None:
    if not isinstance(target, torch._ops.OpOverload):
        return None
    try:
        return (target, _part(args), tuple((name, _part(value)) for name, value in sorted(kwargs.items())))
    except _Unknown:
        return None


def _part(value: object) -> Hashable:
    if isinstance(value, FakeTensor):
        return _tensor(value)
    if isinstance(value, torch.SymInt):
        return ("size", value.node.expr)
    if isinstance(value, (tuple, list)):  # an fx graph holds immutable lists
        return (isinstance(value, tuple), *map(_part, value))
    if isinstance(value, PLAIN):
        return (type(value), repr(value) if isinstance(value, float) else value)  # 0.0 and -0.0 are equal
    raise _Unknown


def _tensor(value: FakeTensor) -> Hashable:
    if value.constant is not None or value.layout != torch.strided or value.is_quantized:
        raise _Unknown
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    numbers = (size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)
    return ("tensor", value.dtype, value.device, value.requires_grad, type(value), *numbers)
