"""Tables as text cells, once as rich tables and once as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torchweld.optimizer.ledger import Fallback, KernelRecord, LibraryRecord, MaskRecord, PassRecord, Phase

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Justify = Literal["left", "right"]


@dataclass(frozen=True)
class Column:
    """A column's heading and on which side its cells stand; a wide one may fold, others never do."""

    heading: str
    justify: Justify = "right"
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A title, columns and rows of text (plain, no markup). See `drop_empty_columns`."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_rich(self) -> RichTable:
        """For a terminal."""
        # Most runs print no table.
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(
            title=escape(self.title),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            show_header=any(column.heading for column in self.columns),
            pad_edge=False,
            collapse_padding=True,
        )
        for column in self.columns:
            table.add_column(
                escape(column.heading), justify=column.justify, overflow="fold", no_wrap=not column.wide
            )
        for row in self.rows:
            table.add_row(*(escape(cell) for cell in row))
        return table

    def to_markdown(self) -> str:
        """With a heading of second order."""
        rule = [":--" if column.justify == "left" else "--:" for column in self.columns]
        rows = ([column.heading for column in self.columns], rule, *self.rows)
        return "\n".join([f"## {self.title}", "", *(_markdown_row(row) for row in rows)])


def drop_empty_columns(table: Table) -> Table:
    """The table without columns that say nothing in any row."""
    kept = [i for i in range(len(table.columns)) if any(row[i] for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(table.title, tuple(table.columns[i] for i in kept), rows)


def pass_table(passes: Sequence[PassRecord]) -> Table:
    """One line per pass: what it found, did, cost and saved."""
    columns = (
        Column("pass", "left", wide=True),
        Column("kind", "left"),
        *(Column(heading) for heading in ("runs", "matched", "refused", "applied", "kept", "ms")),
        *(Column(heading) for heading in ("model us", "measured", "error")),
    )
    rows = tuple(
        (
            record.name,
            record.exactness,
            str(record.runs) if record.runs > 1 else "",
            str(record.matched),
            str(record.refused_sites),
            str(record.applied),
            "yes" if record.kept else "no",
            f"{record.milliseconds:.1f}",
            number(record.modelled_saving_us),
            number(record.measured_saving_us),
            "" if record.error_added is None else f"{record.error_added:.0e}",
        )
        for record in passes
    )
    title = "Passes (saving per call: modelled and measured, us; error added)"
    return drop_empty_columns(Table(title, columns, rows))


def refusal_table(passes: Sequence[PassRecord]) -> Table:
    """Why sites were left alone: one line per pass and reason, with one place as an example."""
    names = Column("pass", "left"), Column("sites")
    columns = (*names, Column("reason", "left", wide=True), Column("such as", "left", wide=True))
    rows = []
    for record in passes:
        places = {refusal.reason: refusal.where for refusal in reversed(record.refused)}
        rows += [(record.name, str(count), reason, places[reason]) for reason, count in record.reasons()]
    return Table("Refused", columns, tuple(rows))


def mask_table(masks: Sequence[MaskRecord]) -> Table:
    """What every attention's mask was proved to be, and how: one line per kind and proof."""
    columns = Column("mask", "left"), Column("layers"), Column("how it is known", "left", wide=True)
    rows = tuple((mask.name, str(mask.count), mask.proof) for mask in masks)
    return Table("Attention masks (proved for every size, never taken from an example)", columns, rows)


def kernel_table(kernels: Sequence[KernelRecord]) -> Table:
    """One line per kernel; bytes and FLOPs of one launch, times of all launches in a call."""
    columns = (
        Column("kernel", "left", wide=True),
        Column("parts", "left", wide=True),
        *(Column(heading) for heading in ("uses", "KB/use", "x min", "MFLOP/use", "model us", "measured")),
    )
    rows = tuple(
        (
            kernel.name,
            _parts(kernel.parts),
            str(kernel.uses),
            f"{kernel.bytes_moved / kernel.uses / 1e3:.1f}",
            f"{kernel.bytes_moved / kernel.bytes_minimum:.2f}" if kernel.bytes_minimum else "",
            f"{kernel.flops / kernel.uses / 1e6:.2f}",
            number(kernel.modelled_us),
            number(kernel.measured_us),
        )
        for kernel in kernels
    )
    title = "Kernels (bytes and FLOPs per launch; times of all launches of one call, us)"
    return drop_empty_columns(Table(title, columns, rows))


def fallback_table(fallbacks: Sequence[Fallback]) -> Table:
    """What runs eagerly, and why."""
    columns = tuple(Column(heading, "left", wide=True) for heading in ("runs eagerly", "reason", "source"))
    rows = tuple((item.what, item.reason, item.source) for item in fallbacks)
    return Table("Eager fallbacks", columns, rows)


def library_table(records: Sequence[LibraryRecord]) -> Table:
    """Who computes the products of many rows, and by which times."""
    columns = Column("kernel", "left", wide=True), Column("runs", "left"), Column("why", "left", wide=True)
    rows = tuple((r.kernel, "ATen" if r.chosen else "ours", r.sentence()) for r in records)
    return Table("Products of many rows (one launch, measured in turn with ATen)", columns, rows)


def phase_table(phases: Sequence[Phase]) -> Table:
    """Seconds of compile time."""
    rows = [(phase.name, f"{phase.seconds:.2f}") for phase in phases]
    if len(rows) > 1:
        rows.append(("total", f"{sum(phase.seconds for phase in phases):.2f}"))
    return Table("Compile time (s)", (Column("phase", "left"), Column("seconds")), tuple(rows))


def number(value: float | None) -> str:
    """Three significant digits or whole numbers; empty for what nobody measured."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _parts(parts: Sequence[str]) -> str:
    """`3 matmul, row`: equal kinds counted."""
    counts = {part: parts.count(part) for part in parts}
    return ", ".join(part if count == 1 else f"{count} {part}" for part, count in counts.items())


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
