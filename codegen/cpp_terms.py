"""Terms as C++ statements: every shared node gets one name, in the outermost loop that knows what it needs.

An `Emitter` holds the open loops of one part, outermost first. `value(term)` gives the text of a value and puts the
statements that it takes into the loop where they belong: a subterm that does not depend on the innermost axis is
computed outside of it. What reads memory below a `Guard` stays below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from torchweld.codegen.cpp_names import (
    HALVES,
    PrintError,
    converted,
    literal,
    loaded,
    stored,
    unwrapped,
    value_type,
)
from torchweld.codegen.cpp_ops import op_text
from torchweld.codegen.cpp_segments import loop_in_pieces
from torchweld.codegen.cpp_text import KernelNames, indented, index_text, offset_text
from torchweld.codegen.ir import Indirect, Kernel, Store, part_terms
from torchweld.codegen.packing import LAYOUT, columns_of
from torchweld.graph.terms import (
    Axis,
    Const,
    Contract,
    Decode,
    Expr,
    Fold,
    Guard,
    IndexValue,
    Load,
    Op,
    Ref,
    Term,
    bound_axes,
    children,
    index_exprs,
    op,
    walk,
)

_DEEP = 64
_INLINE_LENGTH = 60  # longer single-use expressions get a line and a name


@dataclass
class _Loop:
    """An open block: its statements, the axes and names that exist from here on, and what was computed in it."""

    symbols: frozenset[str]
    guarded: bool
    lines: list[str] = field(default_factory=list)
    values: dict[int, str] = field(default_factory=dict)
    indirects: dict[str, str] = field(default_factory=dict)


class Emitter:
    """The statements of one part. Axes are named by `axis`, loops opened by `push` and closed by `pop`."""

    def __init__(self, kernel: Kernel, names: KernelNames) -> None:
        self.kernel = kernel
        self.names = names
        self.refs: dict[str, tuple[str, torch.dtype]] = {}
        self._axes: dict[str, str] = {}
        self._indirects: dict[str, Indirect] = {i.symbol: i for i in kernel.indirects}
        self._loops: list[_Loop] = []
        self._needs: dict[int, frozenset[str]] = {}
        self._reads: dict[int, bool] = {}
        self._height: dict[int, int] = {}
        self._forced: set[int] = set()
        self._uses = count_uses(kernel)
        self._kept: list[Term] = []  # terms made here: an id must not be reused while it is a key

    # -- loops ----------------------------------------------------------------------------------------------------

    def push(self, symbols: Sequence[str] = (), guarded: bool = False) -> None:
        """Open a block in which the axes (and "ref:NAME" values) `symbols` exist."""
        self._loops.append(_Loop(frozenset(symbols), guarded))

    def pop(self) -> list[str]:
        """Close the innermost block; its statements."""
        return self._loops.pop().lines

    def line(self, text: str) -> None:
        """Add a statement to the innermost block."""
        self._loops[-1].lines.append(text)

    def nest(self, head: str, body: Sequence[str]) -> None:
        """Add a block with a head such as `for (...)`."""
        self.line(f"{head} {{" if head else "{")
        self._loops[-1].lines.extend(indented(body))
        self.line("}")

    def axis(self, axis: Axis) -> str:
        """The identifier of a loop variable; the same for the same axis name."""
        if axis.name not in self._axes:
            self._axes[axis.name] = self.names.namer.fresh(axis.name)
        return self._axes[axis.name]

    def adopt_axis(self, axis: Axis, other: Emitter) -> None:
        """Call a loop variable what another emitter of the same part calls it."""
        self._axes[axis.name] = other.axis(axis)

    def define_ref(self, name: str, text: str, dtype: torch.dtype) -> None:
        """Let `Ref(name)` stand for `text` from now on; a block has to be opened with the symbol "ref:NAME"."""
        self.refs[name] = (text, dtype)

    # -- index expressions ------------------------------------------------------------------------------------------

    def index(self, expr: Expr) -> str:
        """An index expression; sums and products in brackets."""
        return index_text(expr, self._symbol)

    def _symbol(self, name: str) -> str:
        if name in self._indirects:
            return self._indirect(name)
        if name in self._axes:
            return self._axes[name]
        if name in self.names.sizes:
            return self.names.sizes[name]
        raise PrintError(f"nothing is known of the symbol {name} in an index expression")

    def _indirect(self, name: str) -> str:
        for loop in reversed(self._loops):
            if name in loop.indirects:
                return loop.indirects[name]
        indirect = self._indirects[name]
        with self._outer(self._depth(self.needs(indirect.term), True)):
            text = converted(self.value(indirect.term), indirect.term.dtype, torch.int64)
            identifier = self.names.namer.fresh(name)
            extent = self.index(indirect.extent)
            self.line(f"const int64_t {identifier} = tw_checked({unwrapped(text)}, {extent}, error);")
            self._loops[-1].indirects[name] = identifier
        return identifier

    def offset(self, index: Sequence[Expr], shape: Sequence[Expr]) -> str:
        """The row-major offset of an element, in Horner's form."""
        return offset_text(index, shape, self._symbol)

    # -- what a term needs --------------------------------------------------------------------------------------------

    def needs(self, term: Term) -> frozenset[str]:
        """Names of the axes (indirect indices followed) and "ref:NAME" that the value depends on."""
        if id(term) in self._needs:
            return self._needs[id(term)]
        for node in walk(term):
            if id(node) in self._needs:
                continue
            names: set[str] = {f"ref:{node.name}"} if isinstance(node, Ref) else set()
            reads = isinstance(node, Load | Decode)
            for symbol in {str(s) for expr in index_exprs(node) for s in expr.free_symbols}:
                names |= self._symbol_needs(symbol)
                reads |= symbol in self._indirects
            for child in children(node):
                names |= self._needs[id(child)]
                reads |= self._reads[id(child)]
            names -= {axis.name for axis in bound_axes(node)}
            self._needs[id(node)], self._reads[id(node)] = frozenset(names), reads
            self._height[id(node)] = 1 + max((self._height[id(child)] for child in children(node)), default=0)
            self._kept.append(node)
        return self._needs[id(term)]

    def expr_needs(self, expr: Expr) -> frozenset[str]:
        """As `needs`, of an index expression."""
        return frozenset().union(*(self._symbol_needs(str(s)) for s in expr.free_symbols))

    def _symbol_needs(self, symbol: str) -> frozenset[str]:
        indirect = self._indirects.get(symbol)
        return frozenset({symbol}) if indirect is None else self.needs(indirect.term)

    def _depth(self, needs: frozenset[str], reads: bool) -> int:
        """The outermost open loop in which something can be computed."""
        depth = 0
        for number, loop in enumerate(self._loops):
            if loop.symbols & needs or (reads and loop.guarded):
                depth = number
        return depth

    @contextmanager
    def _outer(self, depth: int) -> Iterator[None]:
        """Work in the loop number `depth`: its block is still open, so statements go in front of the inner blocks."""
        inner, self._loops = self._loops[depth + 1 :], self._loops[: depth + 1]
        try:
            yield
        finally:
            self._loops = self._loops + inner

    # -- values ---------------------------------------------------------------------------------------------------

    def value(self, term: Term) -> str:
        """The text of a value in the innermost block: a name, a literal or a short expression."""
        for loop in reversed(self._loops):
            if id(term) in loop.values:
                return loop.values[id(term)]
        needs = self.needs(term)
        if self._height[id(term)] > _DEEP and id(term) not in self._forced:
            self._settle(term)
        depth = self._depth(needs, self._reads[id(term)])
        hoisted = depth < len(self._loops) - 1
        with self._outer(depth):
            return self._define(term, hoisted)

    def _settle(self, root: Term) -> None:
        """Name every 64th node of a long chain of operations first: the recursion must not follow it to its end."""
        done: set[int] = set()
        stack: list[tuple[Term, bool]] = [(root, False)]
        while stack:
            term, finished = stack.pop()
            if finished:
                if term is not root and self._height[id(term)] % _DEEP == 0:
                    self._forced.add(id(term))
                    self.value(term)
            elif isinstance(term, Op) and id(term) not in done:
                done.add(id(term))
                stack.append((term, True))
                stack.extend((arg, False) for arg in reversed(term.args))

    def _define(self, term: Term, hoisted: bool) -> str:
        match term:
            case Const():
                return literal(term.value, term.dtype)
            case Ref():
                return self._ref(term)
            case Guard():
                return self._remember(term, self._guard(term))
            case Fold():
                return self._remember(term, self._fold(term))
            case Contract():
                product = op("mul", term.a, term.b)
                self._kept.append(product)
                return self._remember(term, self._fold_sum(term.k, product, term.dtype))
        text = self._expression(term)
        shared = self._uses.get(id(term), 0) > 1 or id(term) in self._forced
        if not shared and not hoisted and len(text) <= _INLINE_LENGTH:
            return text
        name = self.names.namer.fresh("v")
        self.line(f"const {value_type(term.dtype)} {name} = {unwrapped(text)};")
        return self._remember(term, name)

    def _remember(self, term: Term, name: str) -> str:
        self._loops[-1].values[id(term)] = name
        return name

    def _expression(self, term: Term) -> str:
        match term:
            case Op():
                return op_text(term, [self.value(arg) for arg in term.args])
            case Load():
                return self._load(term)
            case Decode():
                return self._decode(term)
            case IndexValue():
                return converted(self.index(term.expr), torch.int64, term.dtype)
        raise PrintError(f"a {type(term).__name__} cannot stand in this place")

    def _ref(self, term: Ref) -> str:
        if term.name not in self.refs:
            known = ", ".join(self.refs) or "nothing"
            raise PrintError(f"Ref {term.name!r} before it is bound; bound: {known}")
        text, dtype = self.refs[term.name]
        return converted(text, dtype, term.dtype)

    def _load(self, term: Load) -> str:
        buffer = self.kernel.buffer(term.buffer)
        text = f"{self.names.buffers[term.buffer]}[{self.offset(term.index, buffer.shape)}]"
        return converted(loaded(text, buffer.dtype), buffer.dtype, term.dtype)

    def row_pointer(self, term: Decode) -> str:
        """The address of the stored row that `term` reads."""
        buffer = self.kernel.buffer(term.buffer)
        row = self.offset((*term.row, term.column * 0), buffer.shape)
        return f"{self.names.buffers[term.buffer]} + {row}"

    def _decode(self, term: Decode) -> str:
        if term.format.startswith(LAYOUT):
            buffer = self.kernel.buffer(term.buffer)
            place = f"{self.names.buffers[term.buffer]}, {unwrapped(self.index(term.row[0]))}"
            columns = columns_of(term.format, int(buffer.shape[-1]))
            return f"tw_packed_at<tw_{term.format}>({place}, {columns}, {unwrapped(self.index(term.column))})"
        return f"tw_{term.format}::at({self.row_pointer(term)}, {unwrapped(self.index(term.column))})"

    def _guard(self, term: Guard) -> str:
        condition = unwrapped(self.value(term.condition))
        name = self.names.namer.fresh("chosen")
        self.line(f"{value_type(term.dtype)} {name};")
        bodies = []
        for branch in (term.value, term.other):
            self.push(guarded=True)
            self.line(f"{name} = {unwrapped(converted(self.value(branch), branch.dtype, term.dtype))};")
            bodies.append(self.pop())
        # Both first: what they share and may be computed unguarded goes in front of the whole statement.
        for head, body in zip((f"if ({condition})", "else"), bodies, strict=True):
            self.nest(head, body)
        return name

    # -- folds ----------------------------------------------------------------------------------------------------

    def _fold_sum(self, axis: Axis, body: Term, dtype: torch.dtype) -> str:
        return self._fold_text(f"tw_sum_of<{value_type(dtype)}>", (axis,), body, dtype)

    def _fold(self, term: Fold) -> str:
        kind = term.monoid.kind
        if kind in ("argmax", "argmin"):
            return self._fold_text(kind, term.axes, term.body, term.dtype)
        return self._fold_text(f"tw_{kind}_of<{value_type(term.dtype)}>", term.axes, term.body, term.dtype)

    def _fold_text(self, monoid: str, axes: Sequence[Axis], body: Term, dtype: torch.dtype) -> str:
        """Loops that fill a chunk with values, which vectorize, and join it to the lanes of the state."""
        *outer, last = axes
        width = 16 if last.extent.is_Integer and last.extent <= 32 else 64
        state, chunk = self.names.namer.fresh("state"), self.names.namer.fresh("chunk")
        position = monoid in ("argmax", "argmin")
        element = body.dtype if position else dtype
        kind = value_type(element)
        if position:
            self.line(f"tw_arg_fold<{kind}, {'true' if monoid == 'argmax' else 'false'}> {state};")
        else:
            self.line(f"tw_fold<{kind}, {monoid}, {width}> {state};")
        for axis in outer:
            self.axis(axis)
            self.push((axis.name,))
        self._chunk_loop(last, body, element, state, chunk, width)
        for axis in reversed(outer):
            name, lines = self.axis(axis), self.pop()
            self.nest(f"for (int64_t {name} = 0; {name} < {self.index(axis.extent)}; ++{name})", lines)
        name = self.names.namer.fresh("folded")
        result = f"{state}.result()"
        if not position and dtype in HALVES:
            result = f"tw_round_{HALVES[dtype]}({result})"
        self.line(f"const {value_type(dtype)} {name} = {result};")
        return name

    def _chunk_loop(
        self, axis: Axis, body: Term, element: torch.dtype, state: str, chunk: str, width: int
    ) -> None:
        name, extent = self.axis(axis), self.index(axis.extent)
        first, count, lane = (
            self.names.namer.fresh(wish) for wish in (f"{name}_first", f"{name}_count", "lane")
        )
        self.push()
        self.push((axis.name,))
        self.line(f"const int64_t {name} = {first} + {lane};")
        self.line(f"{chunk}[{lane}] = {unwrapped(converted(self.value(body), body.dtype, element))};")
        inner = self.pop()
        self.line(f"const int64_t {count} = tw_least<int64_t>({width}, {extent} - {first});")
        self.line(f"alignas(64) {value_type(element)} {chunk}[{width}];")
        self.line("#pragma GCC ivdep")
        self.nest(f"for (int64_t {lane} = 0; {lane} < {count}; ++{lane})", inner)
        self.line(f"{state}.add({chunk}, {count});")
        lines = self.pop()
        self.nest(f"for (int64_t {first} = 0; {first} < {extent}; {first} += {width})", lines)

    # -- stores -----------------------------------------------------------------------------------------------------

    def store(self, store: Store) -> None:
        """Add `buffer[index] = value`."""
        buffer = self.kernel.buffer(store.buffer)
        value = self.value(store.value)
        place = f"{self.names.buffers[store.buffer]}[{self.offset(store.index, buffer.shape)}]"
        self.line(f"{place} = {unwrapped(stored(value, store.value.dtype, buffer.dtype))};")

    def vector_loop(
        self,
        axis: Axis,
        lines: Sequence[str],
        begin: str = "0",
        end: str | None = None,
        piece: int | None = None,
    ) -> list[str]:
        """`lines` in a loop over `axis` (or from `begin` to `end`), marked as free of dependences between turns.

        piece: how long the pieces of a loop over the whole axis are (cpp_segments.py).
        """
        name = self.axis(axis)
        if piece is not None:
            return loop_in_pieces(name, int(axis.extent), piece, lines)
        end = unwrapped(self.index(axis.extent)) if end is None else end
        head = f"for (int64_t {name} = {begin}; {name} < {end}; ++{name}) {{"
        return ["#pragma GCC ivdep", head, *indented(lines), "}"]

    def extents(self, axes: Sequence[Axis]) -> str:
        """The number of points of `axes`."""
        return " * ".join(self.index(axis.extent) for axis in axes) or "1"

    def unflatten(self, flat: str, axes: Sequence[Axis]) -> list[str]:
        """Statements that define every axis from the row-major number `flat`."""
        lines: list[str] = []
        divisor = ""
        for number, axis in enumerate(reversed(axes)):
            text = f"{flat}{divisor}"
            if number < len(axes) - 1:
                text += f" % {self.index(axis.extent)}"
            lines.append(f"const int64_t {self.axis(axis)} = {text};")
            divisor += f" / {self.index(axis.extent)}"
        return lines[::-1]


def count_uses(kernel: Kernel) -> dict[int, int]:
    """How many terms and stores use each node, by id."""
    uses: dict[int, int] = {}
    for indirect in kernel.indirects:
        for term in walk(indirect.term):
            for child in children(term):
                uses[id(child)] = uses.get(id(child), 0) + 1
    for part in kernel.parts:
        for term in part_terms(part):
            for child in children(term):
                uses[id(child)] = uses.get(id(child), 0) + 1
        for store in part.stores:
            uses[id(store.value)] = uses.get(id(store.value), 0) + 1
    return uses
