"""`python -m benchmarks.scaling`: how the cost of ours grows, beside what the roofline says.

    python -m benchmarks.scaling                        # SmolLM2: context, prompt, batch, rows, threads, depth
    python -m benchmarks.scaling --model gemma3 --precision int8 --quick
    python -m benchmarks.scaling --write                # also benchmarks/results/ and docs/performance.md

Each series prints the exponent e of t = a * size^e as measured and as the limit has it (0: the size costs nothing,
1: twice the size, twice the time), and how many times more the largest size costs than the limit allows. The limit of a
size is a pure read of as many bytes, measured between its runs (`pure_read`); the tables also show what the speed of
DRAM says, which working sets beat that stay in the last-level cache.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Final, cast

import torch
import typer

from benchmarks.fit import Growth
from benchmarks.machine import MachineBusy, Watch, ceilings, check_idle, describe
from benchmarks.measure import one_line, summarize
from benchmarks.peers.inputs import sentences, tokens
from benchmarks.peers.ours import options_for
from benchmarks.publish import Circumstances, report, update_page, write_results
from benchmarks.pure_read import PureRead
from benchmarks.roofline import ModelFacts, Work, facts_of, least_work
from benchmarks.rows import Row, measured_row
from benchmarks.workloads import Workload
from torchweld import load_model
from torchweld.decoding.cached import CachedModel
from torchweld.graph.target import Target

BUSY_CODE: Final = 3
CONTEXT: Final = 64
"""Cached positions in the series that vary something else."""
LEAST_SECONDS: Final = 1.0
"""Of the steps of one size together; so many short ones that their median is steady."""
ROUNDS: Final = 4
"""Turns of the runs and of the pure reads of a size: both meet the same moods of the machine."""


@dataclass(frozen=True)
class Setting:
    """One model as it is measured: compiled, with its sizes and the ceilings of its threads."""

    model: CachedModel
    facts: ModelFacts
    ceiling: Target
    gflops: float
    system: str


@dataclass(frozen=True)
class Series:
    """Rows in which one size grows; `sizes` says which value each row has."""

    title: str
    what: str
    sizes: tuple[float, ...]
    rows: tuple[Row, ...]
    growth: Growth


def measure_workload(
    setting: Setting, workload: Workload, repeats: int, between: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of at least `repeats` runs, each from the same state; short ones are repeated for LEAST_SECONDS.

    between: what comes before each of the ROUNDS that the runs go in.
    """
    if workload.kind == "prefill":
        prompts = sentences(workload.batch, workload.length)
        return _repeat(lambda: setting.model.prefill(prompts), lambda: None, between, repeats, 0.0)
    past = max(workload.past, 1)
    setting.model.prefill(sentences(workload.batch, past))
    ids = torch.tensor([tokens(workload.length, seed=7)] * workload.batch)
    wanted: Any = "last" if workload.length == 1 else "all"
    return _repeat(
        lambda: setting.model.step(ids, logits_for=wanted),
        lambda: setting.model.truncate(past),
        between,
        repeats,
        LEAST_SECONDS,
    )


