"""Packing of stored weights for the CPU: 16 rows side by side, on memory with huge pages, once per weight.

The layout stands in runtime/packed.h, its making in runtime/pack.cpp. A packed weight is shared by all executables
of a process that read the same tensor, and lives as long as one of them holds it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from torchweld.codegen.cache import Cache
from torchweld.codegen.packed_store import LEAST_BYTES, PackedStore
from torchweld.codegen.release_pages import FilePages
from torchweld.codegen.toolchain import compile_shared, load
from torchweld.codegen.version_counters import one_of_each_counter
from torchweld.graph.formats import get_format

STORED: Final = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "I8")
"""The formats that can be packed; runtime/pack.cpp knows them by their position."""
WHOLE: Final = "I8"
"""Plain numbers packed in int8 with one scale per row; no file stores this (runtime/packed_whole.h)."""
WHOLE_MOST_COLUMNS: Final = 1 << 16
"""A sum of so many products of 8 bits fits 32 bits."""
LAYOUT: Final = "R16_"
"""What stands before the name of a stored format where its weight is packed."""
GROUP: Final = 16
_DENSE: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, WHOLE: torch.float32}
_HUGE_PAGE: Final = 2 << 20
_LINE: Final = 64
_PIECE: Final = 1 << 20  # bytes of a weight that a thread packs at a time
_SPAN: Final = 16 << 20  # bytes of a weight after which what was read of the model's file is dropped


def columns_of(format_: str, row_bytes: int) -> int:
    """Values of a row of `row_bytes` stored bytes; the name may be that of a packed format."""
    if format_.removeprefix(LAYOUT) == WHOLE:
        return row_bytes
    stored = get_format(format_.removeprefix(LAYOUT))
    return row_bytes // stored.block_bytes * stored.block


@dataclass(frozen=True)
class Packing:
    """A weight to pack: uint8 [rows, row_bytes] in `format`, or numbers [rows, columns] that are rounded to it."""

    tensor: Tensor
    format: str

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return self.tensor.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is handed to the packer."""
        width = self.tensor.shape[1]
        return width if self.tensor.dtype == torch.uint8 else width * _DENSE[self.format].itemsize

    @property
    def columns(self) -> int:
        """Values of one row."""
        stored = self.tensor.dtype == torch.uint8
        return columns_of(self.format, self.row_bytes) if stored else self.tensor.shape[1]


Place = tuple[object, ...]


@dataclass(frozen=True)
class _Packed:
    """A weight that was packed: as what, from which tensor, and how often that had been written to."""

    data: weakref.ref[Tensor]
    source: weakref.ref[Tensor]
    version: int

    def serves(self, tensor: Tensor) -> Tensor | None:
        """The packed form, if somebody still holds it and nobody wrote to the weight since; `tensor` is the source, or
        another tensor of the same memory, as every capture makes them."""
        source = self.source()
        if source is None or version(source) != self.version:
            return None
        if tensor is not source and version(tensor) != 0:
            if source.is_inference() or len(one_of_each_counter((tensor, source))) > 1:
                return None  # it counts writes that the source did not see
        return self.data()


