"""A kernel as a few calls of ATen: what may run in its place where the library is faster for a number of rows.

Only kernels whose every operation is one of `FUNCTIONS` have such a form, with products of weights that are plain
float32 numbers. A weight in a stored format is no candidate: ATen would need it decoded, 4 to 8 times its bytes.
The form is plain data, so a plan from the cache has it too; it names functions of the table and can do nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import sympy
import torch
from torch import Tensor, fx

from torchweld.codegen.ir import Kernel, MatmulPart
from torchweld.codegen.lower import LoweredGroup
from torchweld.graph.groups import Group, has_tensor
from torchweld.graph.meaning.context import Unsupported, scalar_expr
from torchweld.graph.terms import Expr

aten = torch.ops.aten

LINEAR: Final = "aten.linear.default"
FUNCTIONS: Final[Mapping[str, tuple[torch._ops.OpOverload, torch._ops.OpOverload | None]]] = {
    str(function): (function, out)
    for function, out in (
        (aten.linear.default, None),
        (aten.layer_norm.default, None),
        (aten.rms_norm.default, None),
        (aten.gelu.default, aten.gelu.out),
        (aten.silu.default, aten.silu.out),
        (aten.relu.default, aten.relu.out),
        (aten.tanh.default, aten.tanh.out),
        (aten.sigmoid.default, aten.sigmoid.out),
        (aten.add.Tensor, aten.add.out),
        (aten.sub.Tensor, aten.sub.out),
        (aten.mul.Tensor, aten.mul.out),
        (aten.div.Tensor, aten.div.out),
        (aten.reshape.default, None),
        (aten.permute.default, None),
    )
}
"""Functions without effects, each with its form that writes to a given tensor where there is one."""


@dataclass(frozen=True)
class Operation:
    """One call. arguments: JSON of [args, kwargs]; {"value": n} is the nth value, {"size": n} the nth size."""

    function: str
    arguments: str


@dataclass(frozen=True)
class Product:
    """A product with a weight: which operation, which input the weight [columns, depth] is."""

    operation: int
    weight: int
    columns: int
    depth: int


@dataclass(frozen=True)
class LibraryCall:
    """What a kernel computes, in ATen. Values are numbered: the kernel's inputs, then the results of the operations.

    sizes: what the operations need of sizes.  results: the value of every written buffer, in the kernel's order.
    rows: that meet the weights.  ValueError for data that contradicts itself.
    """

    inputs: int
    operations: tuple[Operation, ...]
    sizes: tuple[Expr, ...]
    results: tuple[int, ...]
    products: tuple[Product, ...]
    rows: Expr

    def __post_init__(self) -> None:
        for number, operation in enumerate(self.operations):
            if operation.function not in FUNCTIONS:
                raise ValueError(
                    f"operation {number}: {operation.function} is none of {', '.join(FUNCTIONS)}"
                )
            for kind, at in _references(json.loads(operation.arguments)):
                if not 0 <= at < (self.inputs + number if kind == "value" else len(self.sizes)):
                    raise ValueError(f"operation {number}: there is no {kind} {at} before it")
        last = self.inputs + len(self.operations)
        if not self.results or not all(self.inputs <= result < last for result in self.results):
            raise ValueError(f"results {self.results}: expected numbers of operations")
        for product in self.products:
            if not 0 <= product.operation < len(self.operations) or not 0 <= product.weight < self.inputs:
                raise ValueError(f"{product} is no product of these operations")


def library_call(group: Group, lowered: LoweredGroup) -> LibraryCall | str | None:
    """The ATen form of a group with a kernel, or a sentence why it has none; None for one without products."""
    kernel = lowered.kernel
    parts = [part for part in kernel.parts if isinstance(part, MatmulPart)]
    if not parts:
        return None
    if (reason := _why_not(kernel, group)) is not None:
        return reason
    rows = {
        math.prod([axis.extent for axis in (*part.batch, *part.rows)], start=sympy.Integer(1))
        for part in parts
    }
    if len(rows) > 1:
        return "its products have different numbers of rows"
    try:
        return _Writer(group, lowered).write(rows.pop())
    except _NoForm as reason:
        return str(reason)


class _NoForm(Exception):
    """The message says what of the group ATen is not asked for."""


def _why_not(kernel: Kernel, group: Group) -> str | None:
    """What of a kernel no call of ATen stands for."""
    stored = sorted({buffer.format for buffer in kernel.buffers if buffer.format is not None})
    if stored:
        return f"its weights are stored as {', '.join(stored)}: ATen would need them decoded"
    if kernel.indirects:
        return "it looks rows up in a table"
    if any(buffer.role == "update" for buffer in kernel.buffers):
        return "it updates a tensor of the caller in place"
    for node in (*group.inputs, *group.inside):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype != torch.float32:
            return f"{node.name} is {str(value.dtype).removeprefix('torch.')}, not float32"
    return None


class _Writer:
    """Writes the operations of one group."""

    def __init__(self, group: Group, lowered: LoweredGroup) -> None:
        self.group = group
        read = [group.inputs[position] for position in lowered.input_positions]
        self.numbers = {node: number for number, node in enumerate(read)}
        self.inputs = len(read)
        self.sizes: dict[Expr, int] = {}
        self.operations: list[Operation] = []
        self.products: list[Product] = []

    def write(self, rows: Expr) -> LibraryCall:
        """The whole group. Raises _NoForm."""
        for node in self.group.inside:
            if str(node.target) not in FUNCTIONS:
                raise _NoForm(f"{node.target} is not among the operations that ATen is asked for")
            if str(node.target) == LINEAR:
                self._product(node)
            arguments = json.dumps([self._plain(list(node.args)), self._plain(dict(node.kwargs))])
            self.numbers[node] = self.inputs + len(self.operations)
            self.operations.append(Operation(str(node.target), arguments))
        if not self.products:
            raise _NoForm("its products are not with weights")
        results = tuple(self.numbers[node] for node in self.group.outputs)
        operations, products = tuple(self.operations), tuple(self.products)
        return LibraryCall(self.inputs, operations, tuple(self.sizes), results, products, rows)

    def _product(self, node: fx.Node) -> None:
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or weight not in self.numbers:
            raise _NoForm(f"{node.name} is no product with a weight of the model")
        columns, depth = (int(extent) for extent in weight.meta["val"].shape)
        self.products.append(Product(len(self.operations), self.numbers[weight], columns, depth))

    def _plain(self, value: object) -> object:
        """An argument as JSON has it."""
        if isinstance(value, (list, tuple)):
            return [self._plain(part) for part in value]
        if isinstance(value, dict):
            return {name: self._plain(part) for name, part in value.items()}
        if (
            value is None
            or type(value) in (bool, int, str)
            or (type(value) is float and math.isfinite(value))
        ):
            return value
        if isinstance(value, fx.Node) and has_tensor(value):
            if value not in self.numbers:
                raise _NoForm(f"it reads {value.name} only for its shape")
            return {"value": self.numbers[value]}
        if isinstance(value, (fx.Node, torch.SymInt)):
            try:
                return {"size": self.sizes.setdefault(scalar_expr(value), len(self.sizes))}
            except Unsupported as problem:
                raise _NoForm(str(problem)) from problem
        raise _NoForm(f"{value!r} is an argument that ATen is not given")


def _references(value: object) -> Iterator[tuple[str, int]]:
    """The values and sizes that the arguments name. ValueError for anything else that is not plain."""
    if isinstance(value, list):
        for part in value:
            yield from _references(part)
    elif isinstance(value, dict) and set(value) in ({"value"}, {"size"}):
        kind, at = next(iter(value.items()))
        if type(at) is not int:
            raise ValueError(f"{value} names no {kind}")
        yield kind, at
    elif isinstance(value, dict):
        for part in value.values():
            yield from _references(part)
