"""How a model decodes: the state of every layer, how its mask was proved, and the kernels of a step.

`torchweld explain MODEL --decode` prints it; `DecodeReport.to_json` is for programs. The numbers are those of the
step graph that was derived and compiled, not of the model's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from torchweld.optimizer.ledger import Fallback
from torchweld.optimizer.report_tables import Column, Table, fallback_table
from torchweld.passes.step_program import LayerState

SCHEMA = 1
"""Version of the JSON: grows when a key changes its meaning or goes away."""


@dataclass(frozen=True)
class StateRecord:
    """What one attention keeps (several layers may read one state), a convolution, a running value, a carry of a scan.

    kind: "causal" keeps every position, all others the last `window`. value_features is 0 where there are no keys and
    values but rows of key_features alone.  mask_proof: how it is known what is read. bytes_per_token: of one sequence.
    """

    layer: int
    kind: str
    window: int
    heads: int
    key_features: int
    value_features: int
    dtype: str
    bytes_per_token: int
    mask_proof: str

    @staticmethod
    def of(layer: int, state: LayerState) -> StateRecord:
        """The record of a derived state."""
        return StateRecord(
            layer, state.kind, state.window, state.heads, state.key_features, state.value_features,
            str(state.dtype).removeprefix("torch."), state.bytes_per_token, state.mask_proof,
        )  # fmt: skip


@dataclass(frozen=True)
class DecodeReport:
    """A derived step, or why there is none (`refusal`: reason, node, op and the user's source line).

    kernels_per_layer: launches of the busiest layer in one step. limit: positions that the model allows, None for any.
    crosses: keys and values of an encoder, kind "cross"; their bytes are those of one position of the source.
    """

    model: str
    layers: tuple[StateRecord, ...] = ()
    kernels_per_layer: int = 0
    launches: int = 0
    fallbacks: tuple[Fallback, ...] = ()
    limit: int | None = None
    refusal: str | None = None
    crosses: tuple[StateRecord, ...] = ()

    @property
    def decodes(self) -> bool:
        """Was a step derived?"""
        return self.refusal is None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more position takes while no window is full, of one sequence."""
        return sum(layer.bytes_per_token for layer in self.layers)

    def cache_bytes(self, positions: int) -> int:
        """The least bytes that hold what `positions` positions of one sequence leave visible."""
        return sum(
            layer.bytes_per_token * (min(positions, layer.window) if layer.window else positions)
            for layer in self.layers
        )

    def kinds(self) -> str:
        """`26 layers: 22 window 512, 4 causal`."""
        names = [kind for _, kind in dict.fromkeys((layer.layer, _kind(layer)) for layer in self.layers)]
        counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
        return f"{len(names)} layers: {counts}"

    def summary(self) -> tuple[tuple[str, str], ...]:
        """The headline figures as (label, text)."""
        if self.refusal is not None:
            return (("does not decode", self.refusal),)
        positions = 4096 if self.limit is None else min(self.limit, 4096)
        return (
            ("decodes", self.kinds()),
            ("kernels per layer", str(self.kernels_per_layer)),
            ("launches per step", str(self.launches)),
            ("eager fallbacks", str(len(self.fallbacks))),
            (
                "cache",
                f"{self.bytes_per_token} bytes per token, {_size(self.cache_bytes(positions))} at {positions}",
            ),
            *self._encoder(),
            ("positions", "no limit" if self.limit is None else f"at most {self.limit}"),
        )

    def _encoder(self) -> tuple[tuple[str, str], ...]:
        """What is kept of the encoder, if there is one."""
        if not self.crosses:
            return ()
        size = sum(cross.bytes_per_token for cross in self.crosses)
        return (
            ("encoder", f"{len(self.crosses)} cross attentions, {size} bytes per position of the source"),
        )

    def tables(self) -> tuple[Table, ...]:
        """The tables that have something to say."""
        cross = state_table(self.crosses, "Encoder: keys and values (per source position)")
        tables = state_table(self.layers), cross, proof_table(self.layers), fallback_table(self.fallbacks)
        return tuple(table for table in tables if table.rows)

    def to_json(self) -> str:
        """Indented JSON with stable keys."""
        content = {
            "schema": SCHEMA,
            "model": self.model,
            "decodes": self.decodes,
            "refusal": self.refusal,
            "limit": self.limit,
            "kernels_per_layer": self.kernels_per_layer,
            "launches": self.launches,
            "eager_fallbacks": len(self.fallbacks),
            "bytes_per_token": self.bytes_per_token,
            "layers": [vars(layer) for layer in self.layers],
            "crosses": [vars(cross) for cross in self.crosses],
            "fallbacks": [vars(fallback) for fallback in self.fallbacks],
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """Headline figures and every table as Markdown."""
        lines = [f"# {self.model}, decoding", ""]
        lines += [f"* {label}: {text}" for label, text in self.summary()]
        for table in self.tables():
            lines += ["", table.to_markdown()]
        return "\n".join(lines) + "\n"

    def render(self, console: Console) -> None:
        """Print the report to a terminal."""
        console.print(f"{self.model}, decoding with a derived cache", style="bold", markup=False)
        for label, text in self.summary():
            console.print(f"  {label:<18} {text}", markup=False, highlight=False, soft_wrap=True)
        for table in self.tables():
            console.print()
            console.print(table.to_rich())


def state_table(layers: Sequence[StateRecord], title: str = "State per layer (of one sequence)") -> Table:
    """One line per kind of state; equal layers stand together."""
    columns = (
        Column("layers", "left", wide=True), Column("state", "left"), Column("heads"), Column("key"), Column("value"),
        Column("type", "left"), Column("bytes per token"),
    )  # fmt: skip
    rows = tuple(
        (
            _ranges(numbers), _kind(layer), str(layer.heads), str(layer.key_features), str(layer.value_features),
            layer.dtype, str(layer.bytes_per_token),
        )
        for layer, numbers in _alike([replace(layer, mask_proof="") for layer in layers]).items()
    )  # fmt: skip
    return Table(title, columns, rows)


def proof_table(layers: Sequence[StateRecord]) -> Table:
    """How the mask of every layer was proved; a table of its own, because proofs are long."""
    alike: dict[str, list[int]] = {}
    for layer in layers:
        alike.setdefault(layer.mask_proof, []).append(layer.layer)
    columns = Column("layers", "left", wide=True), Column("how it is known what is read", "left", wide=True)
    return Table("Masks", columns, tuple((_ranges(numbers), proof) for proof, numbers in alike.items()))


def _alike(layers: Sequence[StateRecord]) -> dict[StateRecord, list[int]]:
    """The numbers of equal layers, by the first of them."""
    numbers: dict[StateRecord, list[int]] = {}
    for layer in layers:
        numbers.setdefault(replace(layer, layer=0), []).append(layer.layer)
    return numbers


def _kind(layer: StateRecord) -> str:
    if layer.kind == "convolution":
        return f"convolution of {layer.window}"
    return f"window {layer.window}" if layer.kind == "window" else layer.kind


def _ranges(numbers: Sequence[int]) -> str:
    """`0-4, 6-10` for ascending numbers."""
    runs: list[list[int]] = []
    for number in dict.fromkeys(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
