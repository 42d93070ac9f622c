"""The encoder of a decoding model: it runs once per source, and every step reads what it gave.

encoder = Encoder(step.encoder, options)
encoded = encoder.run({"input_ids": source}, batch=2)      # keys, values and masks of the cross attentions
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.decoding.greedy import DecodingError
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Compiled, Options, compile_program


@dataclass(frozen=True)
class Encoded:
    """What an encoder gave for `batch` sources; `by_source`: has this value an axis 0 of one entry per source?"""

    values: tuple[Tensor, ...] = ()
    by_source: tuple[bool, ...] = ()
    batch: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(value.nbytes for value in self.values)

    def part(self, first: int, last: int | None) -> list[Tensor]:
        """The values for sources `first` to `last`, contiguous."""
        whole = first == 0 and last in (None, self.batch)
        pairs = zip(self.values, self.by_source, strict=True)
        return [value[first:last] if cut and not whole else value for value, cut in pairs]


class Encoder:
    """A compiled encoder program (passes/split_encoder.py); `calls` counts how often it ran."""

    def __init__(self, program: Program, options: Options) -> None:
        self.program = program
        self.compiled: Compiled = compile_program(program, options=options)
        self.calls = 0
        outputs = [node.meta["val"] for node in program.graph.output_node().all_input_nodes]
        self._by_source = tuple(not isinstance(value.shape[0], int) for value in outputs)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what it reads."""
        return tuple(node.name for node in self.program.placeholders)

    def run(self, inputs: Mapping[str, object], batch: int) -> Encoded:
        """Encode `batch` sources. Raises DecodingError for inputs that the model does not take, or of another batch."""
        try:
            flat = self.program.flatten_inputs((), inputs)
            self.program.check_inputs(flat)
        except (TypeError, ValueError) as problem:
            raise DecodingError(f"the inputs of the encoder do not fit: {problem}") from problem
        values = []
        for value in self.compiled(*(tensor.contiguous() for tensor in flat if isinstance(tensor, Tensor))):
            assert isinstance(value, Tensor)
            # The executable may lend its own memory, which its next call writes again.
            values.append(value.detach().clone(memory_format=torch.contiguous_format))
        for value, cut in zip(values, self._by_source, strict=True):
            if cut and value.shape[0] != batch:
                raise DecodingError(f"{value.shape[0]} sources for {batch} prompts: expected one per prompt")
        self.calls += 1
        return Encoded(tuple(values), self._by_source, batch)
