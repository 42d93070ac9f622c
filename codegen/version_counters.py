"""Which tensors count their changes together: views of one tensor do, and the weights of one model file.

A tensor's counter (`_version`) grows with every change in place of any tensor that shares it. Reading one costs little,
but those of two hundred weights lie in as many places that are in no cache after a pass over the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, call

import torch
from torch import Tensor

version_of = attrgetter("_version")


def one_of_each_counter(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of all tensors that share a counter, one (none of inference mode: those have no counter).

    Every counter is set to the number of a tensor, read through each, and set back. All of that happens inside one call
    of the interpreter, in which no other Python thread runs.
    """
    before: list[int] = []
    found: list[int] = []
    set_versions: Callable[..., object] = torch._C._autograd._unsafe_set_version_counter
    steps: tuple[Callable[[], object], ...] = (
        partial(before.extend, map(version_of, tensors)),
        partial(set_versions, tensors, range(len(tensors))),
        partial(found.extend, map(version_of, tensors)),
        partial(set_versions, tensors, before),
    )
    list(map(call, steps))
    return [tensors[number] for number in dict.fromkeys(found)]
