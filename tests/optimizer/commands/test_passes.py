"""`torchweld passes`: docstrings taken apart, and every pass of the pipeline has its five lines."""

import types

import pytest

from torchweld.optimizer.commands.passes import describe
from torchweld.optimizer.pipeline import pass_names, pipeline

DOCSTRING = """Do one thing
to another.

before:  a = f(x)
         b = g(a)
after:   b = h(x)
why:     one launch
legal:   always
source:  nobody
"""


def make_pass(docstring: str) -> types.ModuleType:
    module = types.ModuleType("fuse_example", docstring)
    module.NAME, module.EXACTNESS = "fuse_example", "exact"  # type: ignore[attr-defined]
    return module


def test_the_five_lines_are_found() -> None:
    card = describe(make_pass(DOCSTRING))
    assert (card.name, card.exactness, card.summary) == ("fuse_example", "exact", "Do one thing to another.")
    assert card.before == "a = f(x)\nb = g(a)"
    assert (card.after, card.why, card.legal, card.source) == ("b = h(x)", "one launch", "always", "nobody")


@pytest.mark.parametrize("line", ["before", "after", "why", "legal", "source"])
def test_a_missing_line_is_named(line: str) -> None:
    with pytest.raises(ValueError, match=f"fuse_example: its docstring has no line '{line}'"):
        describe(make_pass(DOCSTRING.replace(f"{line}:", f"{line}")))


@pytest.mark.parametrize("pass_", {pass_.NAME: pass_ for pass_ in pipeline()}.values(), ids=pass_names())
def test_every_pass_of_the_pipeline_describes_itself(pass_: types.ModuleType) -> None:
    card = describe(pass_)
    assert card.exactness in ("exact", "reassoc", "lossy")
    assert pass_.__name__.endswith("." + card.name)
