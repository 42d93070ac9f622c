"""Typed access to the settings of a model file: GGUF metadata or a parsed config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torchweld.models.errors import ModelFileError

_LARGEST = 1 << 24  # above every width, depth and vocabulary there is; keeps tables that follow from it small


class Fields:
    """Settings by key. Every getter raises ModelFileError with key, value and what was expected."""

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self.path, self._values = path, values

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def keys(self) -> tuple[str, ...]:
        """All keys."""
        return tuple(self._values)

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = _LARGEST) -> int:
        """An integer from `low` to `high`; required where there is no default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._error(key, value, f"an integer from {low} to {high}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; required where there is no default."""
        value = self._get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(value, int | float) or not is_number or not 0 < value < math.inf:
            raise self._error(key, value, "a finite number above 0")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required where there is no default."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._error(key, value, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """An array of strings; required."""
        value = self._get(key, None)
        if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
            raise self._error(key, value, "an array of strings")
        return tuple(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """An array of `length` numbers; required."""
        value = self._get(key, None)
        if isinstance(value, str) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
            raise self._error(key, value, "an array of numbers")
        found = tuple(value)
        if len(found) != length or not all(isinstance(item, int | float) for item in found):
            raise self._error(key, f"{len(found)} values", f"an array of {length} numbers")
        return found

    def integers(self, key: str) -> tuple[int, ...]:
        """An array of integers from 0; required."""
        value = self._get(key, None)
        if not isinstance(value, tuple | list) or not all(isinstance(v, int) and v >= 0 for v in value):
            raise self._error(key, value, "an array of integers")
        return tuple(value)

    def sub(self, key: str) -> Fields:
        """A nested table; empty where the key is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._error(key, value, "a table")
        return Fields(self.path, value)

    def tables(self, key: str) -> tuple[Fields, ...]:
        """An array of tables; required."""
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._error(key, value, "an array of tables")
        return tuple(Fields(self.path, item) for item in value)

    def require(self, key: str, allowed: tuple[object, ...]) -> None:
        """Refuse a setting whose meaning these models do not have; a missing or null key is fine."""
        value = self._values.get(key)
        if value is not None and value not in allowed:
            raise self._error(key, value, f"one of {', '.join(repr(item) for item in allowed)}")

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelFileError(self.path, f"setting {key!r} is missing", "a complete model file")
        return value

    def _error(self, key: str, value: object, expected: str) -> ModelFileError:
        return ModelFileError(self.path, f"setting {key!r} is {repr(value)[:60]}", expected)


def check_heads(path: Path, heads: int, kv_heads: int, head_size: int) -> None:
    """ModelFileError where queries cannot share the keys evenly, or a head cannot be rotated."""
    if heads % kv_heads:
        raise ModelFileError(path, f"{heads} query heads share {kv_heads} key heads", "a multiple")
    if head_size % 2:
        raise ModelFileError(path, f"head size {head_size}", "an even number, for rotary positions")
