"""The host functions of a printed Triton kernel: count its programs, allocate what it writes, run it.

program_count(sizes...)          programs of a run
allocate(sizes..., device)       outputs, not yet written
run(buffers..., sizes..., programs)
launch(inputs..., sizes...)      allocate and run; returns the outputs
split_count, scratch             where an attention splits its keys (triton_splits.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torchweld.codegen.ir import AttentionPart, Buffer, Kernel, MatmulPart, Part, RowPart, Schedule
from torchweld.codegen.triton_heads import attend_of, group_heads
from torchweld.codegen.triton_schedule import width
from torchweld.codegen.triton_splits import ENOUGH_TILES, state_floats
from torchweld.codegen.triton_text import Value, index_text
from torchweld.graph.terms import Expr

_INDENT = "    "


def program_count(part: Part, schedule: Schedule, divide: str, splits: str | None = None) -> str:
    """The number of programs of a part as text.

    divide: the name of the division that rounds up.  splits: where the part splits its keys, the programs per tile.
    """
    return _product([splits] if splits else [], _factors(part, schedule), divide)


def _factors(part: Part, schedule: Schedule) -> list[tuple[Expr, int]]:
    """Extents and the blocks that they are cut into."""
    match part:
        case RowPart():
            return [(width(part.grid), schedule.block_rows)]
        case MatmulPart():
            tiles = [(width(part.batch), 1), (width(part.rows), schedule.block_rows)]
            # A program that searches its products goes over all columns itself.
            return tiles if part.choices else [*tiles, (part.n.extent, schedule.block_n)]
        case AttentionPart():
            heads = group_heads(part)
            return [(width(heads.part.batch), 1), (width(heads.rows), schedule.block_rows)]


def _product(texts: list[str], factors: Sequence[tuple[Expr, int]], divide: str) -> str:
    known = prod(-(-int(extent) // block) for extent, block in factors if extent.is_Integer)
    texts = [_blocks(extent, block, divide) for extent, block in factors if not extent.is_Integer] + texts
    return " * ".join(texts + [str(known)] * (known != 1 or not texts))


def _blocks(extent: Expr, block: int, divide: str) -> str:
    text = _size_text(extent)
    return text if block == 1 else f"{divide}({text}, {block})"


def _size_text(expr: Expr) -> str:
    return index_text(expr, lambda symbol: Value(str(symbol))).text


def launcher_text(
    kernel: Kernel, entry: str, schedules: Sequence[Schedule], half: str | None, options: tuple[int, int]
) -> str:
    """The host functions as source. half: the dtype of 16-bit operands; options: warps and stages."""
    outputs = [b for b in kernel.buffers if b.role == "output"]
    sizes = ", ".join(kernel.sizes)
    on_device = f"{sizes}{', ' if sizes else ''}device"
    parts = list(zip(kernel.parts, schedules, strict=True))
    split = next(((part, schedule) for part, schedule in parts if schedule.split_keys), None)
    own = f"split_count({sizes})"
    counts = [program_count(p, s, "triton.cdiv", own if s.split_keys else None) for p, s in parts]
    functions = [
        f"OUTPUTS = {tuple(b.name for b in outputs)!r}",
        *(_split_functions(*split, sizes, on_device) if split else ()),
        _host_function("program_count", sizes, "How many programs a run takes.", [f"return {' + '.join(counts)}"]),
        _host_function(
            "allocate", on_device, "Outputs, not yet written.",
            ["return [", *(f"{_INDENT}{_empty(b)}," for b in outputs), "]"],
        ),
        _run_function(kernel, entry, half, options, split is not None),
        _launch_function(kernel, sizes, on_device),
    ]  # fmt: skip
    return "\n\n\n".join(functions) + "\n"


def _split_functions(part: Part, schedule: Schedule, sizes: str, on_device: str) -> tuple[str, str]:
    """How many programs share a tile, and what they share."""
    assert isinstance(part, AttentionPart)
    attend = attend_of(part)
    tiles = f"tiles = {_product([], _factors(part, schedule), 'triton.cdiv')}"
    most = _blocks(attend.s.extent, schedule.split_keys, "triton.cdiv")
    if attend.mask_kind == "window":
        most += " + 1"  # a window may begin and end inside a split
    count = _host_function(
        "split_count", sizes,
        f"How many programs share the keys of a tile of rows: 1, or where tiles are few one per {schedule.split_keys}.",
        [tiles, f"return max({most}, 1) if tiles < {ENOUGH_TILES} else 1"],
    )  # fmt: skip
    room = state_floats(part, schedule)
    scratch = _host_function(
        "scratch", on_device,
        "What programs share: their number, room for states, and counters that every run leaves at 0.",
        [tiles, f"splits = split_count({sizes})", "shared = tiles if splits > 1 else 0",
         f"states = torch.empty([shared * splits * {room}], dtype=torch.float32, device=device)",
         "return [splits, states, torch.zeros([shared], dtype=torch.int32, device=device)]"],
    )  # fmt: skip
    return count, scratch


def _run_function(
    kernel: Kernel, entry: str, half: str | None, options: tuple[int, int], has_splits: bool
) -> str:
    arguments, body = [*(b.name for b in kernel.buffers), *kernel.sizes], []
    passed, parameters = list(arguments), [*arguments, "programs"]
    if has_splits:
        parameters.append("shared=None")
        body = [
            "# One scratch will do for all runs of these sizes, one after the other.",
            f"shared = scratch({', '.join([*kernel.sizes, f'{kernel.buffers[0].name}.device'])})"
            " if shared is None else shared",
        ]
        passed.append("*shared")
    passed += [f"num_warps={options[0]}", f"num_stages={options[1]}"]
    if half is not None:
        passed.append("DOT_DTYPE=dot_dtype")
        body += [
            "# Triton's interpreter computes bfloat16 wrongly; float32 holds the same values.",
            f'dot_dtype = tl.{half} if {kernel.buffers[0].name}.device.type != "cpu" else tl.float32',
        ]
    body += ["if programs > 0:", f"{_INDENT}{entry}[(programs,)]({', '.join(passed)})"]
    summary = "Run the first `programs` programs on contiguous tensors."
    return _host_function("run", ", ".join(parameters), summary, body)


def _launch_function(kernel: Kernel, sizes: str, on_device: str) -> str:
    inputs = [b.name for b in kernel.buffers if b.role != "output"]
    outputs = [b.name for b in kernel.buffers if b.role == "output"]
    first = f"{inputs[0]}.device" if inputs else '"cuda" if torch.cuda.is_available() else "cpu"'
    named = ", ".join(f"{name}={name}" for name in kernel.sizes)
    if inputs + outputs == [b.name for b in kernel.buffers]:
        buffers = [*inputs, "*outputs"]
    else:
        places = {name: f"outputs[{n}]" for n, name in enumerate(outputs)}
        buffers = [places.get(b.name, b.name) for b in kernel.buffers]
    both = ", ".join([*buffers, *([named] if named else [])])
    body = [
        f"outputs = allocate({on_device}={first})",
        f"run({both}, programs=program_count({sizes}))",
        "return outputs",
    ]
    return _host_function("launch", ", ".join([*inputs, *kernel.sizes]), _launch_summary(kernel), body)


def _launch_summary(kernel: Kernel) -> str:
    made = ", ".join(b.name for b in kernel.buffers if b.role == "output")
    updated = ", ".join(b.name for b in kernel.buffers if b.role == "update")
    parts = [f"compute {made}"] * bool(made) + [f"update {updated} in place"] * bool(updated)
    return " and ".join(parts).capitalize() + "."


def _host_function(name: str, parameters: str, summary: str, body: list[str]) -> str:
    return "\n".join(
        [f"def {name}({parameters}):", *(_INDENT + line for line in (f'"""{summary}"""', *body))]
    )


def _empty(buffer: Buffer) -> str:
    shape = ", ".join(_size_text(extent) for extent in buffer.shape)
    return f"torch.empty([{shape}], dtype={buffer.dtype}, device=device)"
