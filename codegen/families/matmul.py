"""Matmul kernels: linear layers and batched matmuls, with work on the operands before and on the result after.

formula:  acc_i[m, n] = sum_k A_i(m, k) * B_i(n, k);   out[m, n] = g(m, n, acc)
shapes:   batch axes are those of B that are not n or k; rows are the other axes of the result; n is its last axis
prologue: pointwise on A, statistics of its rows if they are one tensor (a norm before the linear); dequantize on B
epilogue: bias, activation, gate, residual; several accumulators in one tile (gate and up, a @ b + c @ d)
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from torchweld.codegen.families.common import (
    Dependence,
    bind_reductions,
    reductions,
    refuse_nested,
    with_references,
)
from torchweld.codegen.ir import Bind, MatmulPart, Store
from torchweld.graph.meaning import Unsupported
from torchweld.graph.terms import Axis, Contract, Decode, Fold, Load, Ref, Term, walk


def build_matmul_part(
    axes: tuple[Axis, ...], stores: Sequence[Store], dependence: Dependence, name: str, unit: Axis
) -> MatmulPart:
    """A part around the contracts of `stores`, all over `axes` (the anchor's); `unit` is n for a result without axes.

    Unsupported, with the reason, where operands cannot be split into rows and columns.
    """
    contracts = [
        term for term in reductions([s.value for s in stores], Contract) if isinstance(term, Contract)
    ]
    for contract in contracts:
        if any(isinstance(node, Contract) and node is not contract for node in walk(contract)):
            raise Unsupported("a matmul whose operand is a matmul")
    n = axes[-1] if axes else unit
    oriented = [_orient(contract, n, dependence) for contract in contracts]
    batch = _batch_axes(axes, n, oriented, dependence)
    rows = tuple(axis for axis in axes if axis not in batch and axis is not n)
    _check_operands(oriented, batch, rows, n, dependence)
    _refuse_twice(contracts)
    folds = _row_folds(stores, dependence, batch + rows, contracts)
    if folds:
        _refuse_wide_rows(oriented, rows, dependence)
    row_binds, refs = bind_reductions(folds, {id(fold): f"{name}_row{i}" for i, fold in enumerate(folds)})
    binds = []
    for number, (old, new) in enumerate(zip(contracts, oriented, strict=True)):
        bound = Contract(new.dtype, new.k, with_references(new.a, refs), with_references(new.b, refs))
        binds.append(Bind(f"{name}_acc{number}", bound))
        refs[id(old)] = Ref(old.dtype, f"{name}_acc{number}")
    new_stores = tuple(Store(s.buffer, s.index, with_references(s.value, refs)) for s in stores)
    return MatmulPart(batch, rows, n, row_binds, tuple(binds), new_stores)


def _refuse_twice(contracts: Sequence[Contract]) -> None:
    """One weight against one left operand is one matmul; a second accumulator of it would do the whole work again."""
    seen: set[tuple[int, frozenset[str]]] = set()
    for contract in contracts:
        weights = frozenset(node.buffer for node in walk(contract.b) if isinstance(node, (Load, Decode)))
        key = (id(contract.a), weights)
        if key in seen:
            raise Unsupported("the result of a matmul is read at two places, so it would be computed twice")
        seen.add(key)


def _orient(contract: Contract, n: Axis, dependence: Dependence) -> Contract:
    """The operand that depends on the result's last axis is B; a vector times a matrix may come the other way round."""
    in_a, in_b = n.symbol in dependence.of(contract.a), n.symbol in dependence.of(contract.b)
    if in_a and in_b:
        raise Unsupported("a matmul whose two operands both depend on the result's last axis")
    return Contract(contract.dtype, contract.k, contract.b, contract.a) if in_a else contract


def _batch_axes(
    axes: tuple[Axis, ...], n: Axis, contracts: Sequence[Contract], dependence: Dependence
) -> tuple[Axis, ...]:
    needed: frozenset[sympy.Symbol] = frozenset().union(
        *(dependence.of(contract.b) for contract in contracts)
    )
    return tuple(axis for axis in axes if axis is not n and axis.symbol in needed)


def _check_operands(
    contracts: Sequence[Contract],
    batch: Sequence[Axis],
    rows: Sequence[Axis],
    n: Axis,
    dependence: Dependence,
) -> None:
    outer = {axis.symbol for axis in (*batch, *rows)}
    columns = {axis.symbol for axis in (*batch, n)}
    for contract in contracts:
        k = contract.k.symbol
        if dependence.of(contract.a) - outer - {k}:
            raise Unsupported("a matmul operand that depends on more than its rows")
        if dependence.of(contract.b) - columns - {k}:
            raise Unsupported("a matmul operand that depends on more than its columns")
        if any(isinstance(node, Fold) for node in walk(contract.b)):
            raise Unsupported("a reduction inside the weight operand of a matmul")


def _refuse_wide_rows(contracts: Sequence[Contract], rows: Sequence[Axis], dependence: Dependence) -> None:
    """Every tile of columns prepares its rows again: cheap for the norm of one tensor, which stays in cache.

    Rows that are made of several tensors and a reduction (norm, residual, norm) are better made once; on a GPU such a
    kernel holds so much that it spills (measured on Gemma 3 for sm_100 and gfx942).
    """
    own = {axis.symbol for axis in rows}
    for contract in contracts:
        loads = [node for node in walk(contract.a) if isinstance(node, (Load, Decode))]
        if len({load.buffer for load in loads if dependence.of(load) & own}) > 1:
            raise Unsupported(
                "statistics of rows that are made of several tensors, again for every tile of columns"
            )


def _row_folds(
    stores: Sequence[Store], dependence: Dependence, rows: tuple[Axis, ...], contracts: Sequence[Contract]
) -> list[Term]:
    folds = reductions([store.value for store in stores], Fold)
    for fold in folds:
        if any(isinstance(node, Contract) for node in walk(fold)):
            raise Unsupported("a reduction over the result of a matmul, which stands in other tiles")
    refuse_nested(folds, dependence, rows)
    return folds
