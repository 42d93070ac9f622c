"""The C++ printer: kernels of the IR as readable, header-free C++ for the CPU.

`print_kernel` gives one function; `print_unit` one translation unit with every different function once, ready for
`toolchain.compile_shared`. Functions do their share of the work of one of `threads` threads and need no other.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import sympy

from torchweld.codegen.cpp_attention import print_attention_part
from torchweld.codegen.cpp_attention_room import SharedRoom
from torchweld.codegen.cpp_best import ListRoom
from torchweld.codegen.cpp_fingerprint import fingerprint, merge_equal_terms
from torchweld.codegen.cpp_matmul import print_matmul_part
from torchweld.codegen.cpp_matmul_rows import READY, PrintedPart, kept_rows
from torchweld.codegen.cpp_names import PrintError
from torchweld.codegen.cpp_packed import Precision
from torchweld.codegen.cpp_row import print_row_part
from torchweld.codegen.cpp_split import split_functions
from torchweld.codegen.cpp_text import KernelNames, buffer_lines, indented
from torchweld.codegen.ir import AttentionPart, Kernel, MatmulPart, Part, RowPart
from torchweld.graph.terms import Expr

FLAGS: Final = (
    "-fno-math-errno",  # sqrt and floor as instructions
    "-fno-trapping-math",  # selects instead of branches around comparisons of floats
    "-ffp-contract=off",  # the same operations in every copy of a loop: fma only where it is spelled out
    "-fwrapv",
    "-fno-exceptions",
    "-fno-rtti",
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
    "-Wl,--no-as-needed",
    "-lm",
)

SIGNATURE: Final = (
    "void* const* buffers, const int64_t* sizes, int64_t thread, int64_t threads, char* scratch, "
    "int32_t* error"
)


@dataclass(frozen=True)
class PrintedKernel:
    """A kernel's C++ function; `scratch` are the bytes per thread that it works in, of the kernel's sizes.

    shared: pieces of memory that its threads share, handed in behind the kernel's own buffers.
    """

    name: str
    text: str
    scratch: tuple[Expr, ...]
    shared: tuple[SharedRoom | ListRoom, ...] = ()


@dataclass(frozen=True)
class PrintedUnit:
    """One translation unit: its text, and for every kernel given the function that runs it."""

    source: str
    functions: tuple[PrintedKernel, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        """The names of the different functions, in the order of the text."""
        return tuple(dict.fromkeys(function.name for function in self.functions))

    def parts(self, most: int) -> tuple[str, ...]:
        """The same functions as at most `most` units for compilers side by side; one where more gain nothing."""
        groups = split_functions(list(dict.fromkeys(function.text for function in self.functions)), most)
        return tuple("\n".join([prelude(), *texts]) for texts in groups)


def print_kernel(kernel: Kernel, taken: Collection[str] = (), precision: Precision = "f32") -> PrintedKernel:
    """`kernel` as one C++ function called as the kernel, with a number behind it where that name is `taken`.

    Raises PrintError for what has no C++.
    """
    kernel = merge_equal_terms(kernel)
    names = KernelNames.of(kernel)
    name = names.namer.fresh(kernel.name)
    while name in taken:
        name = names.namer.fresh(kernel.name)
    body = buffer_lines(kernel, names)
    if any(isinstance(part, MatmulPart) for part in kernel.parts):
        body.append(f"int64_t {READY} = -1;  // the block of rows that the scratch memory holds")
    rows = ""
    scratch: list[Expr] = []
    shared: list[SharedRoom | ListRoom] = []
    stored: RowPart | None = None
    for number, part in enumerate(kernel.parts):
        if _is_stored_by_next(kernel, number):
            assert isinstance(part, RowPart)
            stored, rows = part, ""
            title = " ".join(_stores(part).split())
            body += ["", f"// RowPart: {title}: stored by the part behind it"]
            continue
        try:
            printed = _print_part(kernel, names, part, shared, precision, stored)
        except PrintError as error:
            raise PrintError(f"kernel {kernel.name}: {error}") from error
        stored = None
        scratch.append(sympy.sympify(printed.scratch))
        title = " ".join(f"{type(part).__name__}: {_stores(part)}".split())
        lines = [f"{READY} = -1;"] if printed.rows and printed.rows != rows else []
        rows = printed.rows
        body += ["", f"{{  // {title}", *indented([*lines, *printed.lines]), "}"]
    head = [f"// {kernel.name}: {', '.join(kernel.ops)}"] if kernel.ops else [f"// {kernel.name}"]
    text = "\n".join([*head, f'extern "C" void {name}({SIGNATURE}) {{', *indented(body), "}", ""])
    return PrintedKernel(name, text, tuple(scratch), tuple(shared))


def print_unit(kernels: Sequence[Kernel], precision: Precision = "f32") -> PrintedUnit:
    """All kernels in one translation unit; those that differ in the names of their arguments only share a function."""
    printed: dict[str, PrintedKernel] = {}
    functions: list[PrintedKernel] = []
    exprs: dict[Expr, str] = {}
    for kernel in kernels:
        key = fingerprint(kernel, exprs)
        if key not in printed:
            printed[key] = print_kernel(kernel, {function.name for function in functions}, precision)
        functions.append(printed[key])
    body = [function.text for function in printed.values()]
    return PrintedUnit("\n".join([prelude(), *body]), tuple(functions))


@cache
def prelude() -> str:
    """The C++ that every unit starts with: scalars, folds, vectors, stored formats, inner products, attention."""
    folder = Path(__file__).parent / "runtime"
    packed = ("packed.h", "packed_matmul.h", "packed_bf16.h", "packed_int8.h", "packed_whole.h")
    attention = ("attention_scores.h", "attention.h", "attention_bf16.h")
    names = ("scalar.h", "fold.h", "best.h", "vectors.h", "formats.h", "matmul.h", *packed, *attention)
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _is_stored_by_next(kernel: Kernel, number: int) -> bool:
    """Whether the rows that a part stores are those of the product behind it, which then stores them."""
    part, *behind = kernel.parts[number:]
    if not isinstance(part, RowPart) or not behind or not isinstance(behind[0], MatmulPart):
        return False
    return kept_rows(kernel, part, behind[0]) is not None


def _print_part(
    kernel: Kernel,
    names: KernelNames,
    part: Part,
    shared: list[SharedRoom | ListRoom],
    precision: Precision,
    stored: RowPart | None,
) -> PrintedPart:
    place = len(kernel.buffers) + len(shared)
    if isinstance(part, MatmulPart):
        if part.choices:
            shared.append(ListRoom.of(part))
        return print_matmul_part(kernel, names, part, precision, place, stored)
    if isinstance(part, AttentionPart):
        lines, scratch, room = print_attention_part(kernel, names, part, place, precision)
        shared.append(room)
        return PrintedPart(lines, scratch)
    return PrintedPart(*print_row_part(kernel, names, part))


def _stores(part: Part) -> str:
    return ", ".join(f"{s.buffer}[{', '.join(map(str, s.index))}]" for s in part.stores)
