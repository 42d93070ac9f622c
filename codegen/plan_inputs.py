"""The inputs of a call against the plan: number, dtype, device, rank, and the sizes that their shapes say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.codegen.plan import Plan, PlanError, ValueSpec
from torchweld.graph.index import evaluate


class ShapeError(ValueError):
    """An input of a shape that the plan does not serve; names the input, the dimension and what was expected."""


def check_tensors(plan: Plan, inputs: Sequence[Tensor]) -> None:
    """Raise TypeError or ShapeError unless number, type, device, dtype and rank of `inputs` are those of the plan."""
    if len(inputs) != len(plan.inputs):
        names = ", ".join(spec.name for spec in plan.inputs)
        raise TypeError(f"expected {len(plan.inputs)} inputs ({names}), got {len(inputs)}")
    for number, (spec, tensor) in enumerate(zip(plan.inputs, inputs, strict=True)):
        where = f"input {number} ({spec.name})"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise TypeError(
                f"{where}: expected a dense tensor on the CPU, got {tensor.layout} on {tensor.device}"
            )
        if tensor.dtype != spec.dtype:
            raise TypeError(f"{where}: expected {spec.dtype}, got {tensor.dtype}")
        if tensor.dim() != len(spec.shape):
            raise ShapeError(f"{where}: expected shape {_shape_text(spec)}, got {tuple(tensor.shape)}")


def check_updated(plan: Plan, inputs: Sequence[Tensor]) -> None:
    """Raise ValueError unless every input that is updated in place is contiguous and memory of its own."""
    updated = set(plan.in_place.values())
    seen: dict[int, str] = {}
    for number, (spec, tensor) in enumerate(zip(plan.inputs, inputs, strict=True)):
        if spec.name not in updated:
            continue
        where = f"input {number} ({spec.name}), which is updated in place"
        if not tensor.is_contiguous():
            strides = tuple(tensor.stride())
            raise ValueError(
                f"{where}: expected a contiguous tensor, got strides {strides}; call .contiguous()"
            )
        twin = seen.setdefault(tensor.data_ptr(), spec.name) if tensor.numel() else spec.name
        if twin != spec.name:
            raise ValueError(f"{where}: expected memory of its own, got that of {twin}")


def bind_sizes(plan: Plan, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The value of every size, from the input dimensions that are exactly it; every dimension is checked.

    Raises ShapeError where dimensions contradict each other, PlanError for a size that no dimension gives.
    """
    sizes: dict[str, int] = {}
    for spec, shape in zip(plan.inputs, shapes, strict=True):
        for extent, given in zip(spec.shape, shape, strict=True):
            if extent.is_Symbol and str(extent) in plan.sizes:
                sizes.setdefault(str(extent), given)
    if missing := [size for size in plan.sizes if size not in sizes]:
        raise PlanError(
            f"sizes {missing} are no input's dimension; inputs: {[_shape_text(s) for s in plan.inputs]}"
        )
    for number, (spec, shape) in enumerate(zip(plan.inputs, shapes, strict=True)):
        for dimension, (extent, given) in enumerate(zip(spec.shape, shape, strict=True)):
            expected = evaluate(extent, sizes)
            if expected != given:
                known = ", ".join(f"{name} = {value}" for name, value in sizes.items())
                note = f" (here {expected}, with {known})" if extent.free_symbols else ""
                raise ShapeError(
                    f"input {number} ({spec.name}), dimension {dimension}: expected {extent}{note}, got {given};"
                    f" the whole shape is {shape}, expected {_shape_text(spec)}"
                )
    return sizes


def _shape_text(spec: ValueSpec) -> str:
    return "(" + ", ".join(str(extent) for extent in spec.shape) + ")"