class Packer:
    """The compiled packing functions, and the weights packed so far."""

    def __init__(self, cache: Cache) -> None:
        """Compile and load runtime/pack.cpp. Raises ToolchainError."""
        source = (Path(__file__).parent / "runtime" / "pack.cpp").read_text(encoding="utf-8")
        path = compile_shared(source, cache=cache, flags=("-fno-exceptions", "-fno-rtti"), name="pack")
        library = load(path, ("tw_pack", "tw_packed_bytes"))
        number, address = ctypes.c_int64, ctypes.c_void_p
        library.tw_packed_bytes.restype = number
        library.tw_packed_bytes.argtypes = (ctypes.c_int32, number, number)
        library.tw_pack.restype = None
        library.tw_pack.argtypes = (
            ctypes.c_int32, address, number, number, number, address, number, number,
        )  # fmt: skip
        self._library, self._source = library, source
        self._known: dict[Place, _Packed] = {}
        self._lock = threading.Lock()

    def nbytes(self, packing: Packing) -> int:
        """Bytes of the packed weight."""
        format_ = STORED.index(packing.format)
        return int(self._library.tw_packed_bytes(format_, packing.rows, packing.columns))

    def pack(self, weights: Sequence[Packing], threads: int, keep: Cache | None = None) -> tuple[Tensor, ...]:
        """The packed weights (uint8), in order; those that are packed already are not packed again.

        keep: where packed weights are looked for, and kept for the next process.
        """
        # Whoever notes which weights decided something (graph/value_reads.py) need not see that they are packed.
        with self._lock, torch._C.DisableTorchFunction():
            self._known = {place: known for place, known in self._known.items() if known.data() is not None}
            places = [_place(weight) for weight in weights]
            found: dict[Place, Tensor] = {}
            for place, weight in zip(places, weights, strict=True):
                known = self._known.get(place)
                if known is not None and (data := known.serves(weight.tensor)) is not None:
                    found[place] = data
            new = {p: w for p, w in zip(places, weights, strict=True) if p not in found}
            for place, (weight, data) in zip(
                new, self._packed(list(new.values()), threads, keep), strict=True
            ):
                source = weakref.ref(weight.tensor)
                self._known[place] = _Packed(weakref.ref(data), source, version(weight.tensor))
                found[place] = data
        return tuple(found[place] for place in places)

    def _packed(
        self, weights: Sequence[Packing], threads: int, keep: Cache | None
    ) -> Iterator[tuple[Packing, Tensor]]:
        """Each weight with its packed form, one after the other."""
        pages = FilePages()
        store = None if keep is None else PackedStore(keep, self._source)
        for weight, room in zip(weights, self._room(weights), strict=True):
            data, tensor = room[: self.nbytes(weight)], weight.tensor
            if store is None or data.numel() < LEAST_BYTES:
                self._fill(weight, data, threads, pages)
            elif not store.read(key := store.key(tensor, weight.format), data):
                self._fill(weight, data, threads, pages)
                store.write(key, data, weight.format)
            elif tensor.is_contiguous():
                pages.release(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
            yield weight, room

    def _room(self, weights: Sequence[Packing]) -> list[Tensor]:
        """Zeroed memory for all weights in one piece, in order, each on a line."""
        sizes = [-(-self.nbytes(weight) // _LINE) * _LINE for weight in weights]
        return list(torch.split(huge_pages(sum(sizes)), sizes)) if sizes else []

    def _fill(self, weight: Packing, data: Tensor, threads: int, pages: FilePages) -> None:
        """Pack in spans, and give the pages of the model's file back behind each."""
        groups = -(-weight.rows // GROUP)
        span = max(1, _SPAN * groups // max(1, data.numel()))
        for first in range(0, groups, span):
            rows = weight.tensor.detach()[first * GROUP : (first + span) * GROUP]
            whole = rows.is_contiguous()
            self._fill_span(weight, rows, data, range(first, min(groups, first + span)), threads)
            if whole:
                pages.release(rows.data_ptr(), rows.data_ptr() + rows.nbytes)

    def _fill_span(self, weight: Packing, rows: Tensor, data: Tensor, groups: range, threads: int) -> None:
        """Pack these groups, whose rows are `rows`."""
        if rows.dtype != torch.uint8:
            rows = rows.to(_DENSE[weight.format])
        rows = rows.contiguous()
        number = STORED.index(weight.format)
        shape = (weight.rows, weight.columns, weight.row_bytes)
        # The packer counts rows from the first of the weight.
        source = rows.data_ptr() - groups.start * GROUP * weight.row_bytes
        step = max(1, _PIECE * -(-weight.rows // GROUP) // max(1, data.numel()))

        def piece(first: int) -> None:
            last = min(groups.stop, first + step)
            self._library.tw_pack(number, source, *shape, data.data_ptr(), first, last)

        pieces = range(groups.start, groups.stop, step)
        if threads == 1 or len(pieces) == 1:
            for first in pieces:
                piece(first)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(piece, pieces))


def huge_pages(nbytes: int) -> Tensor:
    """Zeroed memory, uint8 [nbytes], on pages of 2 MiB where the system grants them; freed with the tensor."""
    if nbytes < _HUGE_PAGE:
        room = torch.zeros(nbytes + _LINE, dtype=torch.uint8)
        return room[-room.data_ptr() % _LINE :][:nbytes]
    size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    pages = mmap.mmap(-1, size + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(pages, dtype=torch.uint8)
    return room[-room.data_ptr() % _HUGE_PAGE :][:nbytes]


def _place(weight: Packing) -> Place:
    """What tells a weight from others: its memory, which lives as long as an executable holds what was packed."""
    tensor = weight.tensor
    memory = tensor.untyped_storage()._cdata, tensor.data_ptr()
    return (*memory, tensor.shape, tensor.stride(), tensor.dtype, weight.format)


def version(tensor: Tensor) -> int:
    """A number that grows with every change in place (tensors made in inference mode do not count: 0)."""
    return 0 if tensor.is_inference() else tensor._version


_packers: list[Packer] = []
_packers_lock = threading.Lock()


def shared_packer(cache: Cache) -> Packer:
    """The packer of this process; `cache` keeps its code where there is none yet. Raises ToolchainError."""
    with _packers_lock:
        if not _packers:
            _packers.append(Packer(cache))
        return _packers[0]
