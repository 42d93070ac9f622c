"""The command line: `torchweld optimize | explain | dump | check | bench | passes | doctor | cache`.

Here are the options and the one place where an exception becomes a line and an exit code; what a command does
is in optimizer/commands/. `decoding/cli.py` adds `generate`, because this room may not look up at that one.

The commands' modules are imported when a command runs, not before: importing torch takes seconds, and
`--help` or a mistyped option should not.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, TextIO, runtime_checkable

import typer
from rich.console import Console

from torchweld.optimizer.failures import BAD_INPUT, OUR_FAULT, explain, one_line
from torchweld.optimizer.suggest import check_name, unknown_name

NO: Final = 1
"""Exit code of a check that failed."""
WIDTH: Final = 100
"""Columns where the output is no terminal."""


class Commands(typer.core.TyperGroup):
    """A group whose unknown commands are answered with the nearest valid one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` names; a usage error (exit code 2) if there is none."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(unknown_name("command", args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


@runtime_checkable
class UsageProblem(Protocol):
    """What click raises for wrong arguments; typer may carry its own copy of click, so the shape decides."""

    exit_code: int
    ctx: Any

    def format_message(self) -> str: ...


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2, gemma3, minilm, a GGUF file, a Hugging Face folder, a .pt2, or file.py:factory",
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Batch size (1 for language models).")]
Length = Annotated[int | None, typer.Option("--seq", min=1, help="Sequence length (64 for language models).")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads (all cores).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="Of products with stored weights: f32, bf16 or int8.")
]
Guide = Annotated[str, typer.Option(help="Decide fusions by the cost 'model' or by 'measure'.")]

HELP: Final = "Optimize transformer models: fuse them into few kernels, and say what was done."
app = typer.Typer(
    cls=Commands, help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
cache_app = typer.Typer(cls=Commands, no_args_is_help=True, help="The kernel cache on disk.")
app.add_typer(cache_app, name="cache")


@app.command()
def optimize(
    model: Model,
    batch: Batch = None,
    seq: Length = None,
    threads: Threads = None,
    guide: Guide = "model",
    verify: Annotated[int, typer.Option(min=0, max=1, help="1: compare with float64.")] = 0,
    strict: Annotated[bool, typer.Option(help="Fail where something would run eagerly.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the report to FILE.json or FILE.md.")] = None,
) -> None:
    """Optimize MODEL, fill the kernel cache, and print the headline figures."""
    from torchweld.optimizer.commands.explain import check_report_path, is_right, summarize, write_report
    from torchweld.optimizer.commands.subject import Wish, compile_subject, load_subject

    check_name("guide", guide, ("model", "measure"), "--guide")
    if out is not None:
        check_report_path(out)
    wish = Wish(batch, seq, threads, guide, verify, strict)
    job = compile_subject(load_subject(model, wish), wish)
    summarize(job.report, make_console())
    if out is not None:
        write_report(job.report, out)
    if not is_right(job):
        raise typer.Exit(NO)


@app.command("explain")
def explain_(
    model: Model,
    batch: Batch = None,
    seq: Length = None,
    threads: Threads = None,
    guide: Guide = "model",
    check: Annotated[bool, typer.Option(help="Also compare the result with float64.")] = True,
    profile: Annotated[bool, typer.Option(help="Also time every kernel and rate the cost model.")] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="Say instead how MODEL decodes; exit code 1 if it does not.")
    ] = False,
    quality: Annotated[
        bool, typer.Option("--quality", help="Say instead how far each precision is from float64 on a text.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="With --quality: a text file instead of the text that we ship.")
    ] = None,
    json: Json = False,
    markdown: Annotated[bool, typer.Option(help="Print Markdown.")] = False,
) -> None:
    """Say what each pass did to MODEL, what each kernel costs, and what runs eagerly."""
    from torchweld.optimizer.commands.explain import is_right, print_report
    from torchweld.optimizer.commands.quality import check_options, explain_quality, print_quality
    from torchweld.optimizer.commands.subject import Wish, explain_subject, load_subject

    check_name("guide", guide, ("model", "measure"), "--guide")
    check_options(decode=decode, quality=quality, text=text)
    wish = Wish(batch, seq, threads, guide, 2 * int(check), profile=profile)  # 2: every pass as well
    if quality:
        measured = explain_quality(load_subject(model, wish), wish, text)
        print_quality(measured, make_console(), as_json=json, as_markdown=markdown)
        return
    if decode:
        from torchweld.optimizer.commands.decode import explain_subject_decoding, load_decoder, print_decoding

        found = explain_subject_decoding(load_decoder(model), wish)
        print_decoding(found, make_console(), as_json=json, as_markdown=markdown)
        if not found.decodes:
            raise typer.Exit(NO)
        return
    job = explain_subject(load_subject(model, wish), wish)
    print_report(job.report, make_console(), as_json=json, as_markdown=markdown)
    if not is_right(job):
        raise typer.Exit(NO)


@app.command()
def dump(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the kernels; made if missing.")],
    target: Annotated[
        str, typer.Option(help="Comma-separated: sm_80, sm_90, sm_100, gfx942, cpu.")
    ] = "cpu,sm_90",
    batch: Batch = None,
    seq: Length = None,
    check: Annotated[bool, typer.Option("--check", help="Run every file's self-check.")] = False,
) -> None:
    """Write one readable, self-checking file per fused kernel of MODEL.

    Exit code 1 if a kernel spills or does not fit a target.
    """
    from torchweld.optimizer.commands.dump import dump_model, parse_targets
    from torchweld.optimizer.commands.subject import Wish

    targets = parse_targets(target)
    if not dump_model(model, Wish(batch, seq), targets, out, make_console(), check=check):
        raise typer.Exit(NO)


@app.command()
def check(
    model: Model,
    batch: Batch = None,
    seq: Annotated[int | None, typer.Option("--seq", min=1, help="Sequence length.")] = 16,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare MODEL with its float64 reference after every pass and at the end.

    Exit code 1 beyond the tolerance table.
    """
    from torchweld.optimizer.commands.check import check_model
    from torchweld.optimizer.commands.subject import Wish

    if not check_model(model, Wish(batch, seq, threads), make_console(), as_json=json):
        raise typer.Exit(NO)


@app.command()
def bench(
    model: Model,
    batch: Batch = None,
    seq: Length = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 20,
    precision: PrecisionOption = "f32",
    json: Json = False,
) -> None:
    """Time the optimized MODEL against torch eager, call by call in turns."""
    from torchweld.optimizer.commands.bench import bench_model
    from torchweld.optimizer.commands.subject import Wish, check_precision

    wish = Wish(batch, seq, threads, precision=check_precision(precision))
    bench_model(model, wish, rounds, make_console(), as_json=json)


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="Show only this pass.")] = None, json: Json = False
) -> None:
    """List the passes of the pipeline: before, after, why, legal, source."""
    from torchweld.optimizer.commands.passes import show_passes

    show_passes(make_console(), name, as_json=json)


@app.command()
def doctor(json: Json = False) -> None:
    """Show this machine's ceilings, compiler, versions, cache, and the environment variables."""
    from torchweld.optimizer.doctor import examine
    from torchweld.optimizer.pipeline import pass_names

    diagnosis = examine(pass_names())
    if json:
        print(diagnosis.to_json())
    else:
        diagnosis.render(make_console())


@cache_app.command("list")
def cache_list() -> None:
    """List the entries, oldest first."""
    from torchweld.optimizer.commands.cache import list_entries

    list_entries(make_console())


@cache_app.command("clear")
def cache_clear() -> None:
    """Delete all entries."""
    from torchweld.optimizer.commands.cache import clear_entries

    clear_entries(make_console())


@cache_app.command("path")
def cache_path() -> None:
    """Print the folder."""
    from torchweld.codegen.cache import Cache

    print(Cache().folder)


def make_console() -> Console:
    """Stdout: as wide as the terminal, or as the variable COLUMNS says; 100 columns where there is neither."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)


def main() -> int:
    """Entry point of the `torchweld` script without `generate`; returns the exit code."""
    return run(app, sys.argv[1:])


def run(application: typer.Typer, arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; a failure is one line on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal without UTF-8 shows question marks; it does not end the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    command = typer.main.get_command(application)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        if os.environ.get("TORCHWELD_CACHE_DIR") and not {"doctor", "cache"} & set(arguments[:1]):
            # Whoever names a cache folder wants that one: a folder that cannot be used is bad input (exit code 2),
            # not a reason to go on without. With the default folder we go on, and so does the library.
            warnings.filterwarnings("error", message="the kernel cache (is not used|in .* cannot be written)")
        try:
            result = command.main(args=list(arguments), prog_name="torchweld", standalone_mode=False)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader (head, less) has gone; python would complain again while it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return NO
        except (Exception, KeyboardInterrupt) as problem:
            return _fail(problem)
    return result if isinstance(result, int) else 0


def _fail(problem: BaseException) -> int:
    """Print why, on one line; the traceback goes to the log if that is switched on."""
    if isinstance(problem, typer.Abort):
        problem = KeyboardInterrupt()
    if isinstance(problem, UsageProblem):
        # A command line that names no command has got its help already, and no message.
        if problem.format_message():
            print(f"torchweld: {_usage_line(problem)}", file=sys.stderr)
        return BAD_INPUT
    failure = explain(problem)
    print(f"torchweld: {failure.line}", file=sys.stderr)
    logger = logging.getLogger("torchweld.optimizer")
    if logger.isEnabledFor(logging.DEBUG) or (failure.code == OUR_FAULT and "TORCHWELD_LOGS" in os.environ):
        logger.error("traceback of the above", exc_info=problem)
    return failure.code


def _usage_line(problem: UsageProblem) -> str:
    """click's message; for an unknown option with the nearest valid one, however far."""
    context = problem.ctx
    message = problem.format_message()
    option = getattr(problem, "option_name", None)
    # Only NoSuchOption has possibilities; a missing argument of an option has the option's name as well.
    if option and hasattr(problem, "possibilities") and context is not None:
        parameters = context.command.get_params(context)
        valid = [name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)]
        message = unknown_name("option", option, [name for name in valid if name.startswith("-")])
    where = context.command_path if context is not None else "torchweld"
    return one_line(f"{message.rstrip('.')} (see {where} --help)")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings on one line; those of torch and others are for developers and stay away."""
    if category.__module__.partition(".")[0] == "torchweld":
        print(f"torchweld: warning: {one_line(str(message))}", file=sys.stderr)
