"""Kernel IR to Triton: one readable @triton.jit function per kernel, a launcher, and nothing hidden.

A kernel with several parts gives every part a function of its own; the kernel looks at its program number and runs
the part that owns it.  Size arguments are int64, so offsets do not overflow however large a batch is; what is known
to be small stays 32 bits wide.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from torchweld.codegen.ir import (
    AttentionPart,
    Kernel,
    MatmulPart,
    Part,
    RowPart,
    Schedule,
    part_binds,
    part_terms,
)
from torchweld.codegen.triton_attention import ATTENTION_NAMES, print_attention
from torchweld.codegen.triton_best import print_search
from torchweld.codegen.triton_folds import FoldPrinter
from torchweld.codegen.triton_frame import Frame
from torchweld.codegen.triton_heads import attend_of
from torchweld.codegen.triton_launcher import launcher_text, program_count
from torchweld.codegen.triton_matmul import contract_of, dot_dtype, print_matmul
from torchweld.codegen.triton_rows import print_rows
from torchweld.codegen.triton_schedule import gpu_schedule
from torchweld.codegen.triton_splits import SPLIT_NAMES, SplitArguments
from torchweld.codegen.triton_text import POINTER_NAMES, Names
from torchweld.codegen.triton_writer import Writer
from torchweld.graph.terms import Load, walk

_INDENT = "    "
_RESERVED = (
    "tl",
    "triton",
    "torch",
    "pid",
    "range",
    "float",
    "DOT_DTYPE",
    "math",
    "os",
    "launch",
    "run",
    "allocate",
    "program_count",
    "reference",
    "check",
    "benchmark",
    "make_inputs",
    "untouched",
    "largest_error",
    "stored_weight",
    "OUTPUTS",
    "first",
    "programs",
    "aten",
    "main",
    "split_count",
    "scratch",
    *ATTENTION_NAMES,
    *SPLIT_NAMES,
)


@dataclass(frozen=True)
class TritonKernel:
    """A printed kernel.

    entry      the name of the kernel function; its arguments are buffers, sizes, what split keys need (triton_splits),
               then `DOT_DTYPE` if there is one
    source     helpers and functions; needs `import triton` and `import triton.language as tl` before it
    launcher   host functions program_count, allocate, run and `launch(inputs..., sizes...) -> outputs`; needs torch
    signature  Triton's type of every argument but `DOT_DTYPE`
    dot_dtype  the 16-bit dtype (as an attribute of tl) that operands are given to tl.dot in; "" if there is none
    """

    entry: str
    source: str
    launcher: str
    signature: dict[str, str]
    warps: int
    stages: int
    dot_dtype: str


def print_kernel(kernel: Kernel) -> str:
    """The Triton source of `kernel`: device helpers and @triton.jit functions."""
    return build_triton(kernel).source


def build_triton(kernel: Kernel, shrink: int = 0) -> TritonKernel:
    """Everything that is known of a printed kernel; `shrink` asks for smaller tiles (see gpu_schedule)."""
    schedules = _schedules(kernel, shrink)
    helpers: dict[str, None] = {}
    names = Names({*_RESERVED, *helper_sources(), *kernel.sizes})
    # `run` has the buffers as parameters: a kernel of the same name would be hidden by them.
    # Nor may it hide what the file's other functions call, such as `sum`.
    hidden = {buffer.name for buffer in kernel.buffers} | set(dir(builtins))
    entry = Names(names.used | hidden).fresh(kernel.name)
    names.used.add(entry)
    pointers = {b.name: names.fresh(f"{b.name}_ptr") for b in kernel.buffers}
    half = next((d for part in kernel.parts for d in _half_dots(part)), None)
    splits = None
    if any(schedule.split_keys for schedule in schedules):
        splits = SplitArguments(*(names.fresh(name) for name in ("splits", "states_ptr", "arrived_ptr")))
    head = _arguments(kernel, pointers, splits, half is not None)
    added = [*(splits.signature if splits else ()), *(["DOT_DTYPE"] if half else [])]
    passed = ", ".join([*pointers.values(), *kernel.sizes, *added])
    functions, calls = [], []
    for number, (part, schedule) in enumerate(zip(kernel.parts, schedules, strict=True)):
        own = splits if schedule.split_keys else None
        body = _part_body(kernel, part, schedule, pointers, own, Names(set(names.used)), helpers)
        if len(kernel.parts) == 1:
            functions.append(_function(entry, head, ["pid = tl.program_id(0)", *body], _summary(kernel)))
            continue
        name = names.fresh(f"{kernel.name}_part{number}")
        functions.append(_function(name, f"pid, {head}", body, _part_summary(part)))
        count = partial(program_count, part, schedule, splits=own.splits if own else None)
        calls.append((f"{name}(pid - first, {passed})", count))
    if len(kernel.parts) != 1:
        functions.append(_function(entry, head, _dispatch(calls), _summary(kernel)))
    texts = [text for name, text in helper_sources().items() if name in _needed(helpers)]
    warps = max((s.warps for s in schedules), default=4)
    stages = max((s.stages for s in schedules), default=1)
    signature = {pointers[b.name]: POINTER_NAMES[b.dtype] for b in kernel.buffers}
    signature |= dict.fromkeys(kernel.sizes, "i64") | (splits.signature if splits else {})
    launcher = launcher_text(kernel, entry, schedules, half, (warps, stages))
    source = "\n\n\n".join([*texts, *functions]) + "\n"
    return TritonKernel(entry, source, launcher, signature, warps, stages, half or "")


def _schedules(kernel: Kernel, shrink: int) -> list[Schedule]:
    """One schedule per part; only one part may split its keys, since a launch has one set of states and counters."""
    schedules = [gpu_schedule(part, shrink) for part in kernel.parts]
    if sum(schedule.split_keys > 0 for schedule in schedules) > 1:
        schedules = [replace(schedule, split_keys=0) for schedule in schedules]
    return schedules


def _arguments(
    kernel: Kernel, pointers: dict[str, str], splits: SplitArguments | None, has_dot_dtype: bool
) -> str:
    sizes = [f"{size}: tl.int64" for size in kernel.sizes]
    shared = [f"{splits.splits}: tl.int64", splits.states, splits.arrived] if splits else []
    dot = ["DOT_DTYPE: tl.constexpr"] if has_dot_dtype else []
    return ", ".join([*pointers.values(), *sizes, *shared, *dot])


def _part_body(
    kernel: Kernel,
    part: Part,
    schedule: Schedule,
    pointers: dict[str, str],
    splits: SplitArguments | None,
    names: Names,
    helpers: dict[str, None],
) -> list[str]:
    """The lines of one part's function."""
    writer = Writer(names, helpers=helpers)
    printer = FoldPrinter(kernel, pointers, writer, Frame(1))
    printer.count_uses([b.term for b in part_binds(part)] + [s.value for s in part.stores])
    match part:
        case RowPart():
            print_rows(printer, part, schedule)
        case MatmulPart():
            (print_search if part.choices else print_matmul)(printer, part, schedule)
        case AttentionPart():
            print_attention(printer, part, schedule, splits)
    return writer.lines


