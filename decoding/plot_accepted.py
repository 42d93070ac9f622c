"""A picture of the accepted lengths: how many passes took how many guesses, as SVG written by hand.

    Path("accepted.svg").write_text(plot_accepted(statistics, "smollm2, lookup"))

One series, so one colour and no legend; every bar carries its number, so the grid stays faint.
"""

from __future__ import annotations

import math
from html import escape
from typing import Final

from torchweld.decoding.statistics import Statistics

_LEFT, _TOP, _PLOT_HEIGHT, _BOTTOM = 56, 64, 200, 52
_SLOT, _BAR_WIDTH, _LEAST_WIDTH = 44, 30, 520
_INK, _FAINT, _GRID, _FILL = "#1f2933", "#5b6770", "#e3e7ea", "#2a6f97"
_GRID_LINES: Final = 5


def plot_accepted(statistics: Statistics, title: str) -> str:
    """An SVG document: a bar per number of accepted guesses; says so where no pass had guesses."""
    counts = statistics.accepted_lengths
    width = max(_LEAST_WIDTH, _LEFT + _SLOT * len(counts) + 24)
    height = _TOP + _PLOT_HEIGHT + _BOTTOM
    body = [
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(_LEFT, 24, title, size=15, weight="bold"),
        _text(_LEFT, 44, _subtitle(statistics), colour=_FAINT),
    ]
    body += _grid(max(counts), width) if counts else []
    for length, count in enumerate(counts):
        body += _bar(length, count, max(counts))
    if counts:
        middle = _LEFT + _SLOT * len(counts) / 2
        body.append(_text(middle, height - 14, "accepted guesses", anchor="middle", colour=_FAINT))
        body.append(_text(_LEFT - 8, _TOP - 6, "passes", anchor="end", colour=_FAINT))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" font-family="sans-serif">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *body, "</svg>"]) + "\n"


def _subtitle(statistics: Statistics) -> str:
    s = statistics
    if not s.speculative_passes:
        return f"no pass had guesses; {s.passes} passes"
    return (
        f"mean {s.mean_accepted:.2f}; {s.acceptance_rate:.0%} of {s.drafted} guesses accepted; "
        f"{s.speculative_passes} of {s.passes} passes had guesses"
    )


def _grid(most: int, width: int) -> list[str]:
    """Faint lines at round numbers of passes."""
    step = _round_step(most / _GRID_LINES)
    lines: list[str] = []
    for value in range(0, most + 1, step):
        y = _y(value, most)
        lines.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{width - 16}" y2="{y:.1f}" stroke="{_GRID}"/>')
        lines.append(_text(_LEFT - 8, y + 4, f"{value}", anchor="end", colour=_FAINT))
    return lines


def _round_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least `least`."""
    power = int(10 ** math.floor(math.log10(max(least, 1))))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _bar(length: int, count: int, most: int) -> list[str]:
    x, y = _LEFT + _SLOT * length + (_SLOT - _BAR_WIDTH) / 2, _y(count, most)
    middle = x + _BAR_WIDTH / 2
    return [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{_BAR_WIDTH}" height="{_y(0, most) - y:.1f}" rx="2" fill="{_FILL}"/>',
        _text(middle, y - 5, f"{count}", anchor="middle"),
        _text(middle, _TOP + _PLOT_HEIGHT + 18, f"{length}", anchor="middle"),
    ]


def _y(value: int, most: int) -> float:
    # a tenth of the height stays free above the highest bar, for its number
    return _TOP + _PLOT_HEIGHT * (1 - 0.9 * value / max(most, 1))


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "normal",
    anchor: str = "start",
    colour: str = _INK,
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
