"""`torchweld explain MODEL --decode`: the derived state of every layer and the kernels of a step."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console

from torchweld.graph.capture_causal import capture_causal
from torchweld.graph.program import Program
from torchweld.graph.rewrite import PassOutcome, Refusal
from torchweld.graph.sequence import describe_refusal
from torchweld.models.load import load_model
from torchweld.optimizer.commands.subject import Subject, Wish, check_device
from torchweld.optimizer.compile import Options
from torchweld.optimizer.compile_step import compile_step, normalise
from torchweld.optimizer.ledger import Phase
from torchweld.optimizer.progress import show_phase
from torchweld.optimizer.report_decode import DecodeReport, StateRecord
from torchweld.passes import recognize_attention
from torchweld.passes.rewrite_kv_cache import derive_step


def explain_decoding(
    program: Program, options: Options | None = None, *, name: str | None = None
) -> DecodeReport:
    """Derive and compile the step of a captured causal program (it stays as it is), and say what it is.

    For a Hugging Face model: `explain_decoding(capture_causal(model))`. Where no step can be derived the report holds
    the refusal: nothing is raised.
    """
    copy, outcomes = normalise(program)
    step = derive_step(copy)
    title = name or program.name
    if isinstance(step, Refusal):
        return DecodeReport(title, refusal=first_cause(outcomes, step))
    report = compile_step(step, options or Options()).report
    # A scan has a state per carry: all of them belong to one layer.
    numbers = {node: number for number, node in enumerate(dict.fromkeys(state.node for state in step.states))}
    return DecodeReport(
        model=title,
        layers=tuple(StateRecord.of(numbers[state.node], state) for state in step.states),
        kernels_per_layer=report.kernels_per_layer,
        launches=len(report.launches),
        fallbacks=report.fallbacks,
        limit=step.limit,
        crosses=tuple(StateRecord.of(number, state) for number, state in enumerate(step.crosses)),
    )


def first_cause(outcomes: Sequence[PassOutcome], refusal: Refusal) -> str:
    """Why there is no step, for people: an attention that was not recognised is the cause of what mixes positions."""
    missed = [
        cause for outcome in outcomes if outcome.name == recognize_attention.NAME for cause in outcome.refused
    ]
    if not missed:
        return describe_refusal(refusal)
    return f"an attention is not recognised: {describe_refusal(missed[0])}"


def load_decoder(spec: str) -> Subject:
    """Load MODEL to decode with it: example inputs are as the model came with them, and may be none.

    Raises ModelFileError.
    """
    start = time.perf_counter()
    with show_phase("load", spec):
        loaded = load_model(spec)
    check_device(loaded, spec)
    return Subject(loaded, loaded.example_inputs, [Phase("load", time.perf_counter() - start)])


def explain_subject_decoding(subject: Subject, wish: Wish) -> DecodeReport:
    """The same of what a command loaded, with progress on stderr. Tokens are made up where it has no example inputs."""
    with subject.phase("capture"):
        program = capture_causal(subject.loaded.module, subject.inputs or None)
    with subject.phase("derive and compile a step of"):
        return explain_decoding(program, wish.options(), name=subject.loaded.name)


def print_decoding(report: DecodeReport, console: Console, *, as_json: bool, as_markdown: bool) -> None:
    """Print to stdout: JSON, Markdown, or tables."""
    if as_json:
        print(report.to_json())
    elif as_markdown:
        print(report.to_markdown(), end="")
    else:
        report.render(console)
