"""`torchweld passes`: every pass of the pipeline, in order, with the five lines of its docstring."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Protocol

from rich.console import Console

from torchweld.graph.rewrite import Exactness
from torchweld.optimizer.pipeline import pipeline as all_passes
from torchweld.optimizer.suggest import check_name

LINES = ("before", "after", "why", "legal", "source")
_FIELD = re.compile(rf"^({'|'.join(LINES)}):[ \t]*", re.MULTILINE)


class Described(Protocol):
    """A pass over nodes or over groups, as far as this command cares."""

    @property
    def NAME(self) -> str: ...

    @property
    def EXACTNESS(self) -> Exactness: ...


@dataclass(frozen=True)
class PassCard:
    """What a pass says about itself; each of the five lines may have several lines."""

    name: str
    exactness: str
    summary: str
    before: str
    after: str
    why: str
    legal: str
    source: str


def describe(pass_: Described) -> PassCard:
    """Take a pass's docstring apart. Raises ValueError if one of the five lines is missing."""
    text = inspect.getdoc(pass_) or ""
    head, *parts = _FIELD.split(text)
    bodies = (textwrap.dedent(" " * 10 + body).strip() for body in parts[1::2])
    lines = dict(zip(parts[::2], bodies, strict=True))
    missing = [name for name in LINES if not lines.get(name)]
    if missing:
        raise ValueError(f"pass {pass_.NAME}: its docstring has no line {missing[0]!r}; it needs {LINES}")
    return PassCard(pass_.NAME, pass_.EXACTNESS, " ".join(head.split()), *(lines[name] for name in LINES))


def show_passes(
    console: Console,
    name: str | None = None,
    *,
    as_json: bool = False,
    pipeline: Iterable[Described] | None = None,
) -> None:
    """Print the cards of all passes, or of the one called `name` (UnknownNameError if there is none)."""
    described = all_passes() if pipeline is None else pipeline
    cards = list({card.name: card for card in map(describe, described)}.values())
    if name is not None:
        check_name("pass", name, [card.name for card in cards])
        cards = [card for card in cards if card.name == name]
    if as_json:
        print(json.dumps([asdict(card) for card in cards], indent=2))
        return
    for card in cards:
        console.print(f"{card.name} ({card.exactness})", style="bold", markup=False)
        console.print(f"  {card.summary}", markup=False, highlight=False)
        for line in LINES:
            body = textwrap.indent(str(getattr(card, line)), " " * 10).strip()
            console.print(f"  {line + ':':<8}{body}", markup=False, highlight=False, soft_wrap=True)
        console.print()
