"""Values that only packed products read: stored as these products round them, and computed no more exactly than that.

A product in bfloat16 or int8 rounds its rows to 8 bits when it reads them. Where every reader of a value is such a
product, and takes it as it is,

* with weights in bfloat16 the value is stored in bfloat16: the same rounding, once and earlier, and half of the
  traffic (bits stay). Only where the CPU has AMX tiles, which take any number of rows: else a few are multiplied in
  float.
* with weights in int8 it stays float32, for a row is quantized by its least and greatest number.
* an erf that goes into it is the short one (runtime/scalar.h: within 3e-5). In an encoder GELU's results are such.

A value that is an output, that torch reads, or that some kernel reads in any other way, stays as it is. Like packing
this is a property of the CPU executable: the plan that others see, its dumps and the interpreter do not know it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Final

import torch

from torchweld.codegen.cpp_packed import Precision
from torchweld.codegen.instructions import chosen_path, cpu_features
from torchweld.codegen.ir import AttentionPart, Buffer, Kernel, MatmulPart, Part, Store
from torchweld.codegen.packed_plan import kernel_terms, walked_row
from torchweld.codegen.packing import WHOLE
from torchweld.codegen.plan import EagerStep, Launch, Plan
from torchweld.graph.terms import Contract, Load, Op, Term, children, rebuild, walk

_TILES: Final = frozenset({"amx_tile", "amx_bf16", "avx512_bf16"})
_SHORT: Final = {"erf": "erf_short"}


def narrowed(plan: Plan, formats: Mapping[str, str], precision: Precision) -> Plan:
    """The plan with those of its values narrow that may be. formats: of its packed weights, by name."""
    names = narrow_values(plan, formats, precision)
    if not names:
        return plan
    stored = torch.bfloat16 if precision == "bf16" else torch.float32
    done: dict[tuple[int, tuple[str, ...]], Kernel] = {}

    def narrow(launch: Launch) -> Launch:
        pairs = zip(launch.kernel.buffers, launch.arguments, strict=True)
        own = tuple(buffer.name for buffer, name in pairs if name in names)
        key = (id(launch.kernel), own)
        if own and key not in done:
            done[key] = _narrow_kernel(launch.kernel, own, stored)
        return replace(launch, kernel=done[key]) if own else launch

    steps = tuple(narrow(step) if isinstance(step, Launch) else step for step in plan.steps)
    values = {n: replace(spec, dtype=stored) if n in names else spec for n, spec in plan.values.items()}
    return replace(plan, steps=steps, values=values)


def narrow_values(plan: Plan, formats: Mapping[str, str], precision: Precision) -> frozenset[str]:
    """The values of the plan that only products in `precision` with packed plain weights read."""
    wanted = {"bf16": "BF16", "int8": WHOLE}.get(precision)
    if wanted is None or (precision == "bf16" and not _has_tiles()):
        return frozenset()
    kept = set(plan.outputs) | set(plan.in_place)
    written: set[str] = set()
    read: set[str] = set()
    for step in plan.steps:
        if isinstance(step, EagerStep):
            kept |= {*step.arguments, *step.results}
            continue
        rounded = _rounded(step, formats, wanted)
        simple = _stored(step.kernel)
        for buffer, name in zip(step.kernel.buffers, step.arguments, strict=True):
            if buffer.is_written:
                written.add(name)
                kept |= {name} - ({name} if buffer.name in simple else set())
            else:
                read.add(name)
                kept |= {name} - ({name} if buffer.name in rounded else set())
    return frozenset((written & read) - kept)


def _has_tiles() -> bool:
    return chosen_path() == "native" and cpu_features() >= _TILES


def _stored(kernel: Kernel) -> set[str]:
    """The outputs in float32 that rows and products write: an attention has stores of its own."""
    others = {
        store.buffer for part in kernel.parts if isinstance(part, AttentionPart) for store in part.stores
    }
    return {b.name for b in kernel.buffers if b.role == "output" and b.dtype == torch.float32} - others


def _rounded(launch: Launch, formats: Mapping[str, str], wanted: str) -> set[str]:
    """The buffers of a launch that it reads as rows of packed products only."""
    weights = dict(zip((buffer.name for buffer in launch.kernel.buffers), launch.arguments, strict=True))
    as_rows: set[int] = set()
    for part in launch.kernel.parts:
        if isinstance(part, MatmulPart):
            contracts = [bind.term for bind in part.contracts if isinstance(bind.term, Contract)]
            rows = [walked_row(contract) for contract in contracts]
            packed = [
                row is not None
                and launch.kernel.buffer(row.buffer).format is None
                and formats.get(weights[row.buffer]) == wanted
                for row in rows
            ]
            if all(packed):
                as_rows |= {id(contract.a) for contract in contracts if isinstance(contract.a, Load)}
    found: set[str] = set()
    otherwise: set[str] = set()
    for term in kernel_terms(launch.kernel):
        if isinstance(term, Load):
            (found if id(term) in as_rows else otherwise).add(term.buffer)
    return found - otherwise


def _narrow_kernel(kernel: Kernel, names: Collection[str], stored: torch.dtype) -> Kernel:
    """The kernel with the buffers `names` of dtype `stored`, and what goes into them computed in short."""

    def buffer(old: Buffer) -> Buffer:
        return replace(old, dtype=stored) if old.name in names else old

    def stores(old: tuple[Store, ...]) -> Iterator[Store]:
        for store in old:
            yield replace(store, value=_short(store.value)) if store.buffer in names else store

    def part(old: Part) -> Part:
        return old if isinstance(old, AttentionPart) else replace(old, stores=tuple(stores(old.stores)))

    return replace(kernel, buffers=tuple(map(buffer, kernel.buffers)), parts=tuple(map(part, kernel.parts)))


def _short(root: Term) -> Term:
    """The value with the short form of every operation that has one."""
    if not any(isinstance(term, Op) and term.name in _SHORT for term in walk(root)):
        return root
    done: dict[int, Term] = {}
    for term in walk(root):
        new = [done[id(child)] for child in children(term)]
        if isinstance(term, Op) and term.dtype == torch.float32:
            done[id(term)] = Op(term.dtype, _SHORT.get(term.name, term.name), tuple(new))
        else:
            done[id(term)] = rebuild(term, new)
    return done[id(root)]
