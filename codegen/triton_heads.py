"""The tile of a Triton attention: its rows are queries times the query heads that read one key head.

before:  programs over (batch, query head); a tile of queries of that head meets the keys of head // share
after:   programs over (batch, key head); row r of a tile is query r // share, head key_head * share + r % share
why:     every key and value is loaded once for its group; for one new row the tile is the group
legal:   `share` neighbouring heads read the same keys and values, and see them from one past and one path
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy

from torchweld.codegen.ir import AttentionPart, Bind, Store, part_axes, part_terms
from torchweld.graph.index import FloorDiv
from torchweld.graph.terms import Attend, Axis, Expr, Term, bound_axes, free_symbols, transform


@dataclass(frozen=True)
class HeadGroups:
    """A part over groups of heads: the rows of its tiles are the queries times `members` (None: one head each)."""

    part: AttentionPart
    members: Axis | None

    @property
    def share(self) -> int:
        """Rows per query."""
        return 1 if self.members is None else int(self.members.extent)

    @property
    def rows(self) -> tuple[Axis, ...]:
        """The axes of the tiles' rows."""
        return (self.part.t,) if self.members is None else (self.part.t, self.members)

    def first_query(self, block_rows: int) -> str:
        """The first query of tile `query_tile`."""
        if block_rows % self.share == 0:
            return f"query_tile * {block_rows // self.share}"
        return f"query_tile * {block_rows} // {self.share}"

    def end_query(self, block_rows: int, front: str) -> str:
        """The end of the tile's queries, counted from where `front` is the tile's first one."""
        if block_rows % self.share == 0:
            return f"{front} + {block_rows // self.share}"
        # A tile that begins inside a query reaches one further than its rows fill.
        return f"{front} + {(block_rows + self.share - 2) // self.share + 1}"


def attend_of(part: AttentionPart) -> Attend:
    """The Attend that an AttentionPart binds."""
    if not isinstance(part.attend.term, Attend):
        raise TypeError(f"bind {part.attend.name!r} of an AttentionPart: expected an Attend")
    return part.attend.term


def group_heads(part: AttentionPart) -> HeadGroups:
    """The part with its heads grouped, if several read one key head."""
    attend = attend_of(part)
    if attend.share == 1 or not part.batch:
        return HeadGroups(part, None)
    *outer, head = part.batch
    if any(term is not None and head.symbol in free_symbols(term) for term in (attend.past, attend.path)):
        return HeadGroups(part, None)
    key_head, members = _new_axes(part, head, attend.share)
    is_single = key_head.extent == 1
    group = sympy.Integer(0) if is_single else key_head.symbol

    def place(member: Expr) -> Callable[[Expr], Expr]:
        divided, moved = FloorDiv(head.symbol, sympy.Integer(attend.share)), group * attend.share + member
        return lambda expr: expr.subs(divided, group).subs(head.symbol, moved)

    of_row = place(members.symbol)
    grouped = _moved(attend, of_row)
    assert isinstance(grouped, Attend)
    of_group = place(sympy.Integer(0))
    grouped = replace(grouped, k=_moved(attend.k, of_group), v=_moved(attend.v, of_group))
    stores = tuple(Store(s.buffer, tuple(map(of_row, s.index)), _moved(s.value, of_row)) for s in part.stores)
    batch = tuple(outer) if is_single else (*outer, key_head)
    new_part = replace(part, batch=batch, attend=Bind(part.attend.name, grouped), stores=stores)
    return HeadGroups(new_part, members)


def _moved(term: Term, index: Callable[[Expr], Expr]) -> Term:
    return transform(term, lambda _: None, index)


def _new_axes(part: AttentionPart, head: Axis, share: int) -> tuple[Axis, Axis]:
    """The axes of key heads and of a group's members, with names that the part does not use."""
    used = {axis.name for axis in part_axes(part)}
    used |= {axis.name for term in part_terms(part) for axis in bound_axes(term)}
    used |= {str(size) for axis in part_axes(part) for size in axis.extent.free_symbols}
    members = Axis(_unused("member", used), sympy.Integer(share))
    return Axis(_unused(f"key_{head.name}", used), FloorDiv(head.extent, sympy.Integer(share))), members


def _unused(hint: str, used: set[str]) -> str:
    while hint in used:
        hint += "_"
    return hint
