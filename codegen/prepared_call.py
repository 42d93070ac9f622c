"""A call of an executable whose inputs stay where they are: only the values in them change.

call = executable.prepare(ids, *caches)        # checked, bound and placed once
call()                                         # the results for what is in `ids` and `caches` now

A step of decoding is such a call; looking at its hundred tensors anew took as long as its smallest kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.codegen.binding import Binding
from torchweld.codegen.plan import ValueSpec


@dataclass(frozen=True)
class FreshOutput:
    """Results that are a new tensor at every call: their numbers, their place in the table of pointers, what they are.

    There are several numbers where an output is given twice.
    """

    numbers: tuple[int, ...]
    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class PreparedCall:
    """Made by `Executable.prepare`; shapes, addresses and types of `inputs` must not change any more."""

    run: Callable[[PreparedCall], tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]
    """Places in the table of pointers, and addresses: of the inputs and of results without elements."""
    binding: Binding
    results: tuple[Tensor | None, ...]
    """Those that are the same at every call: inputs, and tensors without elements."""
    fresh: tuple[FreshOutput, ...]

    def __call__(self) -> tuple[Tensor, ...]:
        """The results, as those of the executable called with the inputs. Raises IndexError as that does."""
        return self.run(self)


def prepare_outputs(
    specs: Sequence[ValueSpec],
    shapes: Sequence[tuple[int, ...]],
    outputs: Sequence[tuple[str, int | None]],
    inputs: Sequence[Tensor],
    slots: Mapping[str, int],
) -> tuple[tuple[Tensor | None, ...], tuple[FreshOutput, ...], list[tuple[int, int]]]:
    """The lasting results, the fresh ones, and the places of lasting ones that launches compute.

    specs, shapes: of what launches compute for the caller.  outputs: name, and the number of the input that it is.
    """
    results: list[Tensor | None] = [None if at is None else inputs[at] for _, at in outputs]
    fresh, places = [], []
    for spec, shape in zip(specs, shapes, strict=True):
        numbers = tuple(n for n, (name, at) in enumerate(outputs) if at is None and name == spec.name)
        if 0 not in shape:
            fresh.append(FreshOutput(numbers, slots[spec.name], shape, spec.dtype))
            continue
        nothing = torch.empty(shape, dtype=spec.dtype)
        places.append((slots[spec.name], nothing.data_ptr()))
        for number in numbers:
            results[number] = nothing
    return tuple(results), tuple(fresh), places
