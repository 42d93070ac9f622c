"""`torchweld cache list | clear`."""

from __future__ import annotations

import time

from rich.console import Console

from torchweld.codegen.cache import Cache
from torchweld.optimizer.report_tables import Column, Table


def list_entries(console: Console) -> None:
    """Print every entry and the totals."""
    cache = Cache()
    columns = (Column("key", "left"), Column("name", "left", wide=True), Column("KB"), Column("made", "left"))
    rows = tuple(
        (
            entry.key[:12],
            entry.meta.get("name") or entry.path.suffix.lstrip("."),
            f"{entry.bytes / 1e3:.1f}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.created)),
        )
        for entry in cache.entries()
    )
    if rows:
        console.print(Table("Entries", columns, rows).to_rich())
    stats = cache.stats()
    text = f"{count_entries(stats.entries)}, {stats.bytes / 1e6:.2f} MB in {stats.folder}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def clear_entries(console: Console) -> None:
    """Delete all entries and say how many there were."""
    cache = Cache()
    text = f"{count_entries(cache.clear())} deleted from {cache.folder}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def count_entries(count: int) -> str:
    """`1 entry`, `2 entries`."""
    return f"{count} entr{'y' if count == 1 else 'ies'}"
