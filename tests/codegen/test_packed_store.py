"""Packed weights on disk: found again, never believed when damaged, and not needed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.codegen.cpp_cases import quantized
from tests.codegen.test_packing import linear
from torchweld.codegen.cache import Cache, CacheEntry
from torchweld.codegen.executable import Executable
from torchweld.codegen.packed_store import PackedStore
from torchweld.codegen.packing import Packer, Packing

ROWS, COLUMNS = 1024, 256


@pytest.fixture(scope="module")
def code() -> Cache:
    """Where compiled code is kept."""
    return Cache()


@pytest.fixture
def keep(tmp_path: Path) -> Cache:
    """An empty place for packed weights."""
    return Cache(tmp_path / "cache")


def stored(seed: int = 0) -> Tensor:
    """A Q8_0 weight, uint8 [rows, row_bytes]."""
    return quantized("Q8_0", ROWS, COLUMNS, seed).view(torch.uint8).reshape(ROWS, -1)


def pack(code: Cache, keep: Cache | None, data: Tensor, format_: str = "Q8_0") -> Tensor:
    """As a new process packs it: with a packer that knows nothing yet."""
    return Packer(code).pack([Packing(data, format_)], 1, keep)[0]


def only(keep: Cache) -> CacheEntry:
    """The one entry."""
    (entry,) = keep.entries()
    return entry


def test_what_was_packed_is_found_again(code: Cache, keep: Cache) -> None:
    data = stored()
    first = pack(code, keep, data)
    entry = only(keep)
    assert (entry.bytes, entry.meta["name"]) == (first.numel(), "packed Q8_0")
    written = entry.path.stat().st_mtime_ns
    assert torch.equal(pack(code, keep, data.clone()), first)
    assert keep.stats().hits == 1
    assert only(keep).path.stat().st_mtime_ns == written
    assert torch.equal(first, pack(code, None, data))


def test_an_entry_is_what_is_read(code: Cache, keep: Cache) -> None:
    """Not packed again in secret: another content under the same key comes out as it stands there."""
    pack(code, keep, data := stored())
    entry = only(keep)
    keep.put(entry.key, bytes(entry.bytes), entry.meta, ".packed")
    assert not pack(code, keep, data).any()


@pytest.mark.parametrize("damage", ["one bit", "truncated"])
def test_a_damaged_entry_is_packed_again_and_said(
    damage: str, code: Cache, keep: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    first = pack(code, keep, data := stored())
    path = only(keep).path
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content if damage == "one bit" else content[:-5])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(pack(code, keep, data), first)
    assert "is damaged" in caplog.text
    assert torch.equal(pack(code, keep, data), first)
    assert keep.stats().damaged == 1


def test_an_entry_of_another_size_is_packed_again_and_said(
    code: Cache, keep: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    first = pack(code, keep, data := stored())
    entry = only(keep)
    keep.put(entry.key, entry.path.read_bytes()[:-64], entry.meta, ".packed")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(pack(code, keep, data), first)
    assert "another size" in caplog.text


def test_content_format_and_packer_make_entries_of_their_own(code: Cache, keep: Cache) -> None:
    numbers = torch.randn(ROWS, COLUMNS)
    in_bf16, in_int8 = (pack(code, keep, numbers, format_) for format_ in ("BF16", "I8"))
    pack(code, keep, stored(0))
    pack(code, keep, stored(1))
    assert len(keep.entries()) == 4
    assert torch.equal(pack(code, keep, numbers, "BF16"), in_bf16)
    assert torch.equal(pack(code, keep, numbers, "I8"), in_int8)
    old, new = (PackedStore(keep, source).key(numbers, "BF16") for source in ("old", "new"))
    assert old != new


def test_a_folder_that_cannot_be_written_costs_nothing_but_a_log_line(
    code: Cache, keep: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> tuple[int, str]:
        raise OSError(28, "No space left on device")

    data = stored()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("torchweld.codegen.cache.tempfile.mkstemp", full)
        packed = pack(code, keep, data)
    assert "No space left" in caplog.text
    assert torch.equal(packed, pack(code, None, data))
    assert not keep.entries()


def test_an_executable_keeps_its_weights_only_if_asked(keep: Cache) -> None:
    plan, x = linear("Q8_0", stored(), COLUMNS), torch.randn(3, COLUMNS)
    plain = Executable(plan, cache=keep)(x)[0]
    assert not [entry for entry in keep.entries() if entry.path.suffix == ".packed"]
    kept = Executable(linear("Q8_0", stored(), COLUMNS), cache=keep, packed_cache=True)(x)[0]
    assert [entry.meta["name"] for entry in keep.entries() if entry.path.suffix == ".packed"] == [
        "packed Q8_0"
    ]
    assert torch.equal(kept, plain)
