"""torchweld::rope against Hugging Face's rotary embeddings and against rotation of complex numbers."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from torchweld.graph.ops.rope import rope


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(length: int, size: int) -> Tensor:
    return torch.arange(length, dtype=torch.float64)[:, None] / 100 ** torch.linspace(
        0, 1, size // 2, dtype=torch.float64
    )


def test_equals_llama() -> None:
    q, k = draw(2, 4, 7, 8), draw(2, 2, 7, 8, seed=1)
    cos, sin = (torch.cat([part, part], -1)[None] for part in (angles(7, 8).cos(), angles(7, 8).sin()))
    expected_q, expected_k = llama_rotary(q, k, cos, sin)
    assert torch.equal(rope(q, cos[:, None], sin[:, None], False), expected_q)
    assert torch.equal(rope(k, cos[:, None], sin[:, None], False), expected_k)


def test_interleaved_equals_gptj() -> None:
    x = draw(2, 7, 4, 8)
    cos, sin = angles(7, 8).cos()[None], angles(7, 8).sin()[None]
    expected = gptj_rotary(x, sin, cos)
    doubled = [part.repeat_interleave(2, -1)[:, :, None] for part in (cos, sin)]
    assert torch.equal(rope(x, *doubled, True), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_is_a_rotation_of_complex_numbers(interleaved: bool) -> None:
    x, turn = draw(3, 5, 8), angles(5, 8)
    turned = rope(x, *_tables(turn, interleaved), interleaved)
    pairs = (lambda t: (t[..., ::2], t[..., 1::2])) if interleaved else (lambda t: (t[..., :4], t[..., 4:]))
    expected = torch.complex(*pairs(x)) * torch.polar(torch.ones_like(turn), turn)
    torch.testing.assert_close(torch.complex(*pairs(turned)), expected, rtol=1e-12, atol=1e-12)


def _tables(turn: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    spread = turn.repeat_interleave(2, -1) if interleaved else torch.cat([turn, turn], -1)
    return spread.cos(), spread.sin()


def test_features_behind_the_table_pass_through() -> None:
    x = draw(2, 5, 10)
    cos, sin = _tables(angles(5, 4), False)
    found = rope(x, cos, sin, False)
    assert torch.equal(found[..., 4:], x[..., 4:])
    assert torch.equal(found[..., :4], rope(x[..., :4].contiguous(), cos, sin, False))
    assert not torch.equal(found[..., :4], x[..., :4])


def test_promotes_as_torch_does() -> None:
    x = draw(2, 3, 4, dtype=torch.bfloat16)
    cos, sin = (part.float() for part in _tables(angles(3, 4), False))
    assert rope(x, cos, sin, False).dtype == torch.float32
    assert rope(x, cos.bfloat16(), sin.bfloat16(), False).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        ((2, 4), (2, 6), (2, 6), "cannot rotate 6 of 4"),
        ((2, 4), (2, 3), (2, 3), "cannot rotate 3 of 4"),
        ((2, 4), (2, 4), (2, 2), "cos has 4 features, sin has 2"),
        ((4,), (2, 4), (2, 4), "more axes than x"),
    ],
)
def test_bad_arguments_are_named(
    x: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rope(torch.zeros(x), torch.zeros(cos), torch.zeros(sin), False)


class Turn(nn.Module):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.ops.torchweld.rope(x, cos, sin, False)


def test_exports_with_symbolic_sizes() -> None:
    auto = torch.export.Dim.AUTO
    cos, sin = _tables(angles(5, 4), False)
    exported = torch.export.export(
        Turn(), (draw(2, 5, 6), cos, sin), dynamic_shapes=({0: auto, 1: auto}, {0: auto}, {0: auto})
    )
    other = (draw(3, 9, 6), *_tables(angles(9, 4), False))
    assert torch.equal(exported.module()(*other), Turn()(*other))


def test_passes_torch_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.torchweld.rope.default, (draw(2, 3, 6), *_tables(angles(3, 4), True), True)
    )
