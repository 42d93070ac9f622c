"""recognize_rope: the spellings of rotary embedding that models use."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.support import Case, draw, reasons
from torchweld.passes import CANONICALIZE, recognize_rope

PASSES = (*CANONICALIZE, recognize_rope)
ROPE = torch.ops.torchweld.rope.default


def halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def crossed(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :4], sin[..., :4]
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def partial(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    head, rest = x[..., :4], x[..., 4:]
    return torch.cat((head * cos[..., :4] + halves(head) * sin[..., :4], rest), -1)


@pytest.mark.parametrize(
    ("function", "interleaved"),
    [
        (lambda m, x, c, s: x * c + halves(x) * s, False),
        (lambda m, x, c, s: s * chunks(x) + c * x, False),
        (lambda m, x, c, s: x * c + pairs(x) * s, True),
        (crossed, False),
        (partial, False),
    ],
)
def test_fires(function: Callable[..., Any], interleaved: bool) -> None:
    case = Case(function, draw(2, 3, 5, 8), draw(5, 8, seed=1), draw(5, 8, seed=2))
    outcome = case.run(*PASSES)[-1]
    assert outcome.applied >= 1 and not outcome.refused
    node = case.only(ROPE)
    assert node.args[0] is case.program.placeholders[0] and node.args[3] is interleaved
    case.assert_same_numbers()
    case.assert_same_numbers(draw(1, 3, 2, 8), draw(2, 8, seed=1), draw(2, 8, seed=2))


def test_half_precision_with_float32_tables() -> None:
    def function(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return (x * cos + halves(x) * sin).to(x.dtype)

    inputs = draw(2, 3, 5, 8, dtype=torch.bfloat16), draw(5, 8, seed=1).float(), draw(5, 8, seed=2).float()
    case = Case(function, *inputs)
    case.run(*PASSES)
    assert case.only(ROPE).meta["val"].dtype == torch.float32
    case.assert_same_numbers()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda m, x, c, s: x.relu() * c + halves(x) * s,
            "the rotated tensor is not the one that is multiplied by cos",
        ),
        (
            lambda m, x, c, s: x[:1] * c[:, None, None] + halves(x[:1]) * s[:, None, None],
            "cos or sin widen x",
        ),
        (
            lambda m, x, c, s: x * c[..., :1] + halves(x) * s[..., :1],
            "cos and sin do not have one entry per rotated feature",
        ),
        (
            lambda m, x, c, s: torch.cat(
                (x[..., :4] * c[..., :4] + halves(x[..., :4]) * s[..., :4], c[..., 4:].expand(2, 3, 5, 4)), -1
            ),
            None,
        ),
        (
            lambda m, x, c, s: torch.cat(
                (x[..., :4] * c[..., :4] + halves(x[..., :4]) * s[..., :4], x[..., 2:]), -1
            ),
            "what is joined to the rotated features is not the rest of the same tensor",
        ),
    ],
)
def test_refuses(function: Callable[..., Any], reason: str | None) -> None:
    case = Case(function, draw(2, 3, 5, 8), draw(5, 8, seed=1), draw(5, 8, seed=2), dynamic=False)
    outcome = case.run(*PASSES)[-1]
    assert reasons(outcome) == ([reason] if reason else [])
    case.assert_same_numbers()


@pytest.mark.parametrize(
    "turn",
    [
        lambda x: torch.cat((x[..., 4:], -x[..., :4]), -1),  # turns the other way
        lambda x: torch.cat((-x[..., 5:], x[..., :5]), -1),  # not the halves
        lambda x: torch.cat((-x[..., 4:], x[..., 4:]), -1),
        lambda x: torch.cat((-x[..., 4:], x.relu()[..., :4]), -1),
        lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2),
    ],
)
def test_is_not_fooled(turn: Callable[[Tensor], Tensor]) -> None:
    case = Case(
        lambda m, x, c, s: x * c + turn(x) * s, draw(2, 3, 5, 8), draw(5, 8, seed=1), draw(5, 8, seed=2)
    )
    assert case.run(*PASSES)[-1].matched == 0
    case.assert_same_numbers()


def test_crossed_halves_must_be_the_halves_of_one_tensor() -> None:
    def function(m: Any, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        c, s = c[..., :4], s[..., :4]
        x2, x1 = x.chunk(2, -1)
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)

    case = Case(function, draw(2, 3, 5, 8), draw(5, 8, seed=1), draw(5, 8, seed=2))
    outcome = case.run(*PASSES)[-1]
    assert reasons(outcome) == ["the rotated pieces are not the two halves of one tensor"]
    case.assert_same_numbers()
