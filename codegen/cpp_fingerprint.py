"""What decides the C++ of a kernel, as text: equal for kernels that differ in names and source lines only.

The layers of a model give the same few kernels with other weights. Comparing this text is far cheaper than printing.
Terms that say the same get the same number here, and `merge_equal_terms` makes them one node: what two graph nodes
compute alike is computed once, and contracts with equal A operands share their rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torchweld.codegen.ir import AttentionPart, Bind, Kernel, MatmulPart, Part, RowPart, part_binds
from torchweld.graph.terms import (
    Attend,
    Axis,
    Const,
    Contract,
    Decode,
    Expr,
    Fold,
    IndexValue,
    Load,
    Op,
    Ref,
    Term,
    children,
    rebuild,
    walk,
)


def fingerprint(kernel: Kernel, exprs: dict[Expr, str]) -> str:
    """The text of `kernel` with numbered buffers; `exprs` remembers the texts of index expressions between calls."""
    return "\n".join(_Writer(kernel, exprs).write())


def merge_equal_terms(kernel: Kernel) -> Kernel:
    """`kernel` with structurally equal terms as one node each."""
    return _Writer(kernel, {}).merge()


class _Writer:
    def __init__(self, kernel: Kernel, exprs: dict[Expr, str]) -> None:
        self.kernel, self.exprs = kernel, exprs
        self.buffers = {buffer.name: f"b{n}" for n, buffer in enumerate(kernel.buffers)}
        self.terms: dict[int, str] = {}
        self.numbers: dict[str, str] = {}

    def write(self) -> Iterator[str]:
        """Buffers, indirects and parts; a shared term is written once and then referred to by number."""
        kernel = self.kernel
        yield f"{kernel.sizes} {kernel.ops}"
        for b in kernel.buffers:
            yield f"{self.buffers[b.name]} {b.dtype} {self.all(b.shape)} {b.role} {b.format}"
        for i in kernel.indirects:
            yield from self.new_terms(i.term)
            yield f"indirect {i.symbol} {self.terms[id(i.term)]} {self.expr(i.extent)}"
        for part in kernel.parts:
            yield self.head(part)
            for bind in part_binds(part):
                yield from self.new_terms(bind.term)
                yield f"bind {bind.name} {self.terms[id(bind.term)]}"
            for store in part.stores:
                yield from self.new_terms(store.value)
                yield f"store {self.buffers[store.buffer]} {self.all(store.index)} {self.terms[id(store.value)]}"

    def head(self, part: Part) -> str:
        """The axes and the schedule of a part."""
        match part:
            case RowPart():
                axes = f"rows {self.axes(part.grid)} {self.axes(part.inner)}"
            case MatmulPart():
                binds = [bind.name for bind in part.row_binds]
                axes = f"matmul {self.axes(part.batch)} {self.axes(part.rows)} {self.axes((part.n,))} {binds}"
                if part.choices:
                    axes += f" chosen {[bind.name for bind in part.choices]} {self.axes(part.ranks)}"
            case AttentionPart():
                axes = f"attention {self.axes(part.batch)} {self.axes((part.t, part.feature))}"
        return f"{axes} {part.schedule}"

    def new_terms(self, root: Term) -> Iterator[str]:
        """A line for every node below `root` that has none yet."""
        for term in walk(root):
            if id(term) not in self.terms:
                operands = " ".join(self.terms[id(child)] for child in children(term))
                text = f"{type(term).__name__} {term.dtype} {self.own(term)} {operands}"
                if text not in self.numbers:
                    self.numbers[text] = f"t{len(self.numbers)}"
                    yield f"{self.numbers[text]} {text}"
                self.terms[id(term)] = self.numbers[text]

    def merge(self) -> Kernel:
        """The kernel with one node for all terms of the same number."""
        for _ in self.write():
            pass
        done: dict[str, Term] = {}

        def one(root: Term) -> Term:
            for term in walk(root):
                number = self.terms[id(term)]
                if number not in done:
                    done[number] = rebuild(term, [done[self.terms[id(child)]] for child in children(term)])
            return done[self.terms[id(root)]]

        def binds(old: tuple[Bind, ...]) -> tuple[Bind, ...]:
            return tuple(Bind(bind.name, one(bind.term)) for bind in old)

        def merged(part: Part) -> Part:
            stores = tuple(replace(store, value=one(store.value)) for store in part.stores)
            match part:
                case RowPart():
                    return replace(part, binds=binds(part.binds), stores=stores)
                case MatmulPart():
                    contracts, choices = binds(part.contracts), binds(part.choices)
                    row_binds = binds(part.row_binds)
                    return replace(
                        part, row_binds=row_binds, contracts=contracts, choices=choices, stores=stores
                    )
                case AttentionPart():
                    return replace(part, attend=binds((part.attend,))[0], stores=stores)

        indirects = tuple(replace(indirect, term=one(indirect.term)) for indirect in self.kernel.indirects)
        return replace(self.kernel, parts=tuple(map(merged, self.kernel.parts)), indirects=indirects)

    def own(self, term: Term) -> str:
        """What a node says besides its operands."""
        match term:
            case Const():
                return repr(term.value)
            case IndexValue():
                return self.expr(term.expr)
            case Load():
                return f"{self.buffers[term.buffer]} {self.all(term.index)}"
            case Decode():
                return f"{term.format} {self.buffers[term.buffer]} {self.all((*term.row, term.column))}"
            case Op() | Ref():
                return term.name
            case Fold():
                rank = "" if term.rank is None else f" rank {self.expr(term.rank)}"
                return f"{term.monoid.kind} {self.axes(term.axes)}{rank}"
            case Contract():
                return self.axes((term.k,))
            case Attend():
                given = (term.mask is None, term.past is None, term.path is None, term.sinks is None)
                numbers = (
                    f"{term.mask_kind} {term.window} {term.scale!r} {term.soft_cap!r} {given} {term.share}"
                )
                axes = (term.s, term.d) if term.steps is None else (term.s, term.d, term.steps)
                return f"{self.axes(axes)} {numbers} {self.all((term.t, term.t_extent))}"
        return ""

    def axes(self, axes: tuple[Axis, ...]) -> str:
        """Names and extents."""
        return ";".join(f"{axis.name}<{self.expr(axis.extent)}" for axis in axes)

    def all(self, exprs: tuple[Expr, ...]) -> str:
        """Several index expressions."""
        return "[" + ",".join(map(self.expr, exprs)) + "]"

    def expr(self, expr: Expr) -> str:
        """One index expression; sympy prints slowly, so its text is kept."""
        if expr not in self.exprs:
            self.exprs[expr] = str(expr)
        return self.exprs[expr]
