"""A long program as a few translation units of about equal work, for compilers side by side.

before:  prelude, kernel 1 ... kernel 12                       one compiler, 5.1 s (SmolLM2, f32) on one of two cores
after:   prelude, kernels 1, 4, 5 ...  |  prelude, kernels 2, 3, 6 ...
why:     nearly all of the time goes into templates of the prelude for one stored format or kind of attention, about
         0.6 s each, as much as 12,000 to 20,000 characters of a kernel; the prelude itself takes 0.1 s
         So kernels that use the same templates go together: each unit compiles what it uses again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

# Loops over a whole weight or many keys; their first argument is a stored format.
_TEMPLATE: Final = re.compile(r"\btw_(?!group_bytes|packed_at)\w+<tw_[^;(]*>(?=\()")
_TEMPLATE_WORK: Final = 12_000  # characters of a kernel that take as long to compile as one template
_LEAST_WORK: Final = 60_000  # about 1.5 s: below, a second compiler and the linker gain nothing


def split_functions(texts: Sequence[str], most: int) -> list[list[str]]:
    """`texts`, functions that need nothing of each other, in at most `most` groups, each in the given order."""
    used = [frozenset(_TEMPLATE.findall(text)) for text in texts]
    everything = frozenset().union(*used)
    if most < 2 or sum(map(len, texts)) + _TEMPLATE_WORK * len(everything) < _LEAST_WORK:
        return [list(texts)]
    groups: list[list[int]] = [[] for _ in range(most)]
    lengths, templates = [0] * most, [frozenset[str]()] * most

    def work_with(group: int, number: int) -> int:
        return lengths[group] + len(texts[number]) + _TEMPLATE_WORK * len(templates[group] | used[number])

    # The greatest first: what comes last is small and evens out.
    for number in sorted(range(len(texts)), key=lambda n: -len(texts[n]) - _TEMPLATE_WORK * len(used[n])):
        group = min(range(most), key=lambda g: work_with(g, number))
        groups[group].append(number)
        lengths[group] += len(texts[number])
        templates[group] |= used[number]
    return [[texts[number] for number in sorted(group)] for group in groups if group]
