"""Terms as Triton source: loads with masks, pointwise operations, guards and decodes.  Folds follow in triton_folds.

Every masked load names the value that masked lanes get.  A data-dependent index that is out of range reads as 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import sympy
import torch

from torchweld.codegen.ir import Indirect, Kernel
from torchweld.codegen.triton_frame import Frame, IndexPrinter
from torchweld.codegen.triton_text import (
    DTYPE_NAMES,
    EXACT_IN_HALF,
    Value,
    carrier_name,
    is_half,
    literal,
    spell,
)
from torchweld.codegen.triton_writer import Writer
from torchweld.graph.formats import get_format
from torchweld.graph.formats.terms import decode_terms
from torchweld.graph.terms import (
    COMPARISONS,
    Const,
    Contract,
    Decode,
    Expr,
    Fold,
    Guard,
    IndexValue,
    Load,
    Monoid,
    Op,
    Ref,
    Term,
    cast,
    children,
    index_exprs,
    walk,
)

_LONG = 72
"""An expression longer than this many characters gets a name of its own."""


@dataclass(frozen=True, eq=False)
class ByteRead(Term):
    """The number of `dtype` at byte `start + offset` of a stored weight; `start` is the block's first byte."""

    buffer: str
    start: Value
    offset: Expr


class TermPrinter(IndexPrinter):
    """Prints terms into `writer`, each distinct one once per frame."""

    def __init__(self, kernel: Kernel, pointers: dict[str, str], writer: Writer, frame: Frame) -> None:
        super().__init__(writer, frame)
        self.kernel = kernel
        self.pointers = pointers
        self.indirects: dict[str, Indirect] = {str(i.symbol): i for i in kernel.indirects}
        self.refs: dict[str, Value] = {}
        self.guards: tuple[Value, ...] = ()
        self.uses: Counter[int] = Counter()
        self.memo: dict[tuple[int, tuple[Value, ...]], Value] = {}
        self.kept: list[Term] = []  # terms made here: memo and uses know them by identity, so they must live

    # -- scopes ---------------------------------------------------------------------------------------------

    @contextmanager
    def within(self, frame: Frame) -> Iterator[None]:
        """Print in another frame; what was printed in this one is known again afterwards."""
        saved = self.frame, self.memo
        self.frame, self.memo = frame, {}
        try:
            yield
        finally:
            self.frame, self.memo = saved

    @contextmanager
    def guarded(self, condition: Value) -> Iterator[None]:
        """Print what is valid only where `condition` holds."""
        saved = self.guards
        self.guards = self.guards if condition in self.guards else (*self.guards, condition)
        try:
            yield
        finally:
            self.guards = saved

    @contextmanager
    def captured(self) -> Iterator[list[str]]:
        """Collect a block's lines; nothing printed inside is known afterwards."""
        with self.within(self.frame), self.writer.captured() as lines:
            yield lines

    def count_uses(self, roots: Iterable[Term]) -> None:
        """Learn which terms have several users: those get a name."""
        seen: set[int] = set()
        for root in roots:
            self.uses[id(root)] += 1
            for term in walk(root):
                if id(term) not in seen:
                    seen.add(id(term))
                    self.uses.update(id(child) for child in children(term))

    def adopt(self, term: Term) -> Term:
        """Take in a term that was made while printing."""
        self.kept.append(term)
        self.count_uses([term])
        return term

    # -- indices and masks ----------------------------------------------------------------------------------

    def indirect(self, symbol: Expr) -> Value | None:
        """The printed term of a data-dependent index."""
        if str(symbol) not in self.indirects:
            return None
        value = self.term(self.indirects[str(symbol)].term)
        return self.writer.let(str(symbol), value)

    def dims_of(self, term: Term) -> frozenset[str]:
        """The tile dimensions that `term` spans in this frame."""
        bound = {axis.symbol for node in walk(term) if isinstance(node, Fold) for axis in node.axes}
        bound |= {node.k.symbol for node in walk(term) if isinstance(node, Contract)}
        dims: set[str] = set()
        for node in walk(term):
            if isinstance(node, Ref):
                dims |= self.refs[node.name].dims
            for expr in index_exprs(node):
                for symbol in expr.free_symbols - bound:
                    dims |= self.dims_of_symbol(symbol)
        return frozenset(dims)

    def dims_of_symbol(self, symbol: Expr) -> frozenset[str]:
        """`dims_of` for one symbol, without printing anything."""
        if str(symbol) in self.frame.values:
            return self.frame.values[str(symbol)].dims
        found = self.frame.group_of(symbol)
        if found is not None:
            return found[0].flat.dims
        indirect = self.indirects.get(str(symbol))
        return frozenset() if indirect is None else self.dims_of(indirect.term)

    def conditions(self, dims: frozenset[str], exprs: Sequence[Expr]) -> tuple[list[str], frozenset[str]]:
        """When a load or store may happen: inside the tile, under the guards, with legal indirect indices."""
        texts, spanned = self.frame.masks(dims), dims
        for guard in self.guards:
            texts.append(guard.operand)
            spanned |= guard.dims
        symbols = {s for expr in exprs for s in expr.free_symbols if str(s) in self.indirects}
        for symbol in sorted(symbols, key=str):
            value, extent = self.symbol(symbol), self.index(self.indirects[str(symbol)].extent)
            legal = Value(f"({value.operand} >= 0) & ({value.operand} < {extent.operand})", value.dims)
            texts.append(self.writer.let(f"{symbol}_legal", legal).text)
            spanned |= value.dims
        return texts, spanned

    # -- terms ----------------------------------------------------------------------------------------------

    def term(self, term: Term) -> Value:
        """The text of a term; terms with several users and long ones become variables."""
        key = (id(term), self.guards)
        if key not in self.memo:
            value = self.compute(term)
            is_shared = self.uses[id(term)] > 1 and not isinstance(term, Const | Ref | IndexValue)
            if (is_shared or len(value.text) > _LONG) and not value.text.isidentifier():
                value = self.writer.let(self.hint(term), value)
            self.memo[key] = value
        return self.memo[key]

    def hint(self, term: Term) -> str:
        """What to call the variable of a term."""
        match term:
            case Op():
                return term.name
            case Load() | Decode() | ByteRead():
                return term.buffer
        return type(term).__name__.lower()

    def compute(self, term: Term) -> Value:
        """`term` without the memory."""
        match term:
            case Const():
                return literal(term.value)
            case IndexValue():
                return self.index_value(term)
            case Ref():
                return self.refs[term.name]
            case Load():
                return self.load(term)
            case ByteRead():
                return self.byte_read(term)
            case Decode():
                return self.decode(term)
            case Op():
                return self.op(term)
            case Guard():
                return self.guard(term)
            case Fold():
                return self.fold(term)
            case Contract():
                product = Op(term.dtype, "mul", (cast(term.a, term.dtype), cast(term.b, term.dtype)))
                return self.term(self.adopt(Fold(term.dtype, Monoid("sum"), (term.k,), product)))
        raise NotImplementedError(
            f"kernel {self.kernel.name}: {type(term).__name__} inside another term has no spelling in Triton"
        )

    def fold(self, term: Fold) -> Value:
        """A reduction; see triton_folds."""
        raise NotImplementedError

    def index_value(self, term: IndexValue) -> Value:
        """An index expression as a number of the term's dtype."""
        value = self.index(term.expr)
        if value.is_literal:
            return value
        dtype = carrier_name(term.dtype)
        if not value.dims:
            return Value(f"tl.cast({value.text}, {dtype})")
        return Value(f"{value.operand}.to({dtype})", value.dims)

    def load(self, term: Load) -> Value:
        """One masked load, widened to the carrier; named after its buffer."""
        buffer = self.kernel.buffer(term.buffer)
        offset = self.offset(term.index, buffer.shape)
        text = self.load_text(self.pointers[term.buffer], offset, term.index)
        if is_half(buffer.dtype):
            text = Value(f"{text.text}.to(tl.float32)", text.dims)
        return self.writer.let(term.buffer, text)

    def load_text(self, pointer: str, offset: Value, exprs: Sequence[Expr] = ()) -> Value:
        """tl.load of `pointer + offset` where that is legal."""
        conditions, dims = self.conditions(offset.dims, exprs)
        at = pointer if offset.text == "0" else f"{pointer} + {offset.text}"
        if dims != offset.dims and not offset.dims:
            at += f" + 0 * {self.tile_index(dims)}"  # a mask must not be wider than a scalar pointer
        if not conditions:
            return Value(f"tl.load({at})", dims)
        return Value(f"tl.load({at}, mask={all_of(conditions)}, other=0)", dims)

    def tile_index(self, dims: frozenset[str]) -> str:
        """Any integer tile that spans one of `dims`."""
        group = next(g for g in self.frame.groups if g.flat.dims & dims)
        return group.flat.operand

    def op(self, term: Op) -> Value:
        """A pointwise operation."""
        if term.name in COMPARISONS and any(isinstance(a, Const) for a in term.args):
            args = [self.index(a.expr) if isinstance(a, IndexValue) else self.term(a) for a in term.args]
        else:
            args = [self.term(a) for a in term.args]
        dims = frozenset[str]().union(*(a.dims for a in args))
        if term.name == "cast":
            return self.cast(args[0], term.args[0].dtype, term.dtype)
        if term.name == "bitcast":
            return self.bitcast(args[0], term.args[0].dtype, term.dtype)
        if term.name == "pow" and (fast := self.small_power(args[0], term.args[1])) is not None:
            return self.rounded(fast, term)
        spelling = spell(term.name, term.args[0].dtype)
        if spelling.helper is not None:
            self.writer.helpers[spelling.helper] = None
        is_bare = all(a.is_literal for a in args) or (term.name == "pow" and args[0].is_literal)
        if is_bare and not isinstance(term.args[0], IndexValue):
            name = carrier_name(term.args[0].dtype)
            args[0] = self.writer.let("constant", Value(f"tl.full([], {args[0].text}, {name})"))
        fields = dict(zip("abc", (a.text for a in args), strict=False))
        operands = dict(zip("pq", (a.operand for a in args), strict=False))
        text = spelling.template.format(**fields, **operands)
        return self.rounded(Value(text, dims, spelling.is_atom), term)

    def rounded(self, value: Value, term: Op) -> Value:
        """A result brought to the term's dtype where the operation does not do so itself."""
        if is_half(term.dtype) and term.name not in EXACT_IN_HALF:
            return Value(f"{value.operand}.to({DTYPE_NAMES[term.dtype]}).to(tl.float32)", value.dims)
        narrow = term.dtype.itemsize < 4 and not term.dtype.is_floating_point and term.dtype != torch.bool
        literal_where = term.name == "where" and any(isinstance(a, Const) for a in term.args[1:])
        if narrow or (literal_where and term.dtype not in (torch.float32, torch.bool)):
            return Value(f"{value.operand}.to({carrier_name(term.dtype)})", value.dims)
        return value

    def small_power(self, base: Value, exponent: Term) -> Value | None:
        """Constant powers that are products or roots."""
        if not isinstance(exponent, Const) or base.is_literal:
            return None
        if exponent.value in (2, 3, 4):
            named = base if base.text.isidentifier() else self.writer.let("base", base)
            return Value(" * ".join([named.text] * int(exponent.value)), base.dims, is_atom=False)
        root = {0.5: "tl.sqrt({})", -0.5: "tl.rsqrt({})", 1: "{}", -1: "(1.0 / {})"}.get(exponent.value)
        return None if root is None else Value(root.format(base.operand), base.dims)

    def cast(self, value: Value, source: torch.dtype, target: torch.dtype) -> Value:
        """A value as another dtype, in that dtype's carrier."""
        if target == torch.bool:
            return (
                value if source == torch.bool else Value(f"{value.operand} != 0", value.dims, is_atom=False)
            )
        if value.is_literal:
            value = self.writer.let("constant", Value(f"tl.full([], {value.text}, {carrier_name(source)})"))
        if is_half(target):
            if source == target:
                return value
            return Value(f"{value.operand}.to({DTYPE_NAMES[target]}).to(tl.float32)", value.dims)
        if carrier_name(source) == carrier_name(target):
            return value
        return Value(f"{value.operand}.to({carrier_name(target)})", value.dims)

    def bitcast(self, value: Value, source: torch.dtype, target: torch.dtype) -> Value:
        """The same bits as another dtype of the same width."""
        narrowed = f"{value.operand}.to({DTYPE_NAMES[source]})"
        text = f"{narrowed}.to({DTYPE_NAMES[target]}, bitcast=True)"
        return Value(f"{text}.to(tl.float32)" if is_half(target) else text, value.dims)

    def guard(self, term: Guard) -> Value:
        """Both sides are loaded under their own condition, then selected."""
        condition = self.term(term.condition)
        if condition.is_literal:
            return self.term(term.value if condition.text == "True" else term.other)
        condition = self.writer.let("inside", condition)
        with self.guarded(condition):
            value = self.term(term.value)
        if isinstance(term.other, Const):
            other = self.term(term.other)
        else:
            outside = self.writer.let("outside", Value(f"{condition.text} == 0", condition.dims))
            with self.guarded(outside):
                other = self.term(term.other)
        text = f"tl.where({condition.text}, {value.text}, {other.text})"
        return Value(text, condition.dims | value.dims | other.dims)

    # -- stored weights -------------------------------------------------------------------------------------

    def decode(self, term: Decode) -> Value:
        """One element of a stored row, from the bytes of its block."""
        stored, buffer = get_format(term.format), self.kernel.buffer(term.buffer)
        row = self.offset((*term.row, sympy.Integer(0)), buffer.shape)
        column = self.index(term.column)
        block = f"{column.operand} // {stored.block} * {stored.block_bytes}"
        start = self.writer.let("block", Value(f"{row.text} + {block}", row.dims | column.dims))
        place = self.writer.let("place", Value(f"{column.operand} % {stored.block}", column.dims))
        i = sympy.Symbol(f"{term.buffer}_place", integer=True, nonnegative=True)

        def read(offset: Expr, dtype: torch.dtype) -> Term:
            return ByteRead(dtype, term.buffer, start, sympy.sympify(offset))

        value = decode_terms(term.format, read, i)
        self.adopt(value)
        with self.within(self.frame.with_value(str(i), place)):
            return self.writer.let(f"{term.buffer}_value", self.term(value))

    def byte_read(self, term: ByteRead) -> Value:
        """A little-endian number inside a block; wider ones stand at multiples of their size."""
        at = self.index(term.offset)
        text = term.start.text if at.text == "0" else f"{term.start.text} + {at.text}"
        offset = Value(text, term.start.dims | at.dims, is_atom=False)
        pointer = self.pointers[term.buffer]
        if term.dtype != torch.uint8:
            cast = f"({pointer} + {text}).to(tl.pointer_type({DTYPE_NAMES[term.dtype]}))"
            value = self.load_text(cast, Value("0", offset.dims))
        else:
            value = self.load_text(pointer, offset)
        value = Value(f"{value.text}.to(tl.float32)", value.dims) if is_half(term.dtype) else value
        return self.writer.let(f"{term.buffer}_bytes", value)


def all_of(conditions: Sequence[str]) -> str:
    """The conjunction of conditions as text."""
    if len(conditions) == 1:
        return conditions[0]
    return " & ".join(c if c.isidentifier() else f"({c})" for c in conditions)
