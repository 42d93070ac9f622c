"""Weights on their way from a file into a model: by name, shape checked first, none left over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from torchweld.graph.formats import get_format
from torchweld.models.errors import ModelFileError


@dataclass(frozen=True)
class StoredTensor:
    """A weight as it lies in the file: F32 is float32 [*shape], any other format uint8 [*rows, row_bytes]."""

    format: str
    shape: tuple[int, ...]
    data: Tensor


class Source(Protocol):
    """A checkpoint: what it holds is known before any of it is read."""

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Stored format and logical shape (rows first) of a tensor."""

    def read(self, name: str) -> Tensor:
        """The data of a tensor, as in StoredTensor."""


class TensorSource:
    """A Source over float tensors in memory, e.g. a state_dict."""

    def __init__(self, tensors: Mapping[str, Tensor], path: str | Path = "<memory>") -> None:
        self.path, self.names, self._tensors = Path(path), tuple(tensors), dict(tensors)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Stored format (by dtype) and shape."""
        tensor = self._tensors[name]
        return stored_format(self.path, name, tensor.dtype), tuple(tensor.shape)

    def read(self, name: str) -> Tensor:
        """The tensor as stored data."""
        return as_stored(self._tensors[name].detach())


_BY_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def stored_format(path: Path, name: str, dtype: torch.dtype) -> str:
    """The stored format of a plain tensor's dtype; ModelFileError where there is none."""
    if dtype not in _BY_DTYPE:
        raise ModelFileError(path, f"tensor {name!r} is {dtype}", "float32, float16 or bfloat16")
    return _BY_DTYPE[dtype]


def as_stored(tensor: Tensor) -> Tensor:
    """A plain tensor as stored data: float32 as it is, float16 and bfloat16 as bytes of rows (not copied)."""
    return tensor if tensor.dtype == torch.float32 else tensor.contiguous().view(torch.uint8)


def is_finite(format: str, data: Tensor) -> bool:
    """Whether stored data decodes to finite values only; reads every scale, or every value of F32."""
    if format != "F32":
        return get_format(format).finite(data)
    # the extremes carry NaN along, and need no copy of the data as isfinite does
    return data.numel() == 0 or all(bool(extreme.isfinite()) for extreme in data.aminmax())


class Weights:
    """Takes tensors out of a source by the model's names, each against the shape that the model expects.

    rename: the model's name -> the source's name.
    """

    def __init__(self, source: Source, rename: Callable[[str], str] = lambda name: name) -> None:
        self.path, self._source, self._rename = source.path, source, rename
        self._left = set(source.names)
        self._known = frozenset(self._left)

    def has(self, name: str) -> bool:
        """Whether the source holds this weight."""
        return self._rename(name) in self._known

    def take(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """A weight in its stored format. ModelFileError where it is missing, misshapen, or not finite."""
        there = self._rename(name)
        if there not in self._known:
            raise ModelFileError(self.path, f"tensor {there!r} is missing", f"one of shape {list(shape)}")
        format, found = self._source.describe(there)
        if found != shape:
            raise ModelFileError(self.path, f"tensor {there!r} has shape {list(found)}", f"{list(shape)}")
        data = self._source.read(there)
        if not is_finite(format, data):
            raise ModelFileError(
                self.path, f"tensor {there!r} holds NaN or infinity", "finite values", "the file is damaged"
            )
        self._left.discard(there)
        return StoredTensor(format, shape, data)

    def vector(self, name: str, length: int) -> Tensor:
        """A vector (norm weight, bias) as float32 [length], whatever it is stored in."""
        stored = self.take(name, (length,))
        if stored.format == "F32":
            return stored.data
        return get_format(stored.format).decode_rows(stored.data, length)

    def take_transposed(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """A matrix that the source holds transposed (GPT-2's Conv1D), copied to [rows, columns]."""
        stored = self.take(name, shape[::-1])
        if stored.format == "F32":
            return StoredTensor("F32", shape, stored.data.t().contiguous())
        if stored.format not in ("F16", "BF16"):
            raise ModelFileError(self.path, f"tensor {name!r} is {stored.format}", "F32, F16 or BF16")
        values = stored.data.view(torch.int16).t().contiguous()
        return StoredTensor(stored.format, shape, values.view(torch.uint8))

    def check_all_taken(self, ignored: Callable[[str], bool] = lambda name: False) -> None:
        """ModelFileError names a tensor that the model has no place for and that is not `ignored`."""
        left = sorted(name for name in self._left if not ignored(name))
        if left:
            raise ModelFileError(
                self.path,
                f"tensor {left[0]!r} (one of {len(left)}) has no place in the model",
                "a file of the plain architecture",
            )
