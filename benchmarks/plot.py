"""The rows as a picture: one group of bars per workload, drawn as SVG without any library.

Bars are relative to the fastest system of their workload, so that workloads of any size share one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from benchmarks.rows import Row

_WIDTH, _LABEL, _BAR, _ROW, _GAP = 860, 300, 420, 18, 30
_OURS, _THEIRS = "#c2410c", "#64748b"
_FONT: Final = 'font-family="sans-serif" font-size="12"'


def speed(row: Row) -> float:
    """More is better: the value itself, or its inverse where it is a time. ValueError without a value."""
    if row.median is None or row.median <= 0:
        raise ValueError(
            f"{row.system} at {row.workload} of {row.model} has no positive median: {row.median}"
        )
    return 1 / row.median if row.unit == "ms" else row.median


def to_svg(rows: Sequence[Row]) -> str:
    """All rows that have a value, grouped by model and workload, the fastest first; an SVG document."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.median is not None and row.median > 0:
            groups.setdefault((row.model, row.workload), []).append(row)
    body: list[str] = []
    y = 10
    for (model, workload), members in groups.items():
        y += _GAP
        body.append(_text(10, y - 8, f"{model} {workload}", bold=True))
        best = max(map(speed, members))
        for row in sorted(members, key=speed, reverse=True):
            body += _bar(row, y, speed(row) / best)
            y += _ROW
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 20}" role="img">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"


def _bar(row: Row, y: int, share: float) -> list[str]:
    colour = _OURS if row.system.startswith("torchweld") else _THEIRS
    width = max(share * _BAR, 1)
    value = f"{row.median:.4g} {row.unit}"
    return [
        _text(_LABEL - 8, y + 13, row.system, anchor="end"),
        f'<rect x="{_LABEL}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 4}" fill="{colour}"/>',
        _text(round(_LABEL + width + 6), y + 13, value),
    ]


def _text(x: int, y: int, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {_FONT}{weight}>{escape(text)}</text>'
