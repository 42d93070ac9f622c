"""`TORCHWELD_DUMP=folder`: every stage of a compilation as runnable Python, and the C++ of the executable.

A stage is `NN_pass.py`: one function of plain torch that takes the inputs, the weights by name and the sizes, and
returns what the graph returns at that stage.  A fused stage is a module that calls one sub-module per kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from torchweld.codegen.reference import reference_source


@dataclass
class StageWriter:
    """Writes numbered stages into `folder`, which is made if it is not there."""

    folder: Path
    _count: int = field(default=0)

    def __call__(self, name: str, module: fx.GraphModule) -> None:
        """Write one stage."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            source = reference_source(module, "stage")
        except NotImplementedError:  # a fused graph calls its groups: torch's own listing shows them nested
            source = module.print_readable(print_output=False)
        (self.folder / f"{self._count:02d}_{name}.py").write_text(source, encoding="utf-8")
        self._count += 1

    def write_unit(self, source: str) -> None:
        """Write the C++ of the executable."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "unit.cpp").write_text(source, encoding="utf-8")
