"""Which weights of a plan are packed, and its kernels as they read packed weights.

A constant is packed if a matmul walks along its rows, whole groups of 16 of them, and nobody wants its stored bytes:
no eager step, no output, no kernel that loads from it as from plain numbers. Kernels that look up single rows read
the packed layout too. Weights that are plain numbers are packed as they are, in bfloat16, or in int8 with one scale
per row, as the precision says. The plan, its dumps and the other printers keep the stored layout: packing is a
property of the CPU executable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchweld.codegen.cache import Cache
from torchweld.codegen.cpp_packed import Precision
from torchweld.codegen.ir import (
    AttentionPart,
    Bind,
    Buffer,
    Kernel,
    MatmulPart,
    Part,
    RowPart,
    Store,
    part_binds,
)
from torchweld.codegen.packing import (
    GROUP,
    LAYOUT,
    STORED,
    WHOLE,
    WHOLE_MOST_COLUMNS,
    Packing,
    columns_of,
    shared_packer,
)
from torchweld.codegen.plan import EagerStep, Launch, Plan
from torchweld.codegen.release_pages import release_file_pages, release_free_memory
from torchweld.codegen.version_counters import one_of_each_counter, version_of
from torchweld.graph.formats import get_format
from torchweld.graph.terms import Axis, Contract, Decode, Expr, Load, Op, Term, children, rebuild, walk

_NUMBERS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_LEAST_ROWS = 64  # below, the rows that fill up the last group may be a good part of the weight


def find_packings(plan: Plan, precision: Precision = "f32") -> dict[str, Packing]:
    """The constants of `plan` to pack, by name, in the order in which launches first read them."""
    kept = set(plan.outputs)
    for step in plan.steps:
        if isinstance(step, EagerStep):
            kept |= set(step.arguments)
    refused: set[str] = set()
    found: dict[str, Packing] = {}
    known: dict[int, dict[str, bool | None]] = {}
    for launch in plan.launches():
        if id(launch.kernel) not in known:
            known[id(launch.kernel)] = _uses(launch.kernel)
        uses = known[id(launch.kernel)]
        for buffer, name in zip(launch.kernel.buffers, launch.arguments, strict=True):
            tensor = plan.constants.get(name)
            if tensor is None or buffer.name not in uses:
                continue
            format_ = _packed_format(buffer, tensor, uses[buffer.name], precision)
            if name in kept or format_ is None:
                refused.add(name)
            elif uses[buffer.name]:
                found.setdefault(name, Packing(tensor, format_))
    return {name: packing for name, packing in found.items() if name not in refused}


def _packed_format(buffer: Buffer, tensor: Tensor, use: bool | None, precision: Precision) -> str | None:
    """The stored format that the weight is packed in; None if it stays as it is."""
    if use is None or tensor.device.type != "cpu" or tensor.ndim != 2 or tensor.shape[0] < _LEAST_ROWS:
        return None
    if not tensor.shape[1] or tuple(buffer.shape) != tuple(tensor.shape):
        return None
    if buffer.format is not None:
        return buffer.format if buffer.format in STORED and tensor.dtype == torch.uint8 else None
    if not use or tensor.dtype not in _NUMBERS:
        return None
    if precision == "int8" and tensor.shape[1] <= WHOLE_MOST_COLUMNS:
        return WHOLE
    return _NUMBERS[tensor.dtype] if precision == "f32" else "BF16"


def _uses(kernel: Kernel) -> dict[str, bool | None]:
    """Per weight: True if a matmul walks along its rows, False if they are looked up, None if it must stay."""
    uses: dict[str, bool | None] = {}
    products: dict[int, tuple[Axis, Expr]] = {}
    for part in (part for part in kernel.parts if isinstance(part, MatmulPart)):
        for bind in part.contracts:
            if isinstance(bind.term, Contract) and (row := walked_row(bind.term)) is not None:
                products[id(row)] = (part.n, bind.term.k.extent)
    for term in kernel_terms(kernel):
        if not isinstance(term, Decode | Load) or uses.get(term.buffer, False) is None:
            continue
        use = _use(kernel.buffer(term.buffer), term, products.get(id(term)))
        uses[term.buffer] = use if use is None else uses.get(term.buffer, False) or use
    return uses


def _use(buffer: Buffer, term: Decode | Load, product: tuple[Axis, Expr] | None) -> bool | None:
    """As `_uses`, of one reading of the buffer, which is an operand of `product` (n, depth)."""
    row = term.row if isinstance(term, Decode) else term.index[:-1]
    stored = isinstance(term, Decode)
    if len(row) != 1 or (buffer.format is not None) != stored:
        return None
    if product is None:
        return False if stored else None
    n, depth = product
    columns = columns_of(term.format, int(buffer.shape[-1])) if isinstance(term, Decode) else buffer.shape[-1]
    start = row[0] - n.symbol
    return True if depth == columns and start.is_Integer and int(start) % GROUP == 0 else None


def walked_row(contract: Contract) -> Decode | Load | None:
    """The weight whose rows the contract reads from end to end as its second operand, if it is one."""
    term = contract.b
    if isinstance(term, Op) and term.name == "cast" and term.dtype == torch.float32:
        term = term.args[0]
    if not isinstance(term, Decode | Load) or contract.dtype == torch.float64:
        return None
    k = contract.k.symbol
    *row, column = (*term.row, term.column) if isinstance(term, Decode) else term.index
    whole = column == k and not any(k in expr.free_symbols for expr in row)
    return term if whole else None


class PackedConstants:
    """The packed weights of one executable: `data` by name, uint8 as runtime/packed.h lays them out."""

    def __init__(
        self, plan: Plan, threads: int, cache: Cache, precision: Precision = "f32", *, keep: bool = False
    ) -> None:
        """Pack what `find_packings` finds; keep: look for it in `cache` first. Raises ToolchainError."""
        self._keep = cache if keep else None
        self._packings = find_packings(plan, precision)
        self._threads = threads
        self._packer = shared_packer(cache) if self._packings else None
        self.data: dict[str, Tensor] = {}
        # Tensors made in inference mode have no version.
        watched = [p.tensor for p in self._packings.values() if not p.tensor.is_inference()]
        self._watched = one_of_each_counter(watched)
        self._versions = 0
        self._pack()

    @property
    def formats(self) -> dict[str, str]:
        """The format of every packed weight by its name."""
        return {name: packing.format for name, packing in self._packings.items()}

    def _pack(self) -> None:
        if self._packer is not None:
            packed = self._packer.pack(tuple(self._packings.values()), self._threads, self._keep)
            self.data = dict(zip(self._packings, packed, strict=True))
            self._versions = self._current()
            self.release_stored()
            release_free_memory()

    def release_stored(self) -> int:
        """Drop the pages of the model's file that are needed no longer; bytes. They come back if they are read."""
        return release_file_pages([packing.tensor for packing in self._packings.values()])

    def _current(self) -> int:
        return sum(map(version_of, self._watched))  # versions only grow

    def renewed(self) -> dict[str, Tensor]:
        """What had to be packed again, because somebody wrote to the weights."""
        if self._versions == self._current():
            return {}
        before = self.data
        self._pack()
        return {name: data for name, data in self.data.items() if data is not before[name]}

    def kernels(self, launches: Sequence[Launch]) -> list[Kernel]:
        """The kernels of the launches as they read the packed weights."""
        done: dict[object, Kernel] = {}
        return [self._kernel(launch, done) for launch in launches]

    def _kernel(self, launch: Launch, done: dict[object, Kernel]) -> Kernel:
        pairs = zip(launch.kernel.buffers, launch.arguments, strict=True)
        packed = {buffer.name: self._packings[name].format for buffer, name in pairs if name in self.data}
        if not packed:
            return launch.kernel
        key = (id(launch.kernel), tuple(packed))
        if key not in done:
            done[key] = _rewrite(launch.kernel, packed)
        return done[key]


