"""canonicalize_einsum: every pairwise contraction is one product, with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.support import Case, aten, draw, reasons
from torchweld.passes import CANONICALIZE, canonicalize_einsum, canonicalize_views

SIZES = {letter: size for size, letter in enumerate("abcdefgh", start=2)}


def spelled(equation: str, *shapes: Sequence[int], dynamic: bool = False) -> Case:
    tensors = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    return Case(lambda m, *parts: torch.einsum(equation, *parts), *tensors, dynamic=dynamic)


@pytest.mark.parametrize(
    ("equation", "target"),
    [
        ("bqhd,bkhd->bhqk", aten.matmul.default),
        ("bhgqd,bhkd->bhgqk", aten.matmul.default),
        ("bhqk,bkhd->bqhd", aten.matmul.default),
        ("btc,chd->bthd", aten.matmul.default),
        ("bthd,hde->bte", aten.matmul.default),
        ("ab,b->a", aten.matmul.default),
        ("bhd,g->bhgd", aten.mul.Tensor),
        ("ab,ab->ba", aten.mul.Tensor),
        ("abc->cab", aten.permute.default),
    ],
)
def test_fires(equation: str, target: object) -> None:
    names = equation.partition("->")[0].split(",")
    sizes = {letter: size for size, letter in enumerate(sorted(set("".join(names))), start=2)}
    case = spelled(equation, *([sizes[letter] for letter in name] for name in names))
    (outcome,) = case.run(canonicalize_einsum)
    assert (outcome.applied, outcome.refused) == (1, ())
    assert case.count(target) >= 1 and case.count(aten.einsum.default) == 0
    case.assert_same_numbers(exact=False)


@settings(max_examples=40)
@given(st.data())
def test_any_contraction(data: st.DataObject) -> None:
    """Letters in any order, on both sides or one, summed or kept: spelled as a product or refused, never wrong."""
    left, right = (data.draw(st.permutations("abcde").map(lambda x: "".join(x[:3]))) for _ in range(2))
    kept = [
        letter
        for letter in sorted(set(left + right))
        if letter not in left + right or data.draw(st.booleans())
    ]
    result = "".join(data.draw(st.permutations(kept)))
    shapes = [[SIZES[letter] for letter in name] for name in (left, right)]
    case = spelled(f"{left},{right}->{result}", *shapes)
    (outcome,) = case.run(canonicalize_einsum)
    if (
        all(letter in result for letter in set(left) ^ set(right))
        and set(left) - set(right)
        and len(result) > 3
    ):
        assert outcome.applied == 1  # both have an axis of their own
    case.assert_same_numbers(exact=False)


def test_symbolic_sizes() -> None:
    case = Case(lambda m, x: torch.einsum("btc,chd->bthd", x, m.w), draw(2, 5, 4), w=draw(4, 2, 3, seed=1))
    case.run(*CANONICALIZE)
    assert case.count(aten.linear.default) == 1 and case.count(aten.einsum.default) == 0
    case.assert_same_numbers(exact=False)
    case.assert_same_numbers(draw(3, 7, 4, seed=2), exact=False)


@pytest.mark.parametrize(
    ("equation", "shapes", "reason"),
    [
        ("ab,bc", [(2, 3), (3, 4)], "the equation has no arrow"),
        ("...b,bc->...c", [(2, 3), (3, 4)], "more than letters"),
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)], "more than two operands"),
        ("aa,ab->b", [(3, 3), (3, 4)], "a letter stands twice in one operand"),
        ("ab,bc->ac", [(2, 1), (3, 4)], "for two sizes"),
        ("ab,bc->c", [(2, 3), (3, 4)], "a letter is summed in one operand"),
        ("ab->a", [(2, 3)], "a letter is summed in one operand"),
    ],
)
def test_refuses(equation: str, shapes: Any, reason: str) -> None:
    case = spelled(equation, *shapes)
    (*_, outcome) = case.run(canonicalize_views, canonicalize_einsum)
    assert outcome.applied == 0 and reason in reasons(outcome)[0]
    case.assert_same_numbers(exact=False)
