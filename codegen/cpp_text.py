"""Pieces of C++ text that all parts of a kernel use: arguments, indentation, index expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchweld.codegen.cpp_names import Namer, PrintError, storage_type, unwrapped
from torchweld.codegen.ir import Kernel
from torchweld.graph.index import FloorDiv, Mod
from torchweld.graph.terms import Expr

INDENT = "    "


@dataclass(frozen=True)
class KernelNames:
    """The identifiers that all parts of a kernel share."""

    namer: Namer
    buffers: Mapping[str, str]
    sizes: Mapping[str, str]

    @staticmethod
    def of(kernel: Kernel) -> KernelNames:
        """Fresh identifiers for the arguments of `kernel`."""
        namer = Namer()
        sizes = {size: namer.fresh(size) for size in kernel.sizes}
        return KernelNames(namer, {b.name: namer.fresh(b.name) for b in kernel.buffers}, sizes)


def indented(lines: Sequence[str]) -> list[str]:
    """Lines one level deeper; preprocessor lines stay at the margin."""
    return [line if line.startswith("#") or not line else INDENT + line for line in lines]


def buffer_lines(kernel: Kernel, names: KernelNames) -> list[str]:
    """Typed pointers and sizes from the untyped arguments of a kernel."""
    lines = []
    for number, buffer in enumerate(kernel.buffers):
        const = "" if buffer.is_written else "const "
        kind = f"{const}{storage_type(buffer.dtype)}*"
        shape = ", ".join(str(extent) for extent in buffer.shape)
        stored_as = f" as {buffer.format}" if buffer.format else ""
        lines.append(
            f"{kind} __restrict {names.buffers[buffer.name]} = ({kind})buffers[{number}];"
            f"  // {buffer.role} [{shape}] {str(buffer.dtype).removeprefix('torch.')}{stored_as}"
        )
    lines += [f"const int64_t {names.sizes[size]} = sizes[{n}];" for n, size in enumerate(kernel.sizes)]
    return lines


def index_text(expr: Expr, symbol: Callable[[str], str]) -> str:
    """An index expression; sums and products in brackets. `symbol` gives the text of a symbol by name."""

    def text(inner: Expr) -> str:
        return index_text(inner, symbol)

    if expr.is_Integer:
        return str(int(expr)) if abs(int(expr)) < 1 << 31 else f"{int(expr)}l"
    if expr.is_Symbol:
        return symbol(str(expr))
    if expr.is_Add:
        return _sum_text(expr, text)
    if expr.is_Mul:
        return "(" + " * ".join(map(text, expr.args)) + ")"
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        return "(" + " * ".join([text(expr.base)] * int(expr.exp)) + ")"
    if isinstance(expr, FloorDiv):
        return f"({text(expr.args[0])} / {text(expr.args[1])})"
    if isinstance(expr, Mod):
        return f"({text(expr.args[0])} % {text(expr.args[1])})"
    raise PrintError(f"no C++ for the index expression {expr}")


def _sum_text(expr: Expr, text: Callable[[Expr], str]) -> str:
    result = ""
    # Positive parts first: the order of sympy is fixed but may start with a minus.
    for part in sorted(expr.args, key=lambda a: bool(a.could_extract_minus_sign())):
        negative = part.could_extract_minus_sign()
        item = text(-part if negative else part)
        result += f" {'-' if negative else '+'} {item}" if result else f"{'-' if negative else ''}{item}"
    return f"({result})"


def offset_text(index: Sequence[Expr], shape: Sequence[Expr], symbol: Callable[[str], str]) -> str:
    """The row-major offset of an element of a contiguous tensor, in Horner's form."""
    text = ""
    for i, extent in zip(index, shape, strict=True):
        text = f"{text} * {index_text(extent, symbol)}" if text else ""
        if i != 0:
            item = index_text(i, symbol)
            text = f"({text} + {item})" if text else item
    return unwrapped(text) or "0"
