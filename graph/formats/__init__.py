"""Stored weight formats: layout and decode, one file per family."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from torchweld.graph.formats.base import StoredFormat
from torchweld.graph.formats.dense import BF16, F16, F32
from torchweld.graph.formats.k_quants import Q4_K, Q5_K, Q6_K
from torchweld.graph.formats.legacy_blocks import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0

FORMATS: Mapping[str, StoredFormat] = MappingProxyType(
    {f.name: f for f in (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K)}
)


def get_format(name: str) -> StoredFormat:
    """The stored format called `name` ("Q4_K"); ValueError names the nearest one there is."""
    found = FORMATS.get(name)
    if found is None:
        near = difflib.get_close_matches(name.upper(), FORMATS, n=1, cutoff=0.0)
        known = ", ".join(FORMATS)
        raise ValueError(f"unknown stored format {name!r}; did you mean {near[0]!r}? (known: {known})")
    return found


__all__ = ["FORMATS", "StoredFormat", "get_format"]
