"""Hugging Face folders: config.json and safetensors, through the `safetensors` package; never a pickle.

The header is parsed by that package alone (a second JSON parser may disagree on duplicates). Names, dtypes
and shapes are looked at before any data is. Shards are named by an index file and lie in the folder itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchweld.models.errors import ModelFileError
from torchweld.models.fields import Fields
from torchweld.models.weights import as_stored

_MAX_JSON = 16 << 20  # bytes; the largest index files of public models are 1 MB
_MAX_TENSORS = 100_000
_MAX_RANK = 8
_FORMATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors of a folder, by name. Satisfies torchweld.models.weights.Source."""

    path: Path
    _files: Mapping[str, safe_open]
    _shapes: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._files)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Stored format and shape; ModelFileError for a dtype that no model here uses."""
        dtype, shape = self._shapes[name]
        if dtype not in _FORMATS:
            raise ModelFileError(self.path, f"tensor {name!r} has dtype {dtype}", ", ".join(_FORMATS))
        return _FORMATS[dtype], shape

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the file: F32 as float32, F16 and BF16 as uint8 rows."""
        try:
            tensor: Tensor = self._files[name].get_tensor(name)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelFileError(self.path, f"tensor {name!r} cannot be read ({error})") from None
        return as_stored(tensor)


def read_config(folder: Path, name: str = "config.json") -> Fields:
    """A JSON file of a model folder as Fields. Raises ModelFileError."""
    path = folder / name
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelFileError(path, f"{path.stat().st_size} bytes long", f"at most {_MAX_JSON} bytes")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(path, f"cannot be read ({error.strerror})", "a model folder") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"is not JSON ({error})", "a JSON object") from None
    if not isinstance(values, dict):
        raise ModelFileError(path, f"holds a {type(values).__name__}", "a JSON object")
    return Fields(path, values)


def open_folder(folder: Path) -> SafetensorsFolder:
    """The tensors of `folder`: model.safetensors, or the shards that model.safetensors.index.json names."""
    files: dict[str, safe_open] = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in _shards(folder):
        opened, here = _open_shard(path)
        for name, described in here.items():
            if name in files:
                raise ModelFileError(path, f"tensor {name!r} occurs in two shards", "unique names")
            files[name], shapes[name] = opened, described
    return SafetensorsFolder(folder, MappingProxyType(files), MappingProxyType(shapes))


def _shards(folder: Path) -> list[Path]:
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    name = "model.safetensors.index.json"
    if not (folder / name).is_file():
        raise ModelFileError(
            folder,
            f"holds neither model.safetensors nor {name}",
            "safetensors weights",
            "pickled weights (.bin, .pt) are not loaded: convert them with save_pretrained",
        )
    index = read_config(folder, name)
    shards = sorted({index.sub("weight_map").text(tensor) for tensor in index.sub("weight_map").keys()})
    for shard in shards:
        plain = Path(shard).name == shard and shard.endswith(".safetensors")
        if not plain or not (folder / shard).is_file():
            raise ModelFileError(folder / name, f"shard {shard!r}", "a .safetensors file beside it")
    return [folder / shard for shard in shards]


def _open_shard(path: Path) -> tuple[safe_open, dict[str, tuple[str, tuple[int, ...]]]]:
    try:
        opened = safe_open(path, framework="pt")
        names = list(opened.keys())  # type: ignore[no-untyped-call]
        if len(names) > _MAX_TENSORS:
            raise ModelFileError(path, f"{len(names)} tensors", f"at most {_MAX_TENSORS}")
        slices = {name: opened.get_slice(name) for name in names}  # type: ignore[no-untyped-call]
        shapes = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ModelFileError(path, f"is not a safetensors file ({error})", "a whole, valid file") from None
    for name, (_, shape) in shapes.items():
        if len(shape) > _MAX_RANK:
            raise ModelFileError(path, f"tensor {name!r:.80} has rank {len(shape)}", f"at most {_MAX_RANK}")
    return opened, shapes
