"""A bounded reader of GGUF files: every count, length and offset is checked before it is believed.

Nothing is copied: the file is mapped privately and tensors are views of the map, so memory stays at the pages
that are touched. The file must not be truncated by others while it is mapped (that is a SIGBUS). Versions 2
and 3, little-endian. Source: the GGUF specification (ggml/docs/gguf.md); limits after the record of faults in
other readers (counts that wrap, offsets that point back into the header, arrays that never end).
"""

from __future__ import annotations

import mmap
import os
import stat
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from torchweld.graph.formats import FORMATS, StoredFormat
from torchweld.models.cursor import Cursor
from torchweld.models.errors import ModelFileError

Numbers: TypeAlias = "array[int] | array[float]"
Value: TypeAlias = "int | float | bool | str | tuple[str, ...] | Numbers"
"""One metadata value; arrays of numbers stay packed."""

_MAX_DIMS = 4
_MAX_NAME = 64  # ggml's GGML_MAX_NAME
_MAX_KEY = 65535
_MAX_STRINGS = 1 << 22  # over all arrays; the largest vocabularies hold 2^18 tokens and 2^19 merges
_STRING, _ARRAY = 8, 9
# metadata type number -> array typecode of the same size
_NUMBERS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
)
_BOOL = 7
_BY_TYPE: Mapping[int, StoredFormat] = MappingProxyType({f.gguf_type: f for f in FORMATS.values()})
# smallest records: key (8 + 1), type, 1 byte; name (8 + 1), rank, 1 dimension, type, offset
_MIN_PAIR, _MIN_TENSOR = 14, 33


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: `shape` rows first, `offset` from the start of the file, in bytes."""

    name: str
    format: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A parsed and checked GGUF file. `metadata` by key, `tensors` by name, in file order."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    _map: mmap.mmap

    _counter: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Its detached copies count changes with it."""

    def read(self, name: str) -> Tensor:
        """A view of the file: F32 as float32 [*shape], all others as uint8 [*rows, row_bytes].

        All tensors of a file count their changes together: whoever must know that none was written to looks at one
        `_version`.
        """
        tensor = self.tensors[name]
        stored = FORMATS[tensor.format]
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)
        if stored.name == "F32":
            data = data.view(torch.float32).reshape(tensor.shape)
        else:
            data = data.reshape(*tensor.shape[:-1], stored.row_bytes(tensor.shape[-1]))
        counted = self._counter.detach()
        counted.data = data
        return counted


