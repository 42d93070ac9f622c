"""The report of one optimization: what each pass did, what each kernel costs, what still runs eagerly.

One `Report` has three faces: `to_json` for programs, `to_markdown` for documents, `render` for a terminal.
The tables of the last two come from one place, optimizer/report_tables.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torchweld.graph.padding import Padding
from torchweld.graph.target import Target
from torchweld.optimizer.ledger import (
    Fallback,
    KernelRecord,
    LaunchRecord,
    LibraryRecord,
    MaskRecord,
    PassRecord,
    Phase,
    bytes_over_minimum,
    group_launches,
    kernels_per_layer,
    merge_runs,
)
from torchweld.optimizer.report_tables import (
    Table,
    fallback_table,
    kernel_table,
    library_table,
    mask_table,
    pass_table,
    phase_table,
    refusal_table,
)

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
"""Version of the JSON: grows when a key changes its meaning or goes away."""

WIDTH = 100
"""Columns that the rendered report fits into."""


@dataclass(frozen=True)
class Report:
    """Everything that the compiler says about one optimized model.

    sizes: the symbols' values at which bytes, FLOPs and times hold, such as (("batch", 1), ("sequence", 64)).
    max_relative_error: against float64, relative to the row's largest magnitude; None if it was not checked.
    rank_correlation: Spearman's, modelled against measured times per kernel; None if it was not profiled.
    arena_bytes: activations' memory plan at these sizes; None without a compiled executable.
    padding: which inputs are cut to the length of the sentences, where that was proved to change no result.
    padding_kept: why not, where there is a mask.
    library: products of many rows that were timed against ATen, or why not.
    """

    model: str
    target: Target
    sizes: tuple[tuple[str, int], ...] = ()
    passes: tuple[PassRecord, ...] = ()
    masks: tuple[MaskRecord, ...] = ()
    launches: tuple[LaunchRecord, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    phases: tuple[Phase, ...] = ()
    max_relative_error: float | None = None
    rank_correlation: float | None = None
    arena_bytes: int | None = None
    library: tuple[LibraryRecord, ...] = ()
    padding: Padding | None = None
    padding_kept: str = ""

    @property
    def kernels(self) -> tuple[KernelRecord, ...]:
        """The distinct kernels with the sums over their launches."""
        return group_launches(self.launches)

    @property
    def kernels_per_layer(self) -> int:
        """The most launches of any decoder layer (all launches if the model has no numbered layers)."""
        return kernels_per_layer(self.launches, self.fallbacks)

    @property
    def bytes_over_minimum(self) -> float:
        """Bytes moved over the least possible, of the whole program or its worst layer (the worse)."""
        return bytes_over_minimum(self.launches)

    @property
    def eager_fallbacks(self) -> int:
        """How many groups or nodes run eagerly."""
        return len(self.fallbacks)

    @property
    def modelled_us(self) -> float:
        """Modelled time of all launches of one call, microseconds."""
        return sum(launch.modelled_us for launch in self.launches)

    def summary(self) -> tuple[tuple[str, str], ...]:
        """The headline figures as (label, text)."""
        error = "not checked" if self.max_relative_error is None else f"{self.max_relative_error:.2e}"
        lines = [
            ("kernels per layer", str(self.kernels_per_layer)),
            ("launches per call", f"{len(self.launches)} of {len(self.kernels)} kernels"),
            ("bytes over minimum", f"{self.bytes_over_minimum:.3f}"),
            ("eager fallbacks", str(self.eager_fallbacks)),
            ("max relative error", error),
            ("modelled time", f"{self.modelled_us / 1e3:.3f} ms per call"),
        ]
        if self.rank_correlation is not None:
            lines.append(("rank correlation", f"{self.rank_correlation:.2f} (modelled, measured)"))
        if self.arena_bytes is not None:
            lines.append(("activations", f"{self.arena_bytes / 1e6:.2f} MB"))
        if self.padding is not None:
            lines.append(("padding", "is not computed: proved not to reach the results"))
        elif self.padding_kept:
            lines.append(("padding", f"is computed: {self.padding_kept}"))
        return tuple(lines)

    def title(self) -> str:
        """Model, target and sizes in one line."""
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes)
        where = f"{self.model} on {self.target.name} ({self.target.origin} ceilings)"
        return f"{where}: {sizes}" if sizes else where

    def to_json(self) -> str:
        """Indented JSON with stable keys; numbers that are not finite become "nan", "inf" or "-inf"."""
        content = {
            "schema": SCHEMA,
            "model": self.model,
            "target": asdict(self.target),
            "sizes": dict(self.sizes),
            "kernels_per_layer": self.kernels_per_layer,
            "bytes_over_minimum": self.bytes_over_minimum,
            "eager_fallbacks": self.eager_fallbacks,
            "max_relative_error": self.max_relative_error,
            "launches": len(self.launches),
            "modelled_us": self.modelled_us,
            "rank_correlation": self.rank_correlation,
            "arena_bytes": self.arena_bytes,
            "passes": [asdict(record) for record in self.passes],
            "masks": [asdict(record) for record in self.masks],
            "kernels": [asdict(record) for record in self.kernels],
            "library": [asdict(record) for record in self.library],
            "fallbacks": [asdict(record) for record in self.fallbacks],
            "phases": [asdict(record) for record in self.phases],
        }
        return json.dumps(finite(content), indent=2, allow_nan=False)

    def tables(self) -> tuple[Table, ...]:
        """The tables that have something to say."""
        tables = (
            pass_table(merge_runs(self.passes)),
            refusal_table(merge_runs(self.passes)),
            mask_table(self.masks),
            kernel_table(self.kernels),
            library_table(self.library),
            fallback_table(self.fallbacks),
            phase_table(self.phases),
        )
        return tuple(table for table in tables if table.rows)

    def to_markdown(self) -> str:
        """Headline figures and every table as Markdown."""
        lines = [f"# {self.title()}", ""]
        lines += [f"* {label}: {text}" for label, text in self.summary()]
        for table in self.tables():
            lines += ["", table.to_markdown()]
        return "\n".join(lines) + "\n"

    def render(self, console: Console) -> None:
        """Print the report to a terminal at least `WIDTH` columns wide (narrower ones fold long cells)."""
        console.print(self.title(), style="bold", markup=False)
        for label, text in self.summary():
            console.print(f"  {label:<19} {text}", markup=False, highlight=False)
        for table in self.tables():
            console.print()
            console.print(table.to_rich())


def finite(value: object) -> object:
    """`value` with the floats that JSON has no word for as strings ("inf", "nan")."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value
