"""Which input of a program is the sequence of tokens, and which belong to an encoder.

find_tokens(program)            # the inputs that may be the sequence
check_tokens(node, others)      # why one is not: expected is [batch, sequence, ...] with a length of its own
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from torch import fx

from torchweld.graph.match import is_tensor, shape_of
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal


def read_inputs(program: Program) -> list[fx.Node]:
    """The tensor inputs that the graph reads."""
    return [node for node in program.placeholders if is_tensor(node) and node.users]


def find_tokens(program: Program, name: str | None = None) -> list[fx.Node] | Refusal:
    """The inputs that may be the sequence: the only one, the one called `name`, or all that have a length of their
    own."""
    read = read_inputs(program)
    names = ", ".join(node.name for node in read) or "none"
    if name is not None:
        named = [node for node in read if node.name == name]
        return named or Refusal(f"there is no input {name!r} that the graph reads; it reads {names}", None)
    if len(read) == 1:
        return read
    able = [node for node in read if not isinstance(check_tokens(node, set(read) - {node}), Refusal)]
    blamed = read[-1] if read else None
    return able or Refusal(f"one tensor input, the tokens, is expected; the graph reads {names}", blamed)


def check_tokens(tokens: fx.Node, others: Iterable[fx.Node] = ()) -> fx.Node | Refusal:
    """`tokens`, if it is [batch, sequence, ...] with a sequence that varies and that none of `others` has."""
    shape = shape_of(tokens)
    if len(shape) < 2 or not isinstance(shape[1], sympy.Symbol):
        given = ", ".join(map(str, shape))
        expected = f"the sequence must be axis 1 of {tokens.name} and vary: capture it as dynamic"
        return Refusal(f"{expected}; its shape is [{given}]", tokens)
    if not isinstance(shape[0], sympy.Symbol) and shape[0] != 1:
        reason = f"the batch of {tokens.name} is fixed at {shape[0]}: a step runs all rows as a batch of 1"
        return Refusal(reason, tokens)
    for other in others:
        if any(shape[1] in sympy.sympify(size).free_symbols for size in shape_of(other)):
            reason = f"one tensor input, the tokens, is expected; {other.name} is as long as {tokens.name}"
            return Refusal(f"{reason} (if that is chance: capture with examples of different lengths)", other)
    return tokens
