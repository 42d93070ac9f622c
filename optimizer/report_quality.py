"""What each precision costs: a model's results against its float64 reference on a text.

`torchweld explain MODEL --quality` prints it; `QualityReport.to_json` is for programs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rich.console import Console

from torchweld.optimizer.report import finite
from torchweld.optimizer.report_tables import Column, Table

SCHEMA = 1
"""Version of the JSON: grows when a key changes its meaning or goes away."""


@dataclass(frozen=True)
class LanguageQuality:
    """Next-token distributions of one precision, with `rows` rows per call at most.

    kl_mean, kl_max: KL(reference || ours) of a position, in nats.  top1: share of positions where both find the same
    token the likeliest.  perplexity: of the text, exp(mean negative log-likelihood of the token that comes next).
    """

    precision: str
    rows: int
    kl_mean: float
    kl_max: float
    top1: float
    perplexity: float
    reference_perplexity: float
    tokens: int
    text: str


@dataclass(frozen=True)
class EncoderQuality:
    """Output vectors of one precision, with `rows` rows (tokens) per call.

    relative_error: length of the difference over the length of the reference, of each vector.  vectors: how many.
    """

    precision: str
    rows: int
    relative_error_mean: float
    relative_error_max: float
    cosine_mean: float
    cosine_min: float
    vectors: int
    tokens: int
    text: str


Quality = LanguageQuality | EncoderQuality


@dataclass(frozen=True)
class QualityReport:
    """One row per precision and number of rows in a call; all rows are of one kind."""

    model: str
    quality: tuple[Quality, ...]

    def table(self) -> Table:
        """For people."""
        first = self.quality[0]
        title = f"{self.model} against float64, {first.tokens} tokens of {first.text}"
        if isinstance(first, LanguageQuality):
            title += f"; perplexity of float64: {first.reference_perplexity:.4f}"
        cells = [_cells(quality) for quality in self.quality]
        columns = (Column("precision", "left"), *(Column(heading) for heading in list(cells[0])[1:]))
        return Table(title, columns, tuple(tuple(row.values()) for row in cells))

    def to_json(self) -> str:
        """Indented JSON with stable keys; what is not finite as strings."""
        content = {
            "schema": SCHEMA,
            "model": self.model,
            "quality": [asdict(quality) for quality in self.quality],
        }
        return json.dumps(finite(content), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """The table as Markdown."""
        return self.table().to_markdown() + "\n"

    def render(self, console: Console) -> None:
        """Print the table to a terminal."""
        console.print(self.table().to_rich())


def _cells(quality: Quality) -> Mapping[str, str]:
    """Heading -> cell."""
    common = {"precision": quality.precision, "rows per call": str(quality.rows)}
    if isinstance(quality, LanguageQuality):
        return common | {
            "KL mean (nats/token)": f"{quality.kl_mean:.1e}",
            "KL max": f"{quality.kl_max:.1e}",
            "top-1 equal": f"{quality.top1:.2%}",
            "perplexity": f"{quality.perplexity:.4f}",
        }
    return common | {
        "relative error mean": f"{quality.relative_error_mean:.1e}",
        "max": f"{quality.relative_error_max:.1e}",
        "1 - cosine mean": f"{1.0 - quality.cosine_mean:.1e}",
        "1 - cosine max": f"{1.0 - quality.cosine_min:.1e}",
        "vectors": str(quality.vectors),
    }
