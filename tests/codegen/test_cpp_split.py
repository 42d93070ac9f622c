"""A program in several units: every function once, in order, and what shares templates together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchweld.codegen.cpp_split import split_functions


def function(name: str, template: str, length: int) -> str:
    """A function that calls one template, of about `length` characters."""
    return f'extern "C" void {name}() {{ tw_packed_matmul<{template}>(a, b); }}'.ljust(length)


@given(
    lengths=st.lists(st.integers(100, 50_000), max_size=12),
    templates=st.lists(st.sampled_from(["tw_A", "tw_B", "tw_C"]), min_size=12, max_size=12),
    most=st.integers(1, 4),
)
def test_every_function_once_and_in_order(lengths: list[int], templates: list[str], most: int) -> None:
    texts = [function(f"f{n}", templates[n], length) for n, length in enumerate(lengths)]
    groups = split_functions(texts, most)
    assert sorted(text for group in groups for text in group) == sorted(texts)
    assert 1 <= len(groups) <= most
    assert all(group == [text for text in texts if text in group] for group in groups)


def test_what_uses_the_same_template_goes_together() -> None:
    texts = [function(f"f{n}", "tw_A" if n % 2 else "tw_B", 9_000) for n in range(8)]
    groups = split_functions(texts, 2)
    assert {frozenset(group) for group in groups} == {frozenset(texts[::2]), frozenset(texts[1::2])}


def test_a_short_program_is_one_unit() -> None:
    texts = [function(f"f{n}", "tw_A", 4_000) for n in range(8)]
    assert split_functions(texts, 2) == [texts]
    assert split_functions([], 2) == [[]]
