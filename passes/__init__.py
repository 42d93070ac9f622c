"""Graph rewrites, one file each, and the order in which they normalise a captured graph (passes/order.py).

The tuples are looked up at their first use: a warm start runs none of the passes, and does not import them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchweld.passes.order import CANONICALIZE as CANONICALIZE
    from torchweld.passes.order import FUSE as FUSE
    from torchweld.passes.order import RECOGNIZE as RECOGNIZE

_TUPLES = ("CANONICALIZE", "FUSE", "RECOGNIZE")


def __getattr__(name: str) -> object:
    """One of the tuples."""
    if name not in _TUPLES:
        raise AttributeError(f"module 'torchweld.passes' has no attribute {name!r}")
    return getattr(import_module("torchweld.passes.order"), name)