def read_gguf(path: str | Path) -> GgufFile:
    """Parse and check a GGUF file. Raises ModelFileError where it breaks the limits above."""
    path = Path(path)
    mapped = _map_file(path)
    cursor = Cursor(path, memoryview(mapped).toreadonly())
    version = _read_version(cursor)
    n_tensors = cursor.count("tensor count", _MIN_TENSOR)
    n_pairs = cursor.count("metadata count", _MIN_PAIR)
    metadata = _read_metadata(cursor, n_pairs)
    alignment = _alignment(path, metadata)
    records = [_read_tensor(cursor, alignment) for _ in range(n_tensors)]
    start = -(-cursor.at // alignment) * alignment  # rounded up
    tensors = {record.name: _place(path, record, start, len(mapped)) for record in records}
    if len(tensors) != len(records):
        twice = Counter(record.name for record in records).most_common(1)[0][0]
        raise ModelFileError(path, f"tensor name {twice!r} occurs twice", "unique names")
    _check_overlap(path, records)
    return GgufFile(path, version, MappingProxyType(metadata), MappingProxyType(tensors), mapped)


def _map_file(path: Path) -> mmap.mmap:
    """Map a regular file privately (writable pages, so torch accepts them; never written back)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block us
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelFileError(path, f"cannot be opened ({reason})", "a readable GGUF file") from None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ModelFileError(path, "is not a regular file", "a GGUF file")
        if info.st_size < 24:
            raise ModelFileError(path, f"{info.st_size} bytes long", "at least a GGUF header of 24 bytes")
        return mmap.mmap(descriptor, info.st_size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ModelFileError(path, f"cannot be mapped ({error.strerror})", "a readable GGUF file") from None
    finally:
        os.close(descriptor)


def _read_version(cursor: Cursor) -> int:
    magic = bytes(cursor.take(4, "magic"))
    if magic != b"GGUF":
        raise cursor.error(f"magic {magic!r}", "b'GGUF'", at=0)
    version = cursor.u32("version")
    if version & 0xFFFF == 0 and version != 0:
        raise cursor.error(
            "big-endian file", "little-endian", at=4, hint="convert it with `gguf-convert-endian FILE little`"
        )
    if version not in (2, 3):
        raise cursor.error(f"version {version}", "2 or 3", at=4)
    return version


def _read_metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    strings = _MAX_STRINGS
    for _ in range(count):
        at = cursor.at
        key = cursor.text("metadata key", _MAX_KEY)
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} occurs twice", "unique keys", at=at)
        kind = cursor.u32(f"type of {key!r}")
        if kind == _ARRAY:
            value = _read_array(cursor, key, strings)
            strings -= len(value) if isinstance(value, tuple) else 0
            metadata[key] = value
        elif kind == _STRING:
            metadata[key] = cursor.text(f"value of {key!r}", empty=True)
        else:
            packed = _read_numbers(cursor, key, kind, 1)
            metadata[key] = bool(packed[0]) if kind == _BOOL else packed[0]
    return metadata


def _read_array(cursor: Cursor, key: str, strings: int) -> tuple[str, ...] | Numbers:
    at, kind = cursor.at, cursor.u32(f"element type of {key!r}")
    if kind == _ARRAY:
        raise cursor.error(f"{key!r} is an array of arrays", "an array of numbers or strings", at=at)
    if kind != _STRING:
        size = array(_NUMBERS[kind]).itemsize if kind in _NUMBERS else 1
        return _read_numbers(cursor, key, kind, cursor.count(f"length of {key!r}", size))
    count = cursor.count(f"length of {key!r}", 8)
    if count > strings:
        raise cursor.error(f"{key!r} has {count} strings", f"at most {_MAX_STRINGS} in a file", at=at + 4)
    return cursor.texts(f"element of {key!r}", count)


def _read_numbers(cursor: Cursor, key: str, kind: int, count: int) -> Numbers:
    if kind not in _NUMBERS:
        raise cursor.error(f"type {kind} of {key!r}", "a metadata type from 0 to 12", at=cursor.at - 4)
    packed: Numbers = array(_NUMBERS[kind])
    at = cursor.at
    packed.frombytes(cursor.take(count * packed.itemsize, f"value of {key!r}"))
    if cursor.big_host:
        packed.byteswap()
    if kind == _BOOL and packed and max(packed) > 1:
        raise cursor.error(f"value of {key!r} is {max(packed)}", "a bool, 0 or 1", at=at)
    return packed


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    expected = "a power of two from 8 up, as uint32"
    if not isinstance(value, int) or not 8 <= value < 1 << 32 or value & (value - 1):  # a bool is < 8
        raise ModelFileError(path, f"general.alignment is {value!r:.40}", expected)
    return value


def _read_tensor(cursor: Cursor, alignment: int) -> GgufTensor:
    """One tensor record; its offset is still relative to the data section."""
    name = cursor.text("tensor name", _MAX_NAME)
    at = cursor.at
    rank = cursor.u32(f"rank of tensor {name!r}")
    if not 1 <= rank <= _MAX_DIMS:
        raise cursor.error(f"rank {rank} of tensor {name!r}", f"1 to {_MAX_DIMS} dimensions", at=at)
    shape = tuple(cursor.u64(f"dimension of tensor {name!r}") for _ in range(rank))[::-1]
    if 0 in shape:
        raise cursor.error(f"tensor {name!r} has a dimension of 0", "dimensions of at least 1", at=at + 4)
    at = cursor.at
    kind, offset = cursor.u32(f"type of tensor {name!r}"), cursor.u64(f"offset of tensor {name!r}")
    stored = _BY_TYPE.get(kind)
    if stored is None:
        raise cursor.error(f"type {kind} of tensor {name!r}", f"one of {', '.join(FORMATS)}", at=at)
    if offset % alignment:
        raise cursor.error(f"offset {offset} of tensor {name!r}", f"a multiple of {alignment}", at=at + 4)
    if shape[-1] % stored.block:
        raise cursor.error(
            f"row of {shape[-1]} values in tensor {name!r}",
            f"whole {stored.name} blocks of {stored.block}",
            at=at,
        )
    nbytes = stored.row_bytes(shape[-1])
    for dim in shape[:-1]:
        nbytes *= dim  # Python ints do not wrap
    return GgufTensor(name, stored.name, shape, offset, nbytes)


def _place(path: Path, record: GgufTensor, start: int, size: int) -> GgufTensor:
    """The record with its offset from the start of the file, once it is known to lie inside the file."""
    if record.offset + record.nbytes > size - start:
        raise ModelFileError(
            path,
            f"tensor {record.name!r} ({record.nbytes} bytes at {start} + {record.offset}) ends too far",
            f"data within the {size} bytes of the file",
            "the file may be truncated; fetch it again",
        )
    return GgufTensor(record.name, record.format, record.shape, start + record.offset, record.nbytes)


def _check_overlap(path: Path, records: list[GgufTensor]) -> None:
    ordered = sorted(records, key=lambda record: record.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise ModelFileError(
                path, f"tensors {before.name!r} and {after.name!r} share bytes", "no overlap"
            )
