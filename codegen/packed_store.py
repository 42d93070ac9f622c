"""Packed weights on disk, by what they were packed from: an option, off by default.

An entry is keyed by the stored bytes, their format and shape, and the packer's source, so a change of any makes another
entry. Entries lie in the kernel cache (codegen/cache.py), which writes them whole, checks every byte before it gives
one out, lists and clears them. Finding an entry reads the stored weight once (for its digest) and the packed one twice
(to check it, and to copy it to huge pages).
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from torchweld.codegen.cache import Cache, CacheError, make_key

log = logging.getLogger(__name__)

LEAST_BYTES: Final = 1 << 16
"""Smaller weights are packed faster than found."""
_SUFFIX: Final = ".packed"


class PackedStore:
    """Packed weights in `cache`; `packer`: the source of the code that packs."""

    def __init__(self, cache: Cache, packer: str) -> None:
        self._cache, self._packer = cache, packer

    def key(self, weight: Tensor, format_: str) -> str:
        """What identifies the packed form of a weight, [rows, columns] of numbers or uint8 [rows, row_bytes]."""
        stored = weight.detach().contiguous().view(torch.uint8)
        digest = hashlib.sha256(_bytes_of(stored)).hexdigest()
        return make_key("packed", self._packer, format_, str(weight.dtype), str(tuple(weight.shape)), digest)

    def read(self, key: str, data: Tensor) -> bool:
        """Copy the entry of `key` to `data`, contiguous uint8; False, and `data` as it was, if there is none of its
        size."""
        path = self._cache.get(key)
        if path is None:
            return False
        try:
            if path.stat().st_size != data.numel():
                log.warning(
                    "the packed weight in %s has another size than it should: it is packed again", path
                )
                return False
            return self._copy(path, data)
        except OSError as problem:  # deleted by another process just now
            log.info("the packed weight in %s cannot be read (%s)", path, problem.strerror)
            return False

    @staticmethod
    def _copy(path: Path, data: Tensor) -> bool:
        with path.open("rb", buffering=0) as file:
            room = _bytes_of(data)
            while room and (count := file.readinto(room)):
                room = room[count:]
        return not room

    def write(self, key: str, data: Tensor, format_: str) -> None:
        """Keep a packed weight; a folder that cannot be written to costs a log line and nothing else."""
        if self._cache.refused is not None:
            log.info("packed weights are not kept: %s", self._cache.refused)
            return
        try:
            meta = {"name": f"packed {format_}"}
            self._cache.put(key, _bytes_of(data), meta, _SUFFIX, elsewhere=False)
        except CacheError as problem:
            log.warning("a packed weight is not kept: %s", problem)


def _bytes_of(data: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor."""
    array: Any = data.numpy()
    return memoryview(array).cast("B")