def _function(name: str, arguments: str, body: list[str], summary: str) -> str:
    head = f"def {name}({arguments}):"
    if len(head) > 110:
        head = f"def {name}(\n{_INDENT}{arguments},\n):"
    lines = [f'"""{summary}"""', *body]
    return "\n".join(["@triton.jit", head, *(_INDENT + line for line in lines)])


def _dispatch(calls: Sequence[tuple[str, Callable[[str], str]]]) -> list[str]:
    """The programs are numbered part after part."""
    lines = ["pid = tl.program_id(0)", "first = 0"]
    for number, (call, programs) in enumerate(calls):
        lines.append(f"programs = {programs('tl.cdiv')}")
        lines.append("if (pid >= first) & (pid < first + programs):")
        lines.append(_INDENT + call)
        if number < len(calls) - 1:
            lines.append("first += programs")
    return lines


def _half_dots(part: Part) -> list[str]:
    """The 16-bit dtypes that a part gives to tl.dot."""
    pairs = []
    if isinstance(part, MatmulPart):
        pairs = [(contract_of(b).a, contract_of(b).b) for b in part.contracts]
    elif isinstance(part, AttentionPart):
        pairs = [(attend_of(part).q, attend_of(part).k)]
    halves = [a for a, b in pairs if dot_dtype(a, b) == "DOT_DTYPE"]
    return [str(n.dtype).removeprefix("torch.") for a in halves for n in walk(a) if isinstance(n, Load)]


def _summary(kernel: Kernel) -> str:
    ops = ", ".join(dict.fromkeys(op.removeprefix("aten.") for op in kernel.ops))
    return f"{kernel.name}: {ops}." if ops else f"{kernel.name}."


def _part_summary(part: Part) -> str:
    return f"Stores {', '.join(dict.fromkeys(store.buffer for store in part.stores))}."


@cache
def helper_sources() -> dict[str, str]:
    """The device functions of `triton_helpers` by name, as source."""
    text = Path(__file__).with_name("triton_helpers.py").read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = "@triton.jit\n" + (ast.get_source_segment(text, node) or "")
    return found


def _needed(helpers: dict[str, None]) -> set[str]:
    """`helpers` and the helpers that they call."""
    needed = set(helpers)
    if "floor_modulo" in needed:
        needed.add("floor_divide")
    if needed & {"sin", "cos"}:
        needed.add("sine_in_quadrant")
    return needed


__all__ = ["TritonKernel", "build_triton", "part_terms", "print_kernel", "program_count"]
