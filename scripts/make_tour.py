"""Write docs/tour.md: one decoder layer of SmolLM2 from its source through every stage to its kernels.

    python -m scripts.make_tour            # writes docs/tour.md
    python -m scripts.make_tour --check    # exits with 1 if the page is not what the code does today

Everything on the page is taken from the pipeline while it runs.  The model is SmolLM2 cut to two layers, the cost model
has fixed ceilings, so that the page is the same on every machine.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import fx, nn

from torchweld.codegen.cpp import print_kernel as print_cpp
from torchweld.codegen.formula import formula
from torchweld.codegen.ir import Kernel
from torchweld.codegen.lower import LoweredGroup, Lowerer
from torchweld.codegen.triton import print_kernel as print_triton
from torchweld.graph.capture import capture
from torchweld.graph.groups import Group, GroupGraph
from torchweld.graph.program import Program, source_line
from torchweld.graph.target import Target
from torchweld.models.load import load_model
from torchweld.optimizer.compile import Options, compile_program, group_layers
from torchweld.optimizer.ledger import PassRecord
from torchweld.optimizer.pipeline import Settings, run_graph_passes
from torchweld.optimizer.verify import Oracle

PAGE = Path(__file__).parent.parent / "docs" / "tour.md"
LAYER = 1
TARGET = Target("tour", 45.0, 500.0, 900.0, 2000.0, 1.0, 1 << 20, 32 << 20, 2)
IDS = torch.arange(2 * 16).reshape(2, 16)


def two_layers() -> nn.Module:
    """SmolLM2 without the layers that would only repeat the first ones."""
    model = load_model("smollm2").module
    model.layers = nn.ModuleList(list(model.layers)[: LAYER + 1])  # type: ignore[arg-type]
    return model


def code(text: str, language: str) -> str:
    """A fenced block."""
    return f"```{language}\n{textwrap.dedent(text).strip()}\n```\n"


def layer_nodes(program: Program) -> list[fx.Node]:
    """The operations of the layer, in graph order."""
    groups = GroupGraph.of(program.graph_module, Lowerer(2), lambda _: 0.0, {})
    layers = group_layers(groups)
    return [node for group in groups.topological() if layers[group.id] == LAYER for node in group.nodes]


def listing(nodes: list[fx.Node]) -> str:
    """One line per operation: what it is, what it reads, the user's source line."""
    lines = []
    for node in nodes:
        reads = ", ".join(operand.name for operand in node.all_input_nodes)
        name = str(node.target).removesuffix(".default")
        lines.append(f"{node.name:<28} {name:<38} ({reads})  # {source_line(node).split(':')[0]}")
    return "\n".join(line[:118] for line in lines)


def pass_rows(passes: tuple[PassRecord, ...]) -> str:
    """The ledger's passes as a table."""
    lines = ["| pass | kind | matched | applied | refused |", "| :-- | :-- | --: | --: | --: |"]
    for record in passes:
        refused = sum(refusal.count for refusal in record.refused)
        lines.append(
            f"| {record.name} | {record.exactness} | {record.matched} | {record.applied} | {refused} |"
        )
    return "\n".join(lines) + "\n"


def refusal_rows(passes: tuple[PassRecord, ...]) -> str:
    """Every reason that a fusion pass gave, and how often."""
    lines = ["| pass | reason | times |", "| :-- | :-- | --: |"]
    for record in passes:
        if record.name.startswith("fuse_"):
            lines += [f"| {record.name} | {reason} | {times} |" for reason, times in record.reasons()]
    return "\n".join(dict.fromkeys(lines)) + "\n"


def kernel_lines(groups: list[Group], lowered: dict[int, LoweredGroup]) -> Iterator[str]:
    """Every kernel of the layer: its operations and its formula."""
    for group in groups:
        kernel = lowered[group.id].kernel
        ops = ", ".join(str(node.target).removesuffix(".default") for node in group.nodes)
        yield f"### `{kernel.name}`\n\nOperations: {ops}.\n\n" + code("\n".join(formula(kernel)), "text")


def smallest(kernels: list[Kernel]) -> Kernel:
    """The kernel with the shortest C++, to be printed whole."""
    return min(kernels, key=lambda kernel: len(print_cpp(kernel).text))


def make_page() -> str:
    """The page as the code is today."""
    model = two_layers()
    layer = next(module for name, module in model.named_modules() if name == f"layers.{LAYER}")
    captured = capture(model, (IDS,))
    before = layer_nodes(captured)
    recognized = run_graph_passes(captured, Settings(TARGET, {}))
    after = layer_nodes(recognized)
    compiled = compile_program(captured, options=Options(target=TARGET, threads=1), example_inputs=[IDS])
    layers = group_layers(compiled.fused)
    groups = [group for group in compiled.fused.topological() if layers[group.id] == LAYER]
    lowered = {g.id: low for g in groups if isinstance(low := compiled.fused.lowered.get(g.id), LoweredGroup)}
    shown = smallest([lowered[group.id].kernel for group in groups])
    check = Oracle(captured, captured.flatten_inputs((IDS,), {})).stage("executable", compiled)
    parts = [
        "# Tour: one decoder layer, from source to kernels\n",
        "Made by `python -m scripts.make_tour` from a real compilation; do not edit. The model is SmolLM2-135M, cut to",
        f"two layers; layer {LAYER} is followed. Batch and sequence length are symbols.\n",
        "## 1. What the user wrote\n", code(inspect.getsource(type(layer).forward), "python"),
        f"## 2. Captured: {len(before)} operations\n",
        "Functional ATen with composites kept; every operation knows its source line. Weights stay in their stored",
        "format: decoding them, like a view, is free and belongs to whoever reads them, so neither is listed.\n",
        code(listing(before), "text"),
        f"## 3. Canonicalized and recognized: {len(after)} operations\n",
        "One spelling per idea. Rotary embedding and attention have names; the mask is causal by proof.\n",
        code(listing(after), "text"), pass_rows(tuple(compiled.ledger.passes)),
        f"## 4. Fused: {len(groups)} groups\n",
        "Why moves were refused (over the whole two-layer graph):\n", refusal_rows(tuple(compiled.ledger.passes)),
        "## 5. Lowered: one kernel per group\n", *kernel_lines(groups, lowered),
        f"## 6. Printed: `{shown.name}` in C++ and Triton\n",
        "The C++ calls a small header of vector types and helpers that stands before it in the unit.\n",
        code(print_cpp(shown).text, "cpp"), code(print_triton(shown), "python"),
        "## 7. Proved\n",
        f"The executable is {'within' if check.ok else 'BEYOND'} the tolerance table against the float64 run of the",
        "captured graph. `torchweld check smollm2` does this after every pass.\n",
    ]  # fmt: skip
    return "\n".join(parts)


def main() -> int:
    """Write the page, or check it."""
    page = make_page()
    if "--check" in sys.argv[1:]:
        same = PAGE.read_text(encoding="utf-8") == page
        print(
            "docs/tour.md is up to date" if same else "docs/tour.md is stale: run python -m scripts.make_tour"
        )
        return 0 if same else 1
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(page.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
