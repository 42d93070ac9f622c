"""What is asked of a model.

    Workload("smollm2", "decode", 1, 128).name        # "tg128"

prefill: a prompt of `length` tokens into an empty cache, logits of its last token. decode: `length` tokens one at a
time behind `past` cached ones (llama-bench: 0), logits of each, no sampling. verify: `length` tokens at once behind
`past`, logits of each. encode: `batch` sentences of `length` tokens to unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

Kind = Literal["prefill", "decode", "verify", "encode"]
SHORT: Final = MappingProxyType({"prefill": "pp", "decode": "tg", "verify": "vf"})


@dataclass(frozen=True)
class Workload:
    """One thing to time. `name` is what llama-bench prints (pp512, tg128, at depth: tg128@d1024), or 8x128."""

    model: str
    kind: Kind
    batch: int
    length: int
    past: int = 0

    @property
    def name(self) -> str:
        """As in the tables."""
        if self.kind == "encode":
            return f"{self.batch}x{self.length}"
        name = f"{SHORT[self.kind]}{self.length}"
        name += f"@d{self.past}" if self.past else ""
        return name + (f"x{self.batch}" if self.batch > 1 else "")

    @property
    def unit(self) -> str:
        """Of the rows: tokens per second (more is better), or milliseconds per call."""
        return "ms" if self.kind == "encode" else "tok/s"

    def in_unit(self, seconds: float) -> float:
        """One run of `seconds` in the unit of the rows."""
        return seconds * 1e3 if self.kind == "encode" else self.batch * self.length / seconds

    def seconds(self, value: float) -> float:
        """The seconds of one run behind a value in the unit of the rows."""
        return value / 1e3 if self.kind == "encode" else self.batch * self.length / value
