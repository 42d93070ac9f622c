"""torchweld: a compiler-style optimizer for transformer models.

    from torchweld import optimize
    fast = optimize(model)

Public names are looked up at their first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchweld.decoding.cached import CachedModel as CachedModel
    from torchweld.decoding.generate import generate as generate
    from torchweld.decoding.generate import generate_batch as generate_batch
    from torchweld.graph.capture import capture as capture
    from torchweld.models.load import load_model as load_model
    from torchweld.optimizer.api import OptimizedModule as OptimizedModule
    from torchweld.optimizer.api import optimize as optimize
    from torchweld.optimizer.compile import Options as Options
    from torchweld.optimizer.compile import compile_program as compile_program
    from torchweld.optimizer.report import Report as Report

_HOMES = {
    "CachedModel": "torchweld.decoding.cached",
    "OptimizedModule": "torchweld.optimizer.api",
    "Options": "torchweld.optimizer.compile",
    "Report": "torchweld.optimizer.report",
    "capture": "torchweld.graph.capture",
    "compile_program": "torchweld.optimizer.compile",
    "generate": "torchweld.decoding.generate",
    "generate_batch": "torchweld.decoding.generate",
    "load_model": "torchweld.models.load",
    "optimize": "torchweld.optimizer.api",
}

__version__ = "0.1.0"
__all__ = [
    "CachedModel",
    "OptimizedModule",
    "Options",
    "Report",
    "capture",
    "compile_program",
    "generate",
    "generate_batch",
    "load_model",
    "optimize",
]


def __getattr__(name: str) -> object:
    """A public name, from the room that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'torchweld' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