def _repeat(
    run: Callable[[], object],
    undo: Callable[[], object],
    between: Callable[[], object],
    repeats: int,
    least_seconds: float,
) -> list[float]:
    """Seconds of each run but for the first of a round; `undo` is not counted either."""
    samples: list[float] = []
    for turn in range(1, ROUNDS + 1):
        between()
        run()
        undo()
        enough, seconds = -(-repeats * turn // ROUNDS), least_seconds * turn / ROUNDS
        while len(samples) < enough or (sum(samples) < seconds and len(samples) < 50 * turn):
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
            undo()
    return samples


def measure_beside_reads(
    setting: Setting, workload: Workload, work: Work, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of the runs, and of pure reads of the work's bytes between them."""
    reads: list[float] = []
    with PureRead(int(work.bytes), setting.ceiling.cores) as read:
        samples = measure_workload(setting, workload, repeats, lambda: reads.extend(read.passes(repeats)))
    return samples, reads


def measure_series(
    title: str, what: str, points: Sequence[tuple[float, Setting, Workload]], repeats: int
) -> Series:
    """One row per point (size, setting, workload), and the growth of the time of one run with the size."""
    rows, measured, roofline, pure = [], [], [], []
    for _, setting, workload in points:
        watch = Watch()
        work = least_work(setting.facts, workload)
        samples, reads = measure_beside_reads(setting, workload, work, repeats)
        summary = summarize([workload.in_unit(seconds) for seconds in samples])
        rows.append(
            measured_row(
                workload, setting.system, summary, work, setting.ceiling, watch.stop(),
                peak_gflops=setting.gflops,
            )
        )  # fmt: skip
        measured.append(workload.seconds(summary.median))
        roofline.append(work.seconds(setting.ceiling.read_gb_s, setting.gflops))
        pure.append(max(statistics.median(reads), work.flops / setting.gflops / 1e9))
    sizes = tuple(size for size, _, _ in points)
    growth = Growth(sizes, tuple(measured), tuple(roofline), tuple(pure))
    return Series(title, what, sizes, tuple(rows), growth)


def make_setting(
    model: str, precision: str, threads: int, ceiling: Target, layers: int | None = None
) -> Setting:
    """The model, or its first `layers` layers, compiled for so many threads, of which `ceiling` are the ceilings."""
    torch.set_num_threads(threads)
    module = load_model(model).module
    if layers is not None:
        module = first_layers(module, layers)
    rates = {"f32": ceiling.f32_gflops, "bf16": ceiling.bf16_gflops, "int8": ceiling.int8_gops}
    compiled = CachedModel.from_module(module, options=options_for(precision, threads))
    name = f"torchweld {precision}, {threads} thread{'s' * (threads > 1)}"
    name += f", {layers} layers" if layers is not None else ""
    return Setting(compiled, facts_with_layers(model, module, layers), ceiling, rates[precision], name)


def first_layers(module: torch.nn.Module, count: int) -> torch.nn.Module:
    """A copy of a decoder that shares its weights and has only its first `count` layers. ValueError beyond."""
    layers = cast(torch.nn.ModuleList, module.layers)
    if not 1 <= count <= len(layers):
        raise ValueError(f"{count} layers of a model that has {len(layers)}: expected 1 to {len(layers)}")
    shallow = copy.copy(module)
    shallow._modules = {**module._modules, "layers": layers[:count]}
    return shallow


def facts_with_layers(model: str, module: torch.nn.Module, layers: int | None) -> ModelFacts:
    """The sizes of a model of which only the first layers may be left (its configuration still counts all)."""
    facts = facts_of(model, module)
    return facts if layers is None else ModelFacts(**{**vars(facts), "windows": facts.windows[:layers]})


def all_series(
    model: str, precision: str, threads: int, quick: bool, say: Callable[[str], None]
) -> list[Series]:
    """Every series of the model; one that fails is said and left out."""
    tops = {count: ceilings(count) for count in range(1, threads + 1)}
    full = make_setting(model, precision, threads, tops[threads])
    longest = min(full.model.max_length or 8192, 8192)
    contexts = [c for c in ((64, 512) if quick else (64, 256, 1024, 2048, 4096, 8190)) if c < longest]
    lengths = (64, 256) if quick else (64, 128, 256, 512, 1024, 2048)
    batches = (1, 4) if quick else (1, 2, 4, 8, 16)
    rows = (1, 4) if quick else (1, 2, 4, 8, 12, 16)
    repeats = 3 if quick else 5

    def step(past: int = CONTEXT, batch: int = 1) -> Workload:
        return Workload(model, "decode", batch, 1, past)

    def verify(count: int) -> Workload:
        return Workload(model, "verify", 1, count, CONTEXT)

    def fewer_threads() -> list[tuple[float, Setting, Workload]]:
        return [(n, make_setting(model, precision, n, tops[n]), step()) for n in tops]

    def depths() -> list[tuple[float, Setting, Workload]]:
        most = len(full.facts.windows)
        counts = sorted({max(most // 4, 1), max(most // 2, 1), most})
        return [(n, make_setting(model, precision, threads, tops[threads], n), step()) for n in counts]

    makers: list[tuple[str, str, Callable[[], list[tuple[float, Setting, Workload]]]]] = [
        ("one token, context grows", "context", lambda: [(c, full, step(past=c)) for c in contexts]),
        ("prompt grows", "tokens", lambda: [(n, full, Workload(model, "prefill", 1, n)) for n in lengths]),
        ("one token each, batch grows", "sequences", lambda: [(b, full, step(batch=b)) for b in batches]),
        ("rows of one sequence at once", "rows", lambda: [(n, full, verify(n)) for n in rows]),
        ("one token, threads", "threads", fewer_threads),
        ("one token, layers", "layers", depths),
    ]
    found = []
    for title, what, make in makers:
        say(f"{model}: {title}")
        try:
            found.append(measure_series(title, what, make(), repeats))
        except Exception as error:  # one series that fails must not lose the others
            say(f"{model}: {title}: {one_line(error)}")
    return found


_PROMISES: Final = (
    ("rows of one sequence at once", 4.0, 1.0, "", 1.3, 1.1),
    ("rows of one sequence at once", 8.0, 1.0, "", 1.6, 1.2),
    ("one token, context grows", 4096.0, 64.0, "the roofline", 1.15, 1.05),
    ("one token, context grows", 4096.0, 64.0, "a pure read of as much", 1.15, 1.05),
)
"""Series, the size and the size that it is compared with, over what of the same ratio, at most, aim."""


def promises(series: Sequence[Series]) -> str:
    """What the project promised about growth, beside what was measured; empty where the sizes were not measured."""
    lines = []
    for title, size, base, over, most, aim in _PROMISES:
        for one in series:
            if one.title != title or not {size, base} <= set(one.sizes):
                continue
            at, by = one.sizes.index(size), one.sizes.index(base)
            ratio = one.growth.measured[at] / one.growth.measured[by]
            if over:
                least = one.growth.roofline if over == "the roofline" else one.growth.limit
                ratio /= least[at] / least[by]
            reached = "aim" if ratio <= aim else "must" if ratio <= most else "short"
            what = f"{title}: {size:g} against {base:g}{f', over {over}' if over else ''}"
            lines.append(f"| {what} | {ratio:.2f} | {most:.2f} | {aim:.2f} | {reached} |")
    head = ["| promise | measured | at most | aim | reached |", "|---|---:|---:|---:|---|"]
    return "\n".join([*head, *lines]) + "\n\n" if lines else ""


def to_markdown(series: Sequence[Series]) -> str:
    """The exponents of all series, then a table of each."""
    lines = [
        "| series | sizes | exponent | the limit's | largest against smallest, over the limit's ratio |",
        "|---|---|---:|---:|---:|",
    ]
    for one in series:
        growth = one.growth
        numbers = (growth.exponent, growth.limit_exponent, growth.ratio)
        cells = " | ".join("" if number is None else f"{number:.2f}" for number in numbers)
        lines.append(f"| {one.title} | {one.what} {one.sizes[0]:g} to {one.sizes[-1]:g} | {cells} |")
    for one in series:
        lines += [
            "",
            f"**{one.title}**",
            "",
            f"| {one.what} | ms | at the speed of DRAM, ms | times | pure read of as much, ms | times |",
            "|---:|---:|---:|---:|---:|---:|",
        ]
        growth = one.growth
        for size, took, *limits in zip(
            one.sizes, growth.measured, growth.roofline, growth.limit, strict=True
        ):
            cells = " | ".join(f"{least * 1e3:.3f} | {took / least:.2f}" for least in limits)
            lines.append(f"| {size:g} | {took * 1e3:.3f} | {cells} |")
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[str, typer.Option(help="smollm2 or gemma3.")] = "smollm2",
    precision: Annotated[str, typer.Option(help="f32, bf16 or int8.")] = "f32",
    threads: Annotated[int, typer.Option(min=1, help="At most.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes of each series.")] = False,
    busy: Annotated[bool, typer.Option("--busy", help="Measure even if others use the machine.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the results into the repository.")] = False,
) -> None:
    """Measure how the cost of decoding and prefill grows."""
    try:
        before = check_idle(busy)
    except MachineBusy as refusal:
        _say(str(refusal))
        raise typer.Exit(BUSY_CODE) from None
    watch = Watch()
    try:
        series = all_series(model, precision, threads, quick, _say)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    circumstances = Circumstances(
        date.today(), describe(), ceilings(threads), before, watch.stop(), threads, 3 if quick else 5
    )
    rows = [row for one in series for row in one.rows]
    table = promises(series) + to_markdown(series)
    print(table)
    print(report(rows, circumstances), end="")
    if write:
        text = f"{circumstances.to_markdown()}\n{model}, {precision}\n\n{table}"
        _say(f"wrote {write_results(f'scaling-{model}-{precision}', rows, text, circumstances)}")
        update_page("scaling", text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
