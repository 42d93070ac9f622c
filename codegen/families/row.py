"""Row kernels: pointwise work, gathers, concatenations, reductions, norms and softmax.

formula:  for every point of the grid:  r_i = fold_k f_i(point, k, r_<i)
          for inner:  out[point, inner] = g(point, inner, r)
shapes:   the grid holds every axis that a reduction depends on; without reductions, all axes but the last
units:    one float32 element per lane; 16-bit inputs are widened at the load
"""

from __future__ import annotations

from collections.abc import Sequence

from torchweld.codegen.families.common import (
    Dependence,
    bind_reductions,
    reductions,
    refuse_nested,
    with_references,
)
from torchweld.codegen.ir import RowPart, Store
from torchweld.graph.terms import Axis, Fold, Term


def build_row_part(
    axes: tuple[Axis, ...], stores: Sequence[Store], dependence: Dependence, name: str
) -> RowPart:
    """A part that runs `stores` (all over `axes`); Unsupported where reductions are nested."""
    roots: list[Term] = [store.value for store in stores]
    folds = reductions(roots, Fold)
    refuse_nested(folds, dependence, axes)
    binds, refs = bind_reductions(folds, {id(fold): f"{name}_{number}" for number, fold in enumerate(folds)})
    needed = frozenset().union(*(dependence.of(fold) for fold in folds)) if folds else None
    if needed is None:
        grid, inner = axes[:-1], axes[-1:]
    else:
        grid = tuple(axis for axis in axes if axis.symbol in needed)
        inner = tuple(axis for axis in axes if axis.symbol not in needed)
    new_stores = tuple(Store(s.buffer, s.index, with_references(s.value, refs)) for s in stores)
    return RowPart(grid, inner, binds, new_stores)
