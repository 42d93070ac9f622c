"""Runs of ATen in the place of launches, inside an executable: which launches at which sizes, and the calls themselves.

Rows come in buckets, one per power of two; what was measured for one number of rows serves its bucket. Up to 64 rows a
launch is never replaced, so that a row keeps its bits whatever the number of rows that a step of decoding verifies.

Where the precision is not f32, products are computed from bfloat16 copies of the weights, made when they are first used
and again when somebody wrote to a weight; everything around the products stays in float32. Results are written to
the places that the launch would have written.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from torchweld.codegen.cpp_packed import Precision
from torchweld.codegen.library_call import FUNCTIONS, LINEAR, LibraryCall
from torchweld.codegen.plan import EagerStep, Launch, Plan, SizeTable

MOST_OWN_ROWS: Final = 64
"""Up to this number of rows a launch always runs itself."""


def bucket_of(rows: int) -> int:
    """The bucket of a number of rows: rows from 2^(b-1) to 2^b - 1 are in bucket b."""
    return rows.bit_length()


@dataclass(frozen=True)
class LibraryLaunch:
    """A launch that ATen runs at the sizes at hand; `arguments` are those of the operations, with sizes as numbers."""

    launch: Launch
    call: LibraryCall
    arguments: tuple[tuple[list[Any], dict[str, Any]], ...]


Segment = tuple[Launch, ...] | EagerStep | LibraryLaunch


class LibraryRuns:
    """What of a plan runs through ATen: nothing until `choose` says so."""

    def __init__(self, plan: Plan, precision: Precision) -> None:
        self._plan = plan
        self._narrow = precision != "f32"
        self._chosen: dict[str, frozenset[int]] = {}
        self._copies: dict[str, tuple[int, Tensor]] = {}

    @property
    def chosen(self) -> Mapping[str, frozenset[int]]:
        """Buckets of rows by kernel."""
        return dict(self._chosen)

    def choose(self, chosen: Mapping[str, Collection[int]]) -> None:
        """From now on these kernels run through ATen for rows of these buckets. KeyError for one without that form."""
        for name in chosen:
            self._plan.library[name]
        self._chosen = {name: frozenset(buckets) for name, buckets in chosen.items()}
        if not chosen:
            self._copies = {}

    def segments(self, table: SizeTable) -> Iterator[Segment]:
        """The steps of the plan at these sizes, with neighbouring launches of our own together."""
        together: list[Launch] = []
        for step in self._plan.steps:
            if isinstance(step, Launch) and not self._is_chosen(step, table):
                together.append(step)
                continue
            if together:
                yield tuple(together)
                together = []
            yield self.prepare(step, table) if isinstance(step, Launch) else step
        if together:
            yield tuple(together)

    def _is_chosen(self, launch: Launch, table: SizeTable) -> bool:
        buckets = self._chosen.get(launch.kernel.name)
        if not buckets:
            return False
        rows = table(self._plan.library[launch.kernel.name].rows)
        return rows > MOST_OWN_ROWS and bucket_of(rows) in buckets

    def prepare(self, launch: Launch, table: SizeTable) -> LibraryLaunch:
        """The launch as calls of ATen at these sizes."""
        call = self._plan.library[launch.kernel.name]
        sizes = [table(expr) for expr in call.sizes]
        arguments = []
        for operation in call.operations:
            args, kwargs = _fill(json.loads(operation.arguments), sizes)
            arguments.append((args, kwargs))
        return LibraryLaunch(launch, call, tuple(arguments))

    def run(self, step: LibraryLaunch, inputs: Sequence[Tensor], places: Sequence[Tensor]) -> None:
        """Compute the launch. inputs: what its kernel reads, in its order; places: what it writes, contiguous."""
        call = step.call
        values: list[Tensor] = list(inputs)
        read = step.launch.read()
        weights = {product.operation: product.weight for product in call.products}
        wanted = dict(zip(call.results, places, strict=True))
        with torch.no_grad():
            for number, operation in enumerate(call.operations):
                args, kwargs = (
                    _values(step.arguments[number][0], values),
                    _values(step.arguments[number][1], values),
                )
                place = wanted.get(len(values))
                # A value that is stored narrow (narrow_plan.py) is computed in float32 and rounded once.
                out = place if place is None or place.dtype == torch.float32 else None
                if operation.function == LINEAR:
                    name = read[weights[number]]
                    copy = self._copy(name, args[1]) if self._narrow else None
                    values.append(_linear(args, copy, out))
                else:
                    values.append(_call(operation.function, args, kwargs, out))
                if out is not place and place is not None:
                    place.copy_(values[-1])

    def copied_bytes(self, kernel: str) -> int:
        """Bytes of the weights in bfloat16 that ATen needs for all launches of `kernel`, beside the packed ones."""
        if not self._narrow:
            return 0
        call = self._plan.library[kernel]
        launches = [launch for launch in self._plan.launches() if launch.kernel.name == kernel]
        names = {launch.read()[product.weight] for launch in launches for product in call.products}
        return sum(2 * self._plan.constants[name].numel() for name in names)

    def _copy(self, name: str, weight: Tensor) -> Tensor:
        version = 0 if weight.is_inference() else weight._version
        known = self._copies.get(name)
        if known is None or known[0] != version:
            self._copies[name] = known = version, weight.to(torch.bfloat16)
        return known[1]


def _call(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor | None) -> Tensor:
    """One of FUNCTIONS, into `out` where that is given."""
    function, writing = FUNCTIONS[name]
    if out is not None and writing is not None:
        writing(*args, **kwargs, out=out)
        return out
    value: Tensor = function(*args, **kwargs)
    return value if out is None else out.copy_(value)


def _linear(args: Sequence[Tensor | None], narrow: Tensor | None, out: Tensor | None) -> Tensor:
    """x [..., k], weight [n, k], bias [n] or none -> [..., n]; with `narrow`, from x and the weight in bfloat16."""
    x, weight, bias = (*args, None)[:3]
    assert x is not None and weight is not None
    if out is None:
        out = weight.new_empty((*x.shape[:-1], weight.shape[0]))  # x may be bfloat16 (narrow_plan.py)
    rows, flat = x.reshape(-1, x.shape[-1]), out.view(-1, weight.shape[0])
    if narrow is not None:
        flat.copy_(rows.to(torch.bfloat16) @ narrow.t())
        if bias is not None:
            flat += bias
    elif bias is None:
        torch.mm(rows, weight.t(), out=flat)
    else:
        torch.addmm(bias, rows, weight.t(), out=flat)
    return out


def _fill(value: Any, sizes: Sequence[int]) -> Any:
    """The arguments with numbers for sizes."""
    return _replaced(value, "size", sizes)


def _values(value: Any, values: Sequence[Tensor]) -> Any:
    """The arguments with tensors for values."""
    return _replaced(value, "value", values)


def _replaced(value: Any, kind: str, by: Sequence[object]) -> Any:
    """The arguments with entries of `by` where they say {kind: number}."""
    if isinstance(value, list):
        return [_replaced(part, kind, by) for part in value]
    if isinstance(value, dict):
        if set(value) == {kind}:
            return by[value[kind]]
        return {name: _replaced(part, kind, by) for name, part in value.items()}
    return value
