"""Write docs/coverage.md: every model that we try, through the whole pipeline, against float64.

    python -m scripts.make_coverage [NAME ...]

Rows are the built-in models with real weights (those whose packages are installed) and the small Hugging Face
architectures of tests/zoo.py with random weights.  Exits with 1 if any row is beyond the tolerance table.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.cover_decoding import Decoding, cover_decoding
from tests.more_decoders import CONFIGS, make_decoder
from tests.zoo import VOCAB, ZOO
from torchweld.graph.capture import capture
from torchweld.models.errors import ModelFileError
from torchweld.models.load import load_model
from torchweld.optimizer.compile import Compiled, Options, compile_program
from torchweld.optimizer.progress import show_phase
from torchweld.optimizer.verify import Oracle, StageCheck

BUILT_IN = ("smollm2", "gemma3", "minilm")
TARGET = Path(__file__).parent.parent / "docs" / "coverage.md"
BATCH, LENGTH, DECODED = 2, 9, 20


@dataclass(frozen=True)
class Row:
    """One model: the size of its graph, what it was fused into, and how far it is from float64."""

    name: str
    nodes: int
    compiled: Compiled
    check: StageCheck
    decoding: Decoding | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Is everything that was compared right?"""
        return self.check.ok and (self.decoding is None or self.decoding.ok)

    def cells(self) -> tuple[str, ...]:
        """The cells of the table."""
        report = self.compiled.report
        inside = sum(1 for fallback in report.fallbacks if fallback.layer is not None)
        what = "; ".join(sorted({fallback.what.split("(")[-1].rstrip(")") for fallback in report.fallbacks}))
        return (
            self.name, str(self.nodes), str(len(self.compiled.fused.groups)), str(len(report.kernels)),
            str(report.kernels_per_layer), f"{report.bytes_over_minimum:.2f}", str(report.eager_fallbacks),
            str(inside), what or "-", f"{self.check.max_relative_error:.1e}", "yes" if self.check.ok else "NO",
            "-" if self.decoding is None else self.decoding.cell,
        )  # fmt: skip


HEADINGS = (
    "model", "nodes", "groups", "kernels", "per layer", "bytes / min", "eager", "in layers", "what", "max error",
    "ok", "decodes",
)  # fmt: skip


def try_model(
    name: str,
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    ids: Tensor | None = None,
) -> Row:
    """Capture, compile and compare one model; with `ids`, decode them as well."""
    start = time.perf_counter()
    with show_phase("cover", name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = capture(model, args, kwargs)
        flat = program.flatten_inputs(args, kwargs)
        oracle = Oracle(program, flat)
        tensors = [value for value in flat if isinstance(value, Tensor)]
        compiled = compile_program(program, options=Options(), example_inputs=tensors)
        check = oracle.stage("executable", compiled)
    nodes = sum(1 for node in program.graph.nodes if node.op == "call_function")
    decoding = None if ids is None else cover(name, model, ids)
    return Row(name, nodes, compiled, check, decoding, time.perf_counter() - start)


def cover(name: str, model: nn.Module, ids: Tensor) -> Decoding:
    """How a model decodes, quietly."""
    with show_phase("decode", name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cover_decoding(model, ids)


def some_ids(highest: int) -> Tensor:
    """Tokens to decode, the same in every run."""
    return torch.randint(3, highest, (BATCH, DECODED), generator=torch.Generator().manual_seed(3))


def built_in(name: str) -> Row | None:
    """A built-in model, or None (said on stderr) where its package is not installed."""
    try:
        loaded = load_model(name)
    except ModelFileError as problem:
        print(f"left out: {problem}", file=sys.stderr)
        return None
    ids = [tensor for tensor in loaded.example_inputs if isinstance(tensor, Tensor)]
    decoded = some_ids(VOCAB) if loaded.kind == "decoder" else None
    return try_model(loaded.name, loaded.module, tuple(ids), {}, decoded)


def rows(names: list[str]) -> list[Row]:
    """The rows asked for; all of them without names."""
    found = [built_in(name) for name in BUILT_IN if not names or name in names]
    found += [
        try_model(
            name,
            entry.make(),
            (),
            entry.inputs(BATCH, LENGTH),
            some_ids(VOCAB) if entry.kind == "causal" else None,
        )
        for name, entry in ZOO.items()
        if not names or name in names
    ]
    return [row for row in found if row is not None]


def more_rows(names: list[str]) -> list[tuple[str, Decoding]]:
    """How the further decoders that are asked for decode; all of them without names."""
    wanted = [name for name in CONFIGS if not names or name in names]
    return [(name, cover(name, make_decoder(name), some_ids(VOCAB))) for name in wanted]


def to_markdown(table: list[Row], more: list[tuple[str, Decoding]]) -> str:
    """The page."""
    lines = [
        "# Coverage", "",
        "Made by `python -m scripts.make_coverage`; do not edit. Every model goes through capture, passes, fusion",
        f"and the CPU executable, at batch {BATCH} and length {LENGTH} (built-in models: their example), and is",
        "compared with the float64 run of its captured graph, element by element (`graph/compare.py`).", "",
        "* **nodes**: operations captured; **groups**: after fusion; **kernels**: distinct ones; **per layer**:",
        "  launches of the busiest decoder or encoder layer.",
        "* **bytes / min**: bytes moved over every group input read once and every output written once.",
        "* **eager**: groups that torch runs; **in layers**: those inside layers; **what**: their operations.",
        "* **max error**: the largest error relative to its row's largest magnitude.",
        f"* **decodes**: {DECODED} tokens in a prompt and steps of 1 and 3 through the derived cache, every logit",
        "  against float64: the states, the limit of positions if there is one, the largest error; or why not.", "",
        "| " + " | ".join(HEADINGS) + " |", "| :-- |" + " --: |" * 7 + " :-- | --: | :-- | :-- |",
    ]  # fmt: skip
    lines += ["| " + " | ".join(map(_escape, row.cells())) + " |" for row in table]
    lines += [
        "", "## More decoders", "",
        "Small Hugging Face architectures (`tests/more_decoders.py`) that no rule was written for.", "",
        "| model | decodes | kernels per layer |", "| :-- | :-- | --: |",
    ]  # fmt: skip
    lines += [
        f"| {name} | {_escape(found.cell)} | {found.kernels_per_layer or '-'} |" for name, found in more
    ]
    return "\n".join(lines) + "\n"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write the page, or only print the rows that are named."""
    names = sys.argv[1:]
    torch.manual_seed(0)
    table = rows(names)
    more = more_rows(names)
    page = to_markdown(table, more)
    print(page)
    if not names:
        TARGET.write_text(page, encoding="utf-8")
    return 0 if all(row.ok for row in table) and all(found.ok for _, found in more) else 1


if __name__ == "__main__":
    sys.exit(main())
