"""Lines of a Triton function: indentation, fresh names, and one name per distinct expression (value numbering)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torchweld.codegen.triton_text import Names, Value

_INDENT = "    "


@dataclass
class Writer:
    """The body of one function.

    `known` maps an expression's text to the variable that holds it; a variable made inside a block is forgotten when
    the block ends.  Text names variables, and variables that are reassigned are never part of a known text.
    """

    names: Names
    lines: list[str] = field(default_factory=list)
    known: list[dict[str, Value]] = field(default_factory=lambda: [{}])
    helpers: dict[str, None] = field(default_factory=dict)

    def line(self, text: str) -> None:
        """Write one line in the current block."""
        self.lines.append(text)

    def let(self, hint: str, value: Value) -> Value:
        """A variable that holds `value`; the one that does already, if there is one.

        The variable spans the dimensions of `value`: equal text may stand for tiles of other axes, with other masks.
        """
        if value.text.isidentifier():
            return value
        for scope in reversed(self.known):
            if value.text in scope:
                return Value(scope[value.text].text, value.dims)
        variable = Value(self.names.fresh(hint), value.dims)
        self.line(f"{variable.text} = {value.text}")
        self.known[-1][value.text] = variable
        return variable

    def assign(self, hint: str, value: Value) -> Value:
        """A fresh variable that may be assigned again."""
        variable = Value(self.names.fresh(hint), value.dims)
        self.line(f"{variable.text} = {value.text}")
        return variable

    @contextmanager
    def captured(self) -> Iterator[list[str]]:
        """Collect what is written inside in a list of its own (for a block whose head depends on its body)."""
        outer, self.lines = self.lines, []
        self.known.append({})
        try:
            yield self.lines
        finally:
            self.lines = outer
            self.known.pop()

    def block(self, head: str, body: list[str]) -> None:
        """A compound statement."""
        self.line(head)
        self.lines += [_INDENT + text if text else text for text in body or ["pass"]]
