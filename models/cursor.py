"""A cursor over the bytes of an untrusted file: every read is checked against the bytes that are left."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from torchweld.models.errors import ModelFileError

_LENGTH = struct.Struct("<Q")


class Cursor:
    """Reads little-endian fields one after the other; `at` is the offset of the next byte.

    Every method takes the name of the field, and raises ModelFileError with that name and the field's offset.
    """

    big_host = sys.byteorder == "big"

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def error(self, what: str, expected: str, *, at: int, hint: str = "") -> ModelFileError:
        """The error to raise for the field that starts at byte `at`."""
        return ModelFileError(self.path, f"{what} at byte {at}", expected, hint)

    def take(self, nbytes: int, what: str) -> memoryview:
        """The next `nbytes` bytes, not copied."""
        at, end = self.at, self.at + nbytes
        if end > self.size:
            raise self.error(
                f"{what} of {nbytes} bytes",
                f"at most the {self.size - at} bytes that are left",
                at=at,
                hint="the file may be truncated; fetch it again",
            )
        self.at = end
        return self.data[at:end]

    def u32(self, what: str) -> int:
        """An unsigned 32-bit integer."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """An unsigned 64-bit integer."""
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, smallest: int) -> int:
        """A number of records of at least `smallest` bytes each; they must fit in the bytes left."""
        at, count = self.at, self.u64(what)
        if count > (self.size - self.at) // smallest:
            raise self.error(
                f"{what} {count}", f"at most {(self.size - self.at) // smallest} (what fits)", at=at
            )
        return count

    def texts(self, what: str, count: int) -> tuple[str, ...]:
        """`count` strings, each of any length and content; vocabularies hold half a million."""
        found, data, size, at = [], self.data, self.size, self.at
        try:
            for _ in range(count):
                start = at + 8
                end = start + _LENGTH.unpack_from(data, at)[0]
                if end > size:
                    break
                found.append(str(data[start:end], "utf-8"))
                at = end
        except (struct.error, UnicodeDecodeError):
            pass
        self.at = at
        if len(found) < count:
            self.text(what, empty=True, nul=True)  # the slow way to the same string says what is wrong
        return tuple(found)

    def text(self, what: str, longest: int = 1 << 64, *, empty: bool = False, nul: bool = False) -> str:
        """A string: 64-bit length, then UTF-8; empty, or with NUL, only where the caller allows it."""
        at, length = self.at, self.u64(f"length of {what}")
        if length > longest:
            raise self.error(f"{what} of {length} bytes", f"at most {longest} bytes", at=at)
        raw = self.take(length, what)
        try:
            text = str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8", "UTF-8 text", at=at + 8) from None
        if not text and not empty:
            raise self.error(f"{what} is empty", "at least one character", at=at)
        if not nul and "\0" in text:
            raise self.error(f"{what} holds a NUL character", "text without NUL", at=at + 8)
        return text
