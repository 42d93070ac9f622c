"""Choices: the greatest entries of every row of a matmul's result, found as it is made; the result is never stored.

formula:  score[m, n] = g(m, n, acc);   out[m, r] = h(entry r of score[m, :] in descending order, its place n)
shapes:   those of a matmul; r is one axis of the result, of a known extent k, or absent (argmax, max: k is 1)
order:    of equal entries the lower place comes first, NaN comes before all numbers, as in torch on the CPU
why:      an output head of 262,144 columns writes and reads 1 MB per row, of which greedy decoding wants one number

Only max and argmax can be joined from tiles in any order without a change of a bit; sums are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torchweld.codegen.families.common import Dependence, reductions, with_references
from torchweld.codegen.families.matmul import build_matmul_part
from torchweld.codegen.ir import Bind, MatmulPart, Store
from torchweld.graph.meaning import Unsupported
from torchweld.graph.terms import Axis, Contract, Fold, Ref, Term, walk

MOST_ENTRIES: Final = 256
"""Entries of a row at most: each is inserted into a sorted list."""


def searches_products(term: Term) -> bool:
    """Whether `term` folds the result of a matmul."""
    return any(_has_contract(node) for node in walk(term) if isinstance(node, Fold))


def build_choice_part(
    axes: tuple[Axis, ...], stores: Sequence[Store], dependence: Dependence, name: str, unit: Axis
) -> MatmulPart:
    """A part that finds what `stores`, all over `axes`, say of the greatest entries of one matmul's rows.

    Unsupported, with the reason, for other folds, for several searches, and where rows and columns are not apart.
    """
    folds = [
        fold
        for fold in reductions([store.value for store in stores], Fold)
        if isinstance(fold, Fold) and _has_contract(fold)
    ]
    first = folds[0]
    _check_folds(folds)
    ranks = _rank_axes(first, axes)
    n, rows = first.axes[0], tuple(axis for axis in axes if axis not in ranks)
    if dependence.of(first.body) & {axis.symbol for axis in ranks}:
        raise Unsupported("a search whose entries depend on their rank")
    part = build_matmul_part((*rows, n), [Store("", (), first.body)], dependence, name, unit)
    (score,) = (store.value for store in part.stores)
    refs = {id(fold): Ref(fold.dtype, f"{name}_best{number}") for number, fold in enumerate(folds)}
    chosen = tuple(
        Bind(refs[id(fold)].name, Fold(fold.dtype, fold.monoid, (n,), score, fold.rank)) for fold in folds
    )
    found = tuple(Store(s.buffer, s.index, with_references(s.value, refs)) for s in stores)
    if any(isinstance(node, (Contract, Fold)) for store in found for node in walk(store.value)):
        raise Unsupported("a search of a matmul's rows beside another reduction or matmul")
    return MatmulPart(
        part.batch, part.rows, n, part.row_binds, part.contracts, found, choices=chosen, ranks=ranks
    )


def _has_contract(fold: Fold) -> bool:
    return any(isinstance(node, Contract) for node in walk(fold.body))


def _check_folds(folds: Sequence[Fold]) -> None:
    """All are max or argmax along one axis of one thing."""
    first = folds[0]
    for fold in folds:
        if fold.monoid.kind not in ("max", "argmax"):
            raise Unsupported("a reduction or a selection over the result of a matmul or an attention")
        if len(fold.axes) != 1:
            raise Unsupported("a search over several axes of a matmul's result")
        if fold.body is not first.body or fold.axes != first.axes or fold.rank != first.rank:
            raise Unsupported("two searches of matmuls in one kernel")


def _rank_axes(fold: Fold, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axis that the rank is, if there is one."""
    if fold.rank is None:
        return ()
    found = tuple(axis for axis in axes if axis.symbol == fold.rank)
    columns = fold.axes[0].extent
    if not found or not found[0].extent.is_Integer:
        raise Unsupported(
            f"entry number {fold.rank} of a matmul's rows; expected a whole axis of known extent"
        )
    count = int(found[0].extent)
    if count > MOST_ENTRIES or (columns.is_Integer and count > int(columns)):
        raise Unsupported(f"the {count} greatest entries of a matmul's rows; at most {MOST_ENTRIES}")
    return found
