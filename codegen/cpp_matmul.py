"""MatmulPart as C++: the A rows of a block of rows once, B in its stored format, the epilogue on a tile of sums.

    for each (batch, block of rows):            shared out among the threads together with the blocks of columns
        row binds and A rows -> scratch         prologue: casts, norms, gathers
        for each block of columns:
            for each piece of the rows:         all rows; packed_bf16.h says how many in bfloat16
                for each contract: sums of the piece (matmul.h)
                for each row: stores over the columns of the block, vectorized; or a search of them (cpp_best.py)

A row's sums are taken in an order that depends on k only (see matmul.h), so rows do not influence each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from torchweld.codegen.cpp_best import BestPrinter
from torchweld.codegen.cpp_matmul_rows import (
    READY,
    Panel,
    PrintedPart,
    Product,
    fill_panel,
    keep_row,
    kept_rows,
    numbered_names,
    rounded_row,
)
from torchweld.codegen.cpp_names import HALVES, PrintError, converted, unwrapped, value_type
from torchweld.codegen.cpp_operand import StoredRow, padded, runs_along, stored_row
from torchweld.codegen.cpp_packed import (
    MOST_PIECE_ROWS,
    Precision,
    allocate_copies,
    copies_replace_rows,
    make_copies,
    narrow_rows,
    product_lines,
    product_text,
    weight_lines,
)
from torchweld.codegen.cpp_terms import Emitter
from torchweld.codegen.cpp_text import INDENT, KernelNames, indented
from torchweld.codegen.ir import Kernel, MatmulPart, RowPart
from torchweld.codegen.packing import GROUP
from torchweld.graph.terms import Axis, Contract, Expr, Ref, walk

_PANEL_BYTES = 384 << 10  # A rows of a block: beside a tile of B they stay in an L2 cache of 1 MiB
_MOST_ROWS = 64
_ROWS_FOR_HALF_BLOCKS = 8
_MANY_COLUMNS = 4096  # from here on the threads have enough units of 64 columns


def print_matmul_part(
    kernel: Kernel, names: KernelNames, part: MatmulPart, precision: Precision = "f32", place: int = 0,
    stored: RowPart | None = None,
) -> PrintedPart:  # fmt: skip
    """The part as C++, in a place where READY is declared; `place`: of a search's lists among the buffers.

    stored: a part whose rows this one computes too (`kept_rows`), and stores for it.
    """
    return _MatmulPrinter(kernel, names, part, precision, place, stored).print()


class _MatmulPrinter:
    def __init__(
        self, kernel: Kernel, names: KernelNames, part: MatmulPart, precision: Precision, place: int,
        stored: RowPart | None,
    ) -> None:  # fmt: skip
        self.stored, self.kept = stored, None if stored is None else kept_rows(kernel, stored, part)
        self.kept_line = ""
        self.kernel, self.names, self.part, self.precision = kernel, names, part, precision
        self.search = BestPrinter(part, place) if part.choices else None
        self.others = names.namer.taken
        self.real = self._real()
        self.kind = value_type(self.real)
        self.emitter = Emitter(kernel, names)
        for axis in (*part.batch, *part.rows, part.n):
            self.emitter.axis(axis)
        self.products = self._products()
        self.block_rows = self._block_rows()
        self.block_columns = self._block_columns()
        self.is_narrow = any(product.panel.copies is not None for product in self.products)
        widest = max((int(p.panel.width) for p in self.products if self.is_narrow), default=1)
        self.most_rows = max(self.block_rows, narrow_rows(widest)) if self.is_narrow else self.block_rows
        self.row_names = {bind.name: names.namer.fresh(f"{bind.name}_of_row") for bind in part.row_binds}
        self.scratch: Expr = sympy.Integer(0)
        self.lines: list[str] = []

    def _real(self) -> torch.dtype:
        wide = any(bind.term.dtype == torch.float64 for bind in self.part.contracts)
        return torch.float64 if wide else torch.float32

    def _products(self) -> list[Product]:
        rows = {
            bind.name: stored_row(self.kernel, bind.term.b, bind.term.k, self.real)
            for bind in self.part.contracts
            if isinstance(bind.term, Contract)
        }
        panels: dict[tuple[int, str], Panel] = {}
        products = []
        for bind in self.part.contracts:
            contract = bind.term
            if not isinstance(contract, Contract) or not contract.dtype.is_floating_point:
                raise PrintError(
                    f"contract {bind.name!r} must be a floating Contract,"
                    f" got {type(contract).__name__} of {contract.dtype}"
                )
            key = (id(contract.a), contract.k.name)
            if key not in panels:
                panels[key] = self._panel(contract, list(rows.values()))
            row = rows[bind.name]
            name = self.names.namer.fresh(f"{bind.name}_sums")
            weights = self.names.namer.fresh(f"{bind.name}_half")
            products.append(Product(bind, contract, panels[key], row, name, weights))
        return products

    def _panel(self, contract: Contract, rows: Sequence[StoredRow | None]) -> Panel:
        self.emitter.axis(contract.k)
        packed = any(row is not None and row.packed for row in rows)
        width = padded(contract.k.extent, self.real, 128 if packed else 64)  # packed weights: in steps of 32
        fresh = self.names.namer.fresh
        offset = any(row is not None and row.packed and row.has_offset for row in rows)
        sums = fresh("a_sums") if offset else None
        copies = make_copies(fresh, self.precision, rows)
        return Panel(contract.a, contract.k, fresh("a_rows"), fresh("a_stride"), width, sums, copies)

    def _block_rows(self) -> int:
        if not all(product.panel.width.is_Integer for product in self.products):
            return 16
        widest = max(int(product.panel.width) for product in self.products)
        fitting = _PANEL_BYTES // max(1, widest * self.real.itemsize)
        return max(4, min(_MOST_ROWS, fitting // 4 * 4))

    def _block_columns(self) -> int:
        wished = max(4, self.part.schedule.block_n // 4 * 4)
        computed = [p for p in self.products if p.stored is None]
        small = all(p.panel.width.is_Integer and p.panel.width <= 512 for p in computed)
        if any(p.stored is not None and p.stored.packed for p in self.products):
            wished = -(-wished // GROUP) * GROUP
        return wished if small else min(wished, 16)

    # -- pieces -----------------------------------------------------------------------------------------------------

    def print(self) -> PrintedPart:
        """The whole part."""
        self._sizes()
        self._room_of_rows()
        prologue, batch = self._prologue(), self.emitter.unflatten("block / row_blocks", self.part.batch)
        written = [line for line in prologue if line.strip() != self.kept_line]  # parts behind keep nothing
        rows = numbered_names([*self.lines, *batch, *written], self.names.namer.taken - self.others)
        self._columns()
        self._room_of_sums()
        body = self._unit(prologue)
        if self.search is not None:
            self.lines += self.search.begin()
        self.lines += [
            "const tw_range share = tw_share(batch * row_blocks * column_blocks, thread, threads);",
            "for (int64_t unit = share.begin; unit < share.end; ++unit) {",
            *indented(body),
            "}",
        ]
        if self.search is not None:
            self.lines += self.search.end(self._scope(()))
        return PrintedPart(self.lines, self.scratch, rows)

    def _sizes(self) -> None:
        emitter, part = self.emitter, self.part
        stored = [product.stored for product in self.products]
        self.lines += [
            f"const int64_t batch = {emitter.extents(part.batch)};",
            f"const int64_t rows = {emitter.extents(part.rows)};",
            *([f"const bool narrow = {copies_replace_rows(stored)};"] if self.is_narrow else []),
            f"const int64_t row_blocks = tw_blocks(rows, {self._rows_per_unit()});",
            "const int64_t block_rows = row_blocks ? tw_blocks(tw_blocks(rows, row_blocks), 4) * 4 : 4;",
        ]

    def _columns(self) -> None:
        self.lines += [
            f"const int64_t columns = {unwrapped(self.emitter.index(self.part.n.extent))};",
            f"const int64_t block_columns = {self._columns_per_unit()};",
            "const int64_t column_blocks = tw_blocks(columns, block_columns);",
        ]

    def _rows_per_unit(self) -> str:
        return f"narrow ? {self.most_rows} : {self.block_rows}" if self.is_narrow else str(self.block_rows)

    def _columns_per_unit(self) -> str:
        """Columns of a block: half as many where a few rows meet a small matrix, which the threads share evenly."""
        if self.block_columns < 64 or any(p.stored is None or not p.stored.packed for p in self.products):
            return str(self.block_columns)
        return f"rows <= {_ROWS_FOR_HALF_BLOCKS} && columns < {_MANY_COLUMNS} ? 32 : {self.block_columns}"

    def _allocate(self, name: str, kind: str, itemsize: int, count: Expr) -> None:
        bytes_ = padded(sympy.sympify(count) * itemsize, torch.uint8)
        self.lines.append(
            f"{kind}* const {name} = ({kind}*)(scratch + {unwrapped(self.emitter.index(self.scratch))});"
        )
        self.scratch = sympy.expand(self.scratch + bytes_)

    def _room_of_rows(self) -> None:
        done: set[str] = set()
        for product in self.products:
            panel = product.panel
            if panel.name not in done:
                done.add(panel.name)
                self.lines.append(
                    f"const int64_t {panel.stride} = {unwrapped(self.emitter.index(panel.width))};"
                )
                self._allocate(panel.name, self.kind, self.real.itemsize, panel.width * self.block_rows)
                if panel.sums is not None:
                    self._allocate(panel.sums, "float", 4, panel.width / 32 * self.block_rows)
                if panel.copies is not None:
                    allocate_copies(
                        self._allocate, panel.copies, panel.width, self.most_rows, self.block_rows
                    )
        for bind in self.part.row_binds:
            kind = value_type(bind.term.dtype)
            self._allocate(self.row_names[bind.name], kind, 8, sympy.Integer(self.most_rows))

    def _rows_of_sums(self) -> int:
        """Rows that products write at most: tiles are 32 rows high."""
        return -(-max(self.block_rows, MOST_PIECE_ROWS) // 32) * 32 if self.is_narrow else self.block_rows

    def _room_of_sums(self) -> None:
        for product in self.products:
            panel = product.panel
            self._allocate(
                product.name,
                self.kind,
                self.real.itemsize,
                sympy.Integer(self._rows_of_sums() * self.block_columns),
            )
            if self.is_narrow:
                room = panel.width // 32 * self.block_columns // GROUP * 1024
                self._allocate(f"{product.weights}_room", "uint8_t", 1, room)
        # One width as a rule; of several (they may hold sizes) the sum is enough for each.
        decoded_rows: dict[Expr, int] = {}
        for product in self.products:
            if product.stored is not None and product.stored.packed:
                continue
            rows = _tile_columns(self.part) if product.stored else self.block_columns
            decoded_rows[product.panel.width] = max(rows, decoded_rows.get(product.panel.width, 0))
        room = sum((width * rows for width, rows in decoded_rows.items()), start=sympy.Integer(0))
        if decoded_rows:
            self._allocate("decoded", self.kind, self.real.itemsize, room)

    def _unit(self, prologue: list[str]) -> list[str]:
        lines = [
            "const int64_t block = unit / column_blocks;",
            "const int64_t first_row = block % row_blocks * block_rows;",
            "const int64_t block_end = tw_least(first_row + block_rows, rows);",
            "const int64_t first_column = unit % column_blocks * block_columns;",
            "const int64_t width = tw_least<int64_t>(block_columns, columns - first_column);",
            *self.emitter.unflatten("block / row_blocks", self.part.batch),
            f"if (block != {READY}) {{",
            f"    {READY} = block;",
            *indented(prologue),
            "}",
        ]
        body: list[str] = []
        for product in self.products:
            body += ["{", *indented(self._product(product)), "}"]
        body += self._epilogue()
        return lines + (self._in_pieces(body) if self.is_narrow else body)

    def _in_pieces(self, body: list[str]) -> list[str]:
        """`body` for pieces of the rows that are small enough for their sums to stay in the L1 cache."""
        weights: list[str] = []
        for product in self.products:
            if product.stored is None or not product.stored.packed:
                continue
            base, room = self._first_group(product.stored), f"{product.weights}_room"
            weights += weight_lines(
                product.stored, base, product.panel.stride, product.weights, room, self.block_columns
            )
        head = "for (int64_t piece = 0; first_row + piece < block_end; piece += piece_rows) {"
        end = "const int64_t piece_end = tw_least(piece + piece_rows, block_end - first_row);"
        return [
            *weights,
            "const int64_t piece_rows = narrow ? tw_bf16_piece : block_rows;",
            "if (narrow) tw_tiles_on();",
            head,
            *indented([end, *body]),
            "}",
            "if (narrow) tw_tiles_off();",
        ]

    def _prologue(self) -> list[str]:
        part = self.part
        emitter = self._scope(part.batch)
        emitter.push(tuple(axis.name for axis in part.rows) + tuple(f"ref:{b.name}" for b in part.row_binds))
        for bind in part.row_binds:
            text = emitter.value(bind.term)
            emitter.line(f"{self.row_names[bind.name]}[r] = {unwrapped(text)};")
            emitter.define_ref(bind.name, f"{self.row_names[bind.name]}[r]", bind.term.dtype)
        done: set[str] = set()
        for product in self.products:
            if product.panel.name not in done:
                done.add(product.panel.name)
                fill_panel(emitter, product.panel, self.real, self.is_narrow)
                if self.stored is not None and self.kept is not None and self.kept.a is product.panel.term:
                    axes = (*part.batch, *part.rows)
                    self.kept_line = keep_row(
                        emitter, product.panel, axes, self.stored.stores[0], self.is_narrow
                    )
        body = emitter.pop()
        head = ["const int64_t m = first_row + r;", *emitter.unflatten("m", part.rows)]
        if self.is_narrow:
            head.append("const int64_t panel_row = narrow ? 0 : r;  // its copy in bfloat16 is what counts")
        loop = ["for (int64_t r = 0; first_row + r < block_end; ++r) {", *indented(head + body), "}"]
        return emitter.pop() + loop

    def _scope(self, batch: Sequence[Axis]) -> Emitter:
        """A new emitter in the block where the batch axes are known."""
        emitter = Emitter(self.kernel, self.names)
        for axis in (*self.part.batch, *self.part.rows, self.part.n, *(p.panel.k for p in self.products)):
            emitter.adopt_axis(axis, self.emitter)
        emitter.push(tuple(axis.name for axis in batch))
        return emitter

    def _product(self, product: Product) -> list[str]:
        panel = product.panel
        if product.stored is not None and product.stored.packed:
            return self._packed_product(product, product.stored)
        emitter = self._scope(self.part.batch)
        n, address = emitter.axis(self.part.n), self.names.namer.fresh(f"{product.bind.name}_b")
        lines = [f"const void* {address}[{self.block_columns}];"]
        if product.stored is not None:
            emitter.push((self.part.n.name,))
            emitter.line(
                f"{address}[j] = (const void*)({product.stored.address(emitter, product.contract.k)});"
            )
            body = [f"const int64_t {n} = first_column + j;", *emitter.pop()]
            format_, extent = product.stored.format, unwrapped(emitter.index(panel.k.extent))
        else:
            self._fill_columns(emitter, product)
            body = [f"{address}[j] = (const void*)(decoded + j * {panel.stride});"]
            format_, extent = ("F64" if self.real == torch.float64 else "F32"), panel.stride
        lines += emitter.pop()
        lines += ["for (int64_t j = 0; j < width; ++j) {", *indented(body), "}"]
        tile = f"{max(1, self.part.schedule.unroll_rows)}, {_tile_columns(self.part)}"
        lines += [
            f"tw_matmul<tw_{format_}, {tile}>({panel.name}, {panel.stride}, block_end - first_row, {address}, width,"
            f" {extent},",
            f"    {product.name}, {self.block_columns}, decoded);",
        ]
        return lines

    def _packed_product(self, product: Product, stored: StoredRow) -> list[str]:
        panel = product.panel
        base = self._first_group(stored)
        sums = panel.sums if stored.has_offset else panel.name  # not read where there is no offset
        a = (panel.name, panel.stride, str(sums))
        return product_lines(stored, base, a, panel.copies, product.name, self.block_columns, product.weights)

    def _first_group(self, stored: StoredRow) -> str:
        return stored.first_group(self._scope(()), self.part.n, "first_column")

    def _fill_columns(self, emitter: Emitter, product: Product) -> None:
        """Write the columns of the block out as rows of numbers along k."""
        k, n, term = product.contract.k, self.part.n, product.contract.b
        kn, nn = emitter.axis(k), emitter.axis(n)
        along_n = runs_along(self.kernel, term, n)
        outer, inner = (k, n) if along_n else (n, k)
        place = f"decoded[({nn} - first_column) * {product.panel.stride} + {kn}]"
        emitter.push((outer.name,))
        emitter.push((inner.name,))
        emitter.line(f"{place} = {unwrapped(converted(emitter.value(term), term.dtype, self.real))};")
        lines = emitter.pop()
        ranges = {
            n.name: ("first_column", "first_column + width"),
            k.name: ("0", unwrapped(emitter.index(k.extent))),
        }
        lines = emitter.pop() + emitter.vector_loop(inner, lines, *ranges[inner.name])
        begin, end = ranges[outer.name]
        name = emitter.axis(outer)
        emitter.nest(f"for (int64_t {name} = {begin}; {name} < {end}; ++{name})", lines)
        if product.panel.width != k.extent:
            pad = f"for (int64_t {kn} = {ranges[k.name][1]}; {kn} < {product.panel.stride}; ++{kn})"
            emitter.line(f"for (int64_t {nn} = first_column; {nn} < first_column + width; ++{nn})")
            emitter.line(f"{INDENT}{pad} {place} = 0;")

    def _epilogue(self) -> list[str]:
        part = self.part
        emitter = self._scope(part.batch)
        read = [store.value for store in part.stores] if self.search is None else [self.search.score]
        refs = {ref.name for value in read for ref in walk(value) if isinstance(ref, Ref)}
        emitter.push(tuple(axis.name for axis in part.rows) + tuple(f"ref:{b.name}" for b in part.row_binds))
        for bind in part.row_binds:
            if bind.name in refs:
                self._reload(emitter, bind.name, f"{self.row_names[bind.name]}[r]", bind.term.dtype)
        emitter.push((part.n.name, *(f"ref:{p.bind.name}" for p in self.products)))
        n = emitter.axis(part.n)
        for product in self.products:
            copies, width = product.panel.copies, self.block_columns
            row = "(r - piece)" if self.is_narrow else "r"
            text = product_text(
                product.stored, copies, product.name, f"{row} * {width} + j", product.weights, width
            )
            if product.contract.dtype in HALVES:
                text = f"tw_round_{HALVES[product.contract.dtype]}({text})"
            self._reload(emitter, product.bind.name, text, product.contract.dtype)
        rounded = self._store(emitter)
        columns = [f"const int64_t {n} = first_column + j;", *emitter.pop()]
        inner = [
            "#pragma GCC ivdep",
            "for (int64_t j = 0; j < width; ++j) {",
            *indented(columns),
            "}",
            *rounded,
        ]
        body = [
            "const int64_t m = first_row + r;",
            *emitter.unflatten("m", part.rows),
            *emitter.pop(),
            *(inner if self.search is None else self.search.around(inner, self.block_columns)),
        ]
        first = "r = piece; r < piece_end" if self.is_narrow else "r = 0; first_row + r < block_end"
        return [*emitter.pop(), f"for (int64_t {first}; ++r) {{", *indented(body), "}"]

    def _store(self, emitter: Emitter) -> list[str]:
        """What is done to the products of a column; statements behind the loop over the columns."""
        if self.search is not None:
            self.search.keep(emitter)
            return []
        rounded: list[str] = []
        for store in self.part.stores:
            place = rounded_row(emitter, store, self.part.n) if self.is_narrow and not rounded else None
            if place is None:
                emitter.store(store)
                continue
            # The sums of the row, which are read already, hold its numbers until they are rounded together.
            row = f"{self.products[0].name} + (r - piece) * {self.block_columns}"
            value = unwrapped(converted(emitter.value(store.value), store.value.dtype, torch.float32))
            emitter.line(f"({row})[j] = {value};")
            rounded = [f"tw_store_bf16({row}, width, {place});"]
        return rounded

    def _reload(self, emitter: Emitter, ref: str, text: str, dtype: torch.dtype) -> None:
        name = self.names.namer.fresh(ref)
        emitter.line(f"const {value_type(dtype)} {name} = {text};")
        emitter.define_ref(ref, name, dtype)


def _tile_columns(part: MatmulPart) -> int:
    return max(4, part.schedule.unroll_n // 4 * 4)  # the lanes of four sums are added together
