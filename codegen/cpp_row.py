"""RowPart as C++: a loop over grid points, folds in lanes, a vectorizable loop over the innermost axis.

Without folds all axes but the last are one loop that the threads share, and the last one is cut into blocks, so that
a single long row (logits of one token) keeps every thread busy too. With folds the threads share the grid points.
"""

from __future__ import annotations

from torchweld.codegen.cpp_names import unwrapped, value_type
from torchweld.codegen.cpp_segments import piece_length
from torchweld.codegen.cpp_terms import Emitter
from torchweld.codegen.cpp_text import KernelNames, indented
from torchweld.codegen.ir import Kernel, RowPart, part_terms
from torchweld.graph.terms import Axis, Contract, Expr, Fold, walk

_COLUMNS = 2048


def print_row_part(kernel: Kernel, names: KernelNames, part: RowPart) -> tuple[list[str], Expr | int]:
    """The statements of the part and the bytes of scratch memory per thread that they need (none)."""
    emitter = Emitter(kernel, names)
    for axis in part.grid + part.inner:
        emitter.axis(axis)
    folds = any(isinstance(t, Fold | Contract) for bind in part.binds for t in walk(bind.term))
    lines = _rows(emitter, part) if folds else _pointwise(emitter, part)
    return lines, 0


def _rows(emitter: Emitter, part: RowPart) -> list[str]:
    """One grid point at a time: binds, then the stores over `inner`."""
    emitter.push(_symbols(part.grid, part))
    _binds(emitter, part)
    if part.inner:
        _inner_stores(emitter, part, part.inner)
    else:
        for store in part.stores:
            emitter.store(store)
    body = emitter.unflatten("point", part.grid) + emitter.pop()
    if part.inner and not all(axis.extent.is_Integer and axis.extent > 0 for axis in part.inner):
        # Nothing may be read for rows that store nothing.
        body = [f"if ({emitter.extents(part.inner)} == 0) break;", *body]
    return _shared_loop(emitter.extents(part.grid), body)


def _pointwise(emitter: Emitter, part: RowPart) -> list[str]:
    axes = part.grid + part.inner
    if not axes:
        return _rows(emitter, part)
    *outer, last = axes
    name = emitter.axis(last)
    emitter.push(_symbols(outer, part))
    emitter.push((last.name, *_refs(part)))
    _binds(emitter, part)
    for store in part.stores:
        emitter.store(store)
    inner = emitter.pop()
    extent = emitter.index(last.extent)
    if last.extent.is_Integer and last.extent <= _COLUMNS:
        loop = emitter.vector_loop(last, inner, piece=piece_length(part_terms(part), last))
        body = emitter.unflatten("point", outer) + emitter.pop() + loop
        return _shared_loop(emitter.extents(outer), body)
    first = emitter.names.namer.fresh(f"{name}_first")
    loop = emitter.vector_loop(last, inner, first, f"tw_least<int64_t>({first} + {_COLUMNS}, {extent})")
    head = [
        f"const int64_t blocks = tw_blocks({extent}, {_COLUMNS});",
        f"const int64_t point = unit / blocks, {first} = unit % blocks * {_COLUMNS};",
    ]
    body = head + emitter.unflatten("point", outer) + emitter.pop() + loop
    return _shared_loop(f"{emitter.extents(outer)} * tw_blocks({extent}, {_COLUMNS})", body, "unit")


def _binds(emitter: Emitter, part: RowPart) -> None:
    for bind in part.binds:
        text, name = emitter.value(bind.term), emitter.names.namer.fresh(bind.name)
        emitter.line(f"const {value_type(bind.term.dtype)} {name} = {unwrapped(text)};")
        emitter.define_ref(bind.name, name, bind.term.dtype)


def _inner_stores(emitter: Emitter, part: RowPart, inner: tuple[Axis, ...]) -> None:
    for axis in inner:
        emitter.push((axis.name,))
    for store in part.stores:
        emitter.store(store)
    lines = emitter.pop()
    for number, axis in enumerate(reversed(inner)):
        if number == 0:
            loop = emitter.vector_loop(axis, lines, piece=piece_length(part_terms(part), axis))
        else:
            loop = _plain_loop(emitter, axis, lines)
        if number < len(inner) - 1:
            lines = emitter.pop() + loop
        else:
            for text in loop:
                emitter.line(text)


def _plain_loop(emitter: Emitter, axis: Axis, lines: list[str]) -> list[str]:
    name = emitter.axis(axis)
    head = f"for (int64_t {name} = 0; {name} < {unwrapped(emitter.index(axis.extent))}; ++{name}) {{"
    return [head, *indented(lines), "}"]


def _symbols(axes: tuple[Axis, ...] | list[Axis], part: RowPart) -> tuple[str, ...]:
    return (*(axis.name for axis in axes), *_refs(part))


def _refs(part: RowPart) -> tuple[str, ...]:
    return tuple(f"ref:{bind.name}" for bind in part.binds)


def _shared_loop(points: str, body: list[str], counter: str = "point") -> list[str]:
    return [
        f"const tw_range share = tw_share({points}, thread, threads);",
        f"for (int64_t {counter} = share.begin; {counter} < share.end; ++{counter}) {{",
        *indented(body),
        "}",
    ]
