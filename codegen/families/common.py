"""What every family does with terms: what a term depends on, and how Folds become values bound before the stores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import sympy

from torchweld.codegen.ir import Bind
from torchweld.graph.meaning import Unsupported
from torchweld.graph.meaning.context import Meaning
from torchweld.graph.terms import Attend, Axis, Contract, Expr, Fold, Ref, Term, free_symbols, transform, walk

Symbols = frozenset[sympy.Symbol]


class Dependence:
    """The loop variables that terms and index expressions depend on, seen through data-dependent indices."""

    def __init__(self, meaning: Meaning) -> None:
        self.meaning = meaning
        self._cache: dict[int, Symbols] = {}

    def of(self, term: Term) -> Symbols:
        """Loop variables of a term; those that it sums over itself are not among them."""
        return self.close(free_symbols(term, self._cache))

    def close(self, symbols: Iterable[sympy.Symbol]) -> Symbols:
        """Data-dependent index symbols replaced by what their terms depend on; size symbols dropped."""
        indirect = {entry.symbol: entry.term for entry in self.meaning.indirects}
        result: set[sympy.Symbol] = set()
        for symbol in symbols:
            term = indirect.get(symbol.name)
            if term is not None:
                result |= self.of(term)
            elif symbol in self.meaning.ranges.extents:
                result.add(symbol)
        return frozenset(result)

    def indirect_reductions(self) -> bool:
        """Whether a data-dependent index is itself the result of a reduction or a matmul."""
        return any(
            isinstance(node, (Fold, Contract, Attend))
            for e in self.meaning.indirects
            for node in walk(e.term)
        )


def reductions(roots: Iterable[Term], kind: type[Term]) -> list[Term]:
    """Distinct nodes of `kind` below `roots`, operands before users."""
    found: dict[int, Term] = {}
    for root in roots:
        for term in walk(root):
            if isinstance(term, kind):
                found.setdefault(id(term), term)
    return list(found.values())


def bind_reductions(
    found: Sequence[Term], names: Mapping[int, str]
) -> tuple[tuple[Bind, ...], dict[int, Ref]]:
    """Binds for reductions (operands first), each using the earlier ones by name; and the references to use."""
    refs: dict[int, Ref] = {}
    binds: list[Bind] = []
    for term in found:
        inner = transform(term, lambda node, top=term: None if node is top else refs.get(id(node)))  # type: ignore[misc]
        refs[id(term)] = Ref(term.dtype, names[id(term)])
        binds.append(Bind(names[id(term)], inner))
    return tuple(binds), refs


def with_references(term: Term, refs: Mapping[int, Ref]) -> Term:
    """`term` with bound reductions replaced by references."""
    return transform(term, lambda node: refs.get(id(node)))


def refuse_nested(found: Sequence[Term], dependence: Dependence, axes: Iterable[Axis]) -> None:
    """Reductions must depend on the part's own axes only, never on an axis that another reduction sums over."""
    own = {axis.symbol for axis in axes}
    for term in found:
        foreign = dependence.of(term) - own
        if foreign:
            raise Unsupported(
                f"a reduction inside another reduction's loop ({', '.join(map(str, sorted(foreign, key=str)))})"
            )


def product(extents: Iterable[Expr]) -> Expr:
    """The product of extents."""
    result: Expr = sympy.Integer(1)
    for extent in extents:
        result = result * extent
    return result
