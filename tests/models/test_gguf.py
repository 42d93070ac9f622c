"""The GGUF reader: equal to gguf.GGUFReader on files that are right, one clear error on others."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchweld.graph.formats import FORMATS
from torchweld.models.builtin import find_builtin
from torchweld.models.errors import ModelFileError
from torchweld.models.gguf import read_gguf

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
BIG = 2**64 - 32


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def items(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(
    name: str | bytes, dims: tuple[int, ...], kind: int, offset: int, rank: int | None = None
) -> bytes:
    head = text(name) + struct.pack("<I", len(dims) if rank is None else rank)
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


@dataclass(frozen=True)
class Parts:
    """A GGUF file in pieces, so that a test can spoil one of them."""

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_pairs: int | None = None
    pairs: tuple[bytes, ...] = (
        pair("general.architecture", STRING, text("llama")),
        pair("a.count", U32, struct.pack("<I", 7)),
        pair("a.flags", ARRAY, items(BOOL, 2, b"\0\1")),
        pair("a.texts", ARRAY, items(STRING, 2, text("x") + text(""))),
    )
    tensors: tuple[bytes, ...] = (tensor("a", (32, 2), 8, 0), tensor("b", (4,), 0, 96))
    data: bytes = bytes(range(112))
    alignment: int = 32

    def build(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        head = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_pairs)
        head += b"".join(self.pairs) + b"".join(self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data


GOOD = Parts()


def with_pair(*extra: bytes) -> bytes:
    return replace(GOOD, pairs=GOOD.pairs + extra).build()


def with_tensors(*tensors: bytes) -> bytes:
    return replace(GOOD, tensors=tensors).build()


def with_alignment(kind: int, payload: bytes) -> bytes:
    return with_pair(pair("general.alignment", kind, payload))


def huge_array(kind: int, count: int) -> bytes:
    return with_pair(pair("k", ARRAY, items(kind, count, b"")))


# name -> (file, words that the message must hold)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes long"),
    "header cut": (GOOD.build()[:20], "20 bytes long"),
    "magic": (replace(GOOD, magic=b"GGML").build(), "magic b'GGML' at byte 0"),
    "magic lower case": (replace(GOOD, magic=b"gguf").build(), "magic"),
    "zeros": (bytes(64), "magic"),
    "version 0": (replace(GOOD, version=0).build(), "version 0"),
    "version 1": (replace(GOOD, version=1).build(), "version 1 at byte 4"),
    "version 4": (replace(GOOD, version=4).build(), "version 4"),
    "version max": (replace(GOOD, version=2**32 - 1).build(), "version 4294967295"),
    "big-endian": (replace(GOOD, version=3 << 24).build(), "big-endian"),
    "tensor count max": (replace(GOOD, n_tensors=2**64 - 1).build(), "tensor count 18446744073709551615"),
    "tensor count 2^63": (replace(GOOD, n_tensors=2**63).build(), "tensor count"),
    "tensor count one more": (replace(GOOD, n_tensors=3).build(), "tensor"),
    "tensor count wraps by record": (replace(GOOD, n_tensors=2**60 + 1).build(), "tensor count"),
    "pair count max": (replace(GOOD, n_pairs=2**64 - 1).build(), "metadata count"),
    "pair count 2^63": (replace(GOOD, n_pairs=2**63).build(), "metadata count"),
    "pair count one more": (replace(GOOD, n_pairs=5).build(), "byte"),
    "key of length 2^64-1": (with_pair(struct.pack("<Q", 2**64 - 1)), "metadata key"),
    "key of length 65536": (with_pair(pair(b"k" * 65536, U8, b"\1")), "at most 65535"),
    "key empty": (with_pair(pair("", U8, b"\1")), "metadata key is empty"),
    "key twice": (with_pair(pair("a.count", U8, b"\1")), "'a.count' occurs twice"),
    "key not UTF-8": (with_pair(pair(b"\xff\xfe", U8, b"\1")), "not UTF-8"),
    "key with NUL": (with_pair(pair("a\0b", U8, b"\1")), "NUL"),
    "key overlong UTF-8": (with_pair(pair(b"\xc0\xaf", U8, b"\1")), "not UTF-8"),
    "type 13": (with_pair(pair("k", 13, b"\0" * 8)), "type 13 of 'k'"),
    "type max": (with_pair(pair("k", 2**32 - 1, b"")), "type 4294967295"),
    "bool 2": (with_pair(pair("k", BOOL, b"\2")), "a bool, 0 or 1"),
    "bool 255 in array": (with_pair(pair("k", ARRAY, items(BOOL, 2, b"\1\xff"))), "is 255"),
    "string longer than file": (with_pair(pair("k", STRING, struct.pack("<Q", 10**6))), "are left"),
    "string length wraps": (with_pair(pair("k", STRING, struct.pack("<Q", 2**64 - 8))), "are left"),
    "string not UTF-8": (with_pair(pair("k", STRING, text(b"\x80"))), "value of 'k' is not UTF-8"),
    "string with NUL": (with_pair(pair("k", STRING, text("a\0"))), "NUL"),
    "array of arrays": (with_pair(pair("k", ARRAY, items(ARRAY, 1, items(U8, 1, b"1")))), "of arrays"),
    "array of unknown": (huge_array(13, 2**63), "length of 'k'"),
    "array of unknown, short": (with_pair(pair("k", ARRAY, items(77, 1, b"\0"))), "type 77"),
    "array of u8, 2^31": (huge_array(U8, 2**31), "length of 'k'"),
    "array of u8, 2^63": (huge_array(U8, 2**63), "length of 'k'"),
    "array of u32, wraps": (huge_array(U32, 2**62 + 1), "length of 'k'"),
    "array of f64, max": (huge_array(F64, 2**64 - 1), "length of 'k'"),
    "array of bools, 2^31": (huge_array(BOOL, 2**31), "length of 'k'"),
    "array of strings, 2^63": (huge_array(STRING, 2**63), "length of 'k'"),
    "array of strings, 2^61": (huge_array(STRING, 2**61), "length of 'k'"),
    "array with a long string": (
        with_pair(pair("k", ARRAY, items(STRING, 2, text("ab") + struct.pack("<Q", 2**40)))),
        "element of 'k'",
    ),
    "array with bad UTF-8": (with_pair(pair("k", ARRAY, items(STRING, 1, text(b"\xfe")))), "element of 'k'"),
    "nesting 10000 deep": (with_pair(pair("k", ARRAY, items(ARRAY, 1, b"") * 10000)), "of arrays"),
    "alignment 0": (with_alignment(U32, struct.pack("<I", 0)), "general.alignment is 0"),
    "alignment 4": (with_alignment(U32, struct.pack("<I", 4)), "power of two"),
    "alignment 33": (with_alignment(U32, struct.pack("<I", 33)), "power of two"),
    "alignment of 2^40": (with_alignment(U64, struct.pack("<Q", 2**40)), "power of two"),
    "alignment 2^31": (with_alignment(U32, struct.pack("<I", 2**31)), "byte"),
    "alignment negative": (with_alignment(I32, struct.pack("<i", -32)), "power of two"),
    "alignment is text": (with_alignment(STRING, text("32")), "power of two"),
    "alignment is true": (with_alignment(BOOL, b"\1"), "power of two"),
    "alignment is an array": (with_alignment(ARRAY, items(U8, 1, b"\x20")), "power of two"),
    "tensor name empty": (with_tensors(tensor("", (32,), 8, 0)), "tensor name is empty"),
    "tensor name of 65": (with_tensors(tensor("n" * 65, (32,), 8, 0)), "at most 64"),
    "tensor name of 1 MB": (with_tensors(tensor("n" * 2**20, (32,), 8, 0)), "at most 64"),
    "tensor name twice": (with_tensors(tensor("a", (32,), 8, 0), tensor("a", (32,), 8, 64)), "twice"),
    "tensor name not UTF-8": (with_tensors(tensor(b"\xc3", (32,), 8, 0)), "not UTF-8"),
    "tensor name with NUL": (with_tensors(tensor("a\0b", (32,), 8, 0)), "NUL"),
    "rank 0": (with_tensors(tensor("a", (), 8, 0)), "rank 0 of tensor 'a'"),
    "rank 5": (with_tensors(tensor("a", (32, 1, 1, 1, 1), 8, 0)), "rank 5"),
    "rank max": (with_tensors(tensor("a", (32,), 8, 0, rank=2**32 - 1)), "rank 4294967295"),
    "dimension 0": (with_tensors(tensor("a", (32, 0), 8, 0)), "dimension of 0"),
    "dimension max": (with_tensors(tensor("a", (2**64 - 32,), 8, 0)), "'a'"),
    "product wraps to 0": (with_tensors(tensor("a", (2**32, 2**32), 0, 0)), "ends too far"),
    "product wraps to 32": (with_tensors(tensor("a", (32, 2**59 + 1, 2**5), 8, 0)), "ends too far"),
    "bytes wrap, product does not": (with_tensors(tensor("a", (2**62,), 0, 0)), "ends too far"),
    "row is no block": (with_tensors(tensor("a", (33, 2), 8, 0)), "whole Q8_0 blocks of 32"),
    "row is no superblock": (with_tensors(tensor("a", (128,), 12, 0)), "whole Q4_K blocks of 256"),
    "tensor type 4": (with_tensors(tensor("a", (32,), 4, 0)), "type 4 of tensor 'a'"),
    "tensor type max": (with_tensors(tensor("a", (32,), 2**32 - 1, 0)), "type 4294967295"),
    "tensor type I8": (with_tensors(tensor("a", (32,), 24, 0)), "type 24"),
    "offset not aligned": (with_tensors(tensor("a", (32,), 8, 8)), "offset 8 of tensor 'a'"),
    "offset wraps into header": (with_tensors(tensor("a", (32,), 8, BIG)), "ends too far"),
    "offset at the end": (with_tensors(tensor("a", (32,), 8, 128)), "ends too far"),
    "tensors share bytes": (with_tensors(tensor("a", (32, 2), 8, 0), tensor("b", (32,), 8, 32)), "share"),
    "tensors in one place": (with_tensors(tensor("a", (32,), 8, 0), tensor("b", (32,), 8, 0)), "share"),
    "data cut": (GOOD.build()[:-1], "truncated"),
    "data missing": (replace(GOOD, data=b"").build(), "truncated"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    data, words = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(ModelFileError) as caught:
        read_gguf(path)
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 500


def test_the_good_file_of_these_tests_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD.build())
    file = read_gguf(path)
    assert file.version == 3
    assert file.metadata["a.count"] == 7
    assert file.metadata["a.texts"] == ("x", "")
    assert list(file.metadata["a.flags"]) == [0, 1]  # type: ignore[arg-type]
    assert file.read("a").tolist() == [list(range(34)), list(range(34, 68))]
    assert torch.equal(file.read("b").view(torch.uint8), torch.arange(96, 112, dtype=torch.uint8))
    one, other = (file.read(name) for name in list(file.tensors)[:2])
    one.zero_()
    assert one._version == other._version > 0, "tensors of a file count their changes together"
    read_gguf_again = replace(GOOD, version=2).build()
    path.with_name("v2.gguf").write_bytes(read_gguf_again)
    assert read_gguf(path.with_name("v2.gguf")).version == 2


@pytest.mark.parametrize("make", [lambda p: p / "none.gguf", lambda p: p], ids=["missing", "folder"])
def test_no_file(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"cannot be opened|not a regular file"):
        read_gguf(make(tmp_path))


def check_parse_or_error(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        file = read_gguf(path)
    except ModelFileError:
        pass
    else:
        for name, found in file.tensors.items():
            assert 24 < found.offset and found.offset + found.nbytes <= len(data)
            assert file.read(name).numel() > 0
    assert time.perf_counter() - start < 1


relaxed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(length=st.integers(0, len(GOOD.build())))
def test_truncation(length: int, tmp_path: Path) -> None:
    check_parse_or_error(tmp_path / "cut.gguf", GOOD.build()[:length])


@relaxed
@given(changes=st.lists(st.tuples(st.integers(0, len(GOOD.build()) - 1), st.integers(0, 255)), max_size=6))
def test_mutation(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    data = bytearray(GOOD.build())
    for at, value in changes:
        data[at] = value
    check_parse_or_error(tmp_path / "mutated.gguf", bytes(data))


@relaxed
@given(
    at=st.integers(0, len(GOOD.build()) - 9),
    value=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, BIG]),
)
def test_large_numbers_everywhere(at: int, value: int, tmp_path: Path) -> None:
    data = bytearray(GOOD.build())
    data[at : at + 8] = struct.pack("<Q", value)
    check_parse_or_error(tmp_path / "large.gguf", bytes(data))


def compare_with_reference(path: Path) -> None:
    ours, reference = read_gguf(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in reference.tensors]
    for theirs in reference.tensors:
        mine = ours.tensors[theirs.name]
        assert mine.format == theirs.tensor_type.name
        assert list(mine.shape) == theirs.shape.tolist()[::-1]
        assert (mine.offset, mine.nbytes) == (theirs.data_offset, theirs.n_bytes)
        head = ours.read(theirs.name).reshape(-1)[:64].view(torch.uint8).numpy()
        assert np.array_equal(head, theirs.data.reshape(-1)[:64].view(np.uint8)[: len(head)])
    fields = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for name, field in fields.items():
        mine_value = ours.metadata[name]
        if len(field.data) < 1000:  # GGUFReader takes seconds to decode a vocabulary
            value = field.contents()
            assert (list(mine_value) if isinstance(value, list) else mine_value) == value  # type: ignore[arg-type]
        else:
            assert len(mine_value) == len(field.data)  # type: ignore[arg-type]


@pytest.mark.slow  # gguf.GGUFReader takes seconds for a vocabulary
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_file_reads_as_with_gguf(name: str) -> None:
    compare_with_reference(find_builtin(name))


def test_file_of_gguf_writer_in_every_format(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("some.numbers", [1, -2, 3])
    writer.add_float64("some.real", 0.1)
    rng = np.random.default_rng(0)
    for fmt in FORMATS.values():
        raw = rng.integers(0, 256, (3, 2 * fmt.block_bytes), dtype=np.uint8)
        kind = gguf.GGMLQuantizationType(fmt.gguf_type)
        writer.add_tensor(fmt.name, raw.view(np.float32) if fmt.name == "F32" else raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare_with_reference(path)