def _rewrite(kernel: Kernel, packed: Mapping[str, str]) -> Kernel:
    """The kernel with the buffers in `packed` read in the packed form of a stored format."""
    done: dict[int, Term] = {}

    def one(root: Term) -> Term:
        for term in walk(root):
            if id(term) in done:
                continue
            if isinstance(term, Decode) and term.buffer in packed:
                done[id(term)] = replace(term, format=LAYOUT + term.format)
            elif isinstance(term, Load) and term.buffer in packed:
                row, column = term.index
                format_ = LAYOUT + packed[term.buffer]
                done[id(term)] = Decode(torch.float32, format_, term.buffer, (row,), column)
            else:
                done[id(term)] = rebuild(term, [done[id(child)] for child in children(term)])
        return done[id(root)]

    def binds(old: tuple[Bind, ...]) -> tuple[Bind, ...]:
        return tuple(Bind(bind.name, one(bind.term)) for bind in old)

    def stores(old: tuple[Store, ...]) -> tuple[Store, ...]:
        return tuple(replace(store, value=one(store.value)) for store in old)

    def part(old: Part) -> Part:
        match old:
            case RowPart():
                return replace(old, binds=binds(old.binds), stores=stores(old.stores))
            case MatmulPart():
                row_binds, contracts = binds(old.row_binds), binds(old.contracts)
                choices, written = binds(old.choices), stores(old.stores)
                return replace(old, row_binds=row_binds, contracts=contracts, choices=choices, stores=written)
            case AttentionPart():
                return replace(old, attend=binds((old.attend,))[0], stores=stores(old.stores))

    buffers = tuple(_packed_buffer(buffer, packed.get(buffer.name)) for buffer in kernel.buffers)
    indirects = tuple(replace(indirect, term=one(indirect.term)) for indirect in kernel.indirects)
    return replace(kernel, buffers=buffers, indirects=indirects, parts=tuple(map(part, kernel.parts)))


def _packed_buffer(buffer: Buffer, format_: str | None) -> Buffer:
    """The argument for a packed weight; its shape is that of the stored bytes."""
    if format_ is None:
        return buffer
    rows, width = buffer.shape
    if buffer.format is None:
        width = width * (1 if format_ == WHOLE else get_format(format_).block_bytes)
    return replace(buffer, dtype=torch.uint8, shape=(rows, width), format=LAYOUT + format_)


def kernel_terms(kernel: Kernel) -> Iterator[Term]:
    """Every node of a kernel, the indices that depend on data included; shared nodes may come several times."""
    for indirect in kernel.indirects:
        yield from walk(indirect.term)
    for part in kernel.parts:
        for bind in part_binds(part):
            yield from walk(bind.term)
        for store in part.stores:
            yield from walk(store.value)
