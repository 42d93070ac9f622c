"""`torchweld bench`: the optimized model against torch eager with float32 weights."""

from __future__ import annotations

import torch
from rich.console import Console

from torchweld.optimizer.bench import interleave
from torchweld.optimizer.commands.baseline import decoded_model
from torchweld.optimizer.commands.subject import Wish, compile_subject, load_subject


def bench_model(spec: str, wish: Wish, rounds: int, console: Console, *, as_json: bool) -> None:
    """Time both on the same inputs and the same number of threads; print a table or JSON."""
    if wish.threads is not None:
        torch.set_num_threads(wish.threads)
    subject = load_subject(spec, wish)
    job = compile_subject(subject, wish)
    eager = decoded_model(subject.loaded.module)
    with torch.no_grad(), subject.phase("time"):
        result = interleave(lambda: job(*subject.inputs), lambda: eager(*subject.inputs), rounds=rounds)
    if as_json:
        print(result.to_json())
        return
    title = (
        f"{subject.loaded.name}, inputs {subject.sizes}, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    console.print(result.table(title).to_rich())
