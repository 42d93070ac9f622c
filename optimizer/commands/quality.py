"""`torchweld explain MODEL --quality`: what each precision costs, against float64 on a text."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from torchweld.models.errors import ModelFileError
from torchweld.optimizer import measure_encoder as encoders
from torchweld.optimizer import measure_quality as languages
from torchweld.optimizer.commands.subject import Subject, Wish, capture_subject
from torchweld.optimizer.measure_quality import QualityError
from torchweld.optimizer.progress import show_share
from torchweld.optimizer.report_quality import QualityReport
from torchweld.optimizer.sample_text import NAME, TOKENS, english_text


def check_options(*, decode: bool, quality: bool, text: Path | None) -> None:
    """QualityError for options of `explain` that contradict each other."""
    if decode and quality:
        raise QualityError("--decode and --quality each replace the report; expected one of them")
    if text is not None and not quality:
        raise QualityError("--text is what --quality reads; expected --quality with it")


def explain_quality(subject: Subject, wish: Wish, text: Path | None = None) -> QualityReport:
    """Measure every precision on the first TOKENS tokens of a text file, or of the text that ships with the package.

    Raises ModelFileError for a model without a tokenizer, QualityError for one that cannot be measured.
    """
    loaded, name = subject.loaded, NAME if text is None else text.name
    content = english_text() if text is None else read_text(text)
    ids = _tokens(subject, content)
    program = capture_subject(subject)
    if wish.threads is not None:
        torch.set_num_threads(wish.threads)  # the reference's
    if loaded.kind == "encoder":
        with show_share("compare with float64", loaded.name, encoders.work_of(len(ids))) as advance:
            vectors = encoders.measure_encoder(
                loaded.module, program, ids, text=name, options=wish.options(), advance=advance
            )
        return QualityReport(loaded.name, vectors)
    with show_share("compare with float64", loaded.name, languages.work_of(len(ids))) as advance:
        found = languages.measure_language(program, ids, text=name, options=wish.options(), advance=advance)
    return QualityReport(loaded.name, found)


def read_text(path: Path) -> str:
    """A text file; QualityError where it is no UTF-8. OSError where it cannot be read."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise QualityError(f"{path} is no UTF-8 text (byte {error.start}); expected a text file") from None


def print_quality(report: QualityReport, console: Console, *, as_json: bool, as_markdown: bool) -> None:
    """Print to stdout: JSON, Markdown, or a table."""
    if as_json:
        print(report.to_json())
    elif as_markdown:
        print(report.to_markdown(), end="")
    else:
        report.render(console)


def _tokens(subject: Subject, text: str) -> Tensor:
    """int64 [S] of at most TOKENS tokens."""
    tokenizer = subject.loaded.tokenizer
    if tokenizer is None:
        raise ModelFileError(
            subject.loaded.name,
            "has no tokenizer, and precisions are compared on a text",
            "a GGUF file, or a folder with tokenizer.json",
        )
    return torch.tensor(tokenizer.encode(text)[:TOKENS])
