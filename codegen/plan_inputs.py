"""The inputs of a call against the plan: number, dtype, device, rank, the sizes that their shapes say, their places."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from operator import attrgetter, call, is_

import torch
from torch import Tensor

from torchweld.codegen.plan import Launch, Plan, PlanError, ValueSpec
from torchweld.graph.index import evaluate

# Called by map: a loop over the hundred tensors of a cache costs as much as a small kernel.
_REQUIRES_GRAD = attrgetter("requires_grad")
shape_of = attrgetter("shape")


class ShapeError(ValueError):
    """An input of a shape that the plan does not serve; names the input, the dimension and what was expected."""


class InputChecks:
    """Checks the tensors of a call: number, type, device, dtype, rank; what is updated in place, more strictly.

    A cache hands over the same tensors at every step: where those of the last call come again (the same objects with
    their addresses and shapes), they are not looked at one by one.
    """

    def __init__(self, plan: Plan) -> None:
        self._specs = tuple(plan.inputs)
        sources = set(plan.in_place.values())
        self.updated = tuple(number for number, spec in enumerate(plan.inputs) if spec.name in sources)
        self.read_only = tuple(number for number, spec in enumerate(plan.inputs) if spec.name not in sources)
        self._known: list[weakref.ref[Tensor]] = []
        self._known_places: tuple[list[int], list[torch.Size]] = ([], [])

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """The inputs, detached and contiguous; and whether an updated one is another than at the last call.

        Raises TypeError for a wrong number, type, device or dtype, ShapeError for a wrong rank, ValueError for an input
        updated in place that is not contiguous or has the memory of another.
        """
        if len(inputs) != len(self._specs):
            names = ", ".join(spec.name for spec in self._specs)
            raise TypeError(f"expected {len(self._specs)} inputs ({names}), got {len(inputs)}")
        tensors = list(inputs)
        for number in self.read_only:
            _check_tensor(number, self._specs[number], inputs[number])
            if inputs[number].requires_grad or not inputs[number].is_contiguous():
                tensors[number] = inputs[number].detach().contiguous()
        updated = [tensors[number] for number in self.updated]
        moved = not self._are_known(updated)
        if moved:
            self._check_updated(updated)
        if any(map(_REQUIRES_GRAD, updated)):
            for number in self.updated:
                tensors[number] = tensors[number].detach()
        return tensors, moved

    def forget(self) -> None:
        """The launches were told of other inputs in between: look at each of the next call."""
        self._known = []

    def _are_known(self, updated: Sequence[Tensor]) -> bool:
        if not self._known or not all(map(is_, map(call, self._known), updated)):
            return False
        return _places(updated) == self._known_places and all(map(Tensor.is_contiguous, updated))

    def _check_updated(self, updated: Sequence[Tensor]) -> None:
        self._known = []
        seen: dict[int, str] = {}
        for number, tensor in zip(self.updated, updated, strict=True):
            spec = self._specs[number]
            where = f"input {number} ({spec.name}), which is updated in place"
            _check_tensor(number, spec, tensor)
            if not tensor.is_contiguous():
                strides = tuple(tensor.stride())
                raise ValueError(
                    f"{where}: expected a contiguous tensor, got strides {strides}; call .contiguous()"
                )
            twin = seen.setdefault(tensor.data_ptr(), spec.name) if tensor.numel() else spec.name
            if twin != spec.name:
                raise ValueError(f"{where}: expected memory of its own, got that of {twin}")
        self._known, self._known_places = list(map(weakref.ref, updated)), _places(updated)


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], list[torch.Size]]:
    """Addresses and shapes."""
    return list(map(Tensor.data_ptr, tensors)), list(map(shape_of, tensors))


def _check_tensor(number: int, spec: ValueSpec, tensor: Tensor) -> None:
    if isinstance(tensor, Tensor) and tensor.is_cpu and tensor.layout is torch.strided:
        if tensor.dtype == spec.dtype and tensor.dim() == len(spec.shape):
            return
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


def number_slots(plan: Plan) -> dict[str, int]:
    """A place in the pointer table for every value that a launch may touch."""
    names = [spec.name for spec in plan.inputs] + list(plan.constants)
    for step in plan.steps:
        names += step.written() if isinstance(step, Launch) else step.results
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def input_slots(plan: Plan, slots: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    """Of every input its places in the pointer table: its own, and that of what is written over it."""
    written: dict[str, list[int]] = {}
    for name, source in plan.in_place.items():
        written.setdefault(source, []).append(slots[name])
    return tuple((slots[spec.name], *written.get(spec.name, ())) for spec in plan.inputs)


def _shape_text(spec: ValueSpec) -> str:
    return "(" + ", ".join(str(extent) for extent in spec.shape) + ")"
