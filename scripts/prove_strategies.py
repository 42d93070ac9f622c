"""Prove on real models that every decoding strategy gives plain greedy decoding's text, bit for bit in logits.

    python -m scripts.prove_strategies [--model smollm2] [--prompts 20] [--tokens 256] [--every-layout] [--quick]

Prompts of many kinds (tests/decoding/prompts.txt) take the layouts of the cache in turn, with --every-layout all of
them each: memory that grows or is there up front, rings of several sizes that turn. Exits with 1 at the first
difference, and says where and how large it is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from rich.console import Console
from rich.table import Table

from scripts.strategy_proof import (
    STRATEGIES,
    Case,
    NotEqual,
    Proved,
    Subject,
    cases,
    prove,
    prove_batch,
    read_prompts,
)

MODELS: Final = ("smollm2", "gemma3")
QUICK_PROMPTS: Final = 5
QUICK_TOKENS: Final = 16


def prove_all(
    subject: Subject, all_cases: Sequence[Case], strategies: Sequence[str] = STRATEGIES
) -> Iterator[Proved]:
    """Every strategy on every case, then the batch of every layout. Raises NotEqual."""
    for case in all_cases:
        plain = subject.plain(case)
        for name in strategies:
            yield prove(subject, name, case, plain)
    by_layout = sorted(all_cases, key=lambda case: case.layout.name)
    for _, group in groupby(by_layout, key=lambda case: case.layout.name):
        yield prove_batch(subject, list(group))


def table_of(name: str, results: Sequence[Proved]) -> Table:
    """A row per strategy, its layouts and what was compared."""
    table = Table(title=f"{name}: equal to plain greedy decoding", title_justify="left", box=None)
    for column in (
        "strategy",
        "texts",
        "tokens",
        "passes",
        "guesses",
        "accepted",
        "rows compared",
        "seconds",
    ):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for strategy in (*STRATEGIES, "batch"):
        rows = [result for result in results if result.strategy == strategy]
        sums = [
            sum(getattr(row, field) for row in rows)
            for field in ("tokens", "passes", "drafted", "accepted", "compared")
        ]
        table.add_row(strategy, f"{len(rows)}", *map(str, sums), f"{sum(row.seconds for row in rows):.0f}")
    return table


def run_model(name: str, prompts: int, tokens: int, every_layout: bool, console: Console) -> None:
    """Prove one model and print its table. Raises NotEqual."""
    begin = time.perf_counter()
    subject = Subject(name)
    all_cases = cases(subject, read_prompts()[:prompts], tokens, every_layout=every_layout)
    layouts = ", ".join(dict.fromkeys(case.layout.name for case in all_cases))
    console.print(f"{name}: {len(all_cases)} texts of {tokens} new tokens; caches: {layouts}")
    results: list[Proved] = []
    for result in prove_all(subject, all_cases):
        results.append(result)
        if result.strategy == STRATEGIES[-1]:
            number = len(results) // len(STRATEGIES)
            spent = time.perf_counter() - begin
            console.print(
                f"  {number:3d} of {len(all_cases)}  {all_cases[number - 1].kind:12} {spent:6.0f} s"
            )
    console.print(table_of(name, results))
    console.print(f"{name}: no difference, {time.perf_counter() - begin:.0f} s\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="one of them; both without it")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--every-layout", action="store_true", help="every prompt with every layout of the cache"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_PROMPTS} prompts, {QUICK_TOKENS} tokens"
    )
    given = parser.parse_args(arguments)
    prompts, tokens = (QUICK_PROMPTS, QUICK_TOKENS) if given.quick else (given.prompts, given.tokens)
    console = Console(width=max(Console().width, 100))
    try:
        for name in given.model or MODELS:
            run_model(name, prompts, tokens, given.every_layout, console)
    except NotEqual as difference:
        print(f"DIFFERENT: {difference}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
