"""Causal convolutions by one name: every spelling, every reason why not, and the numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.support import check_metas
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import PassOutcome, run_pass
from torchweld.graph.sequence_states import CONVOLUTION
from torchweld.passes import CANONICALIZE, recognize_convolution

CHANNELS = 6
Body = Callable[[Tensor, Tensor], Tensor]


class Convolving(nn.Module):
    """x [B, S, 6] through `body(x transposed, weight [O, I, K])`."""

    def __init__(self, body: Body, inputs: int = CHANNELS, taps: int = 3) -> None:
        super().__init__()
        self.body = body
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(CHANNELS, inputs, taps, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(1, 2), self.weight)


def recognised(model: nn.Module) -> tuple[Program, PassOutcome]:
    program = capture(model, (torch.randn(2, 7, CHANNELS),), verify=False)
    for pass_ in CANONICALIZE:
        run_pass(program.graph_module, pass_)
    return program, run_pass(program.graph_module, recognize_convolution)


def padded_before_transpose(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.transpose(1, 2), (0, 0, 2, 0)).transpose(1, 2), weight)


SPELLINGS: dict[str, Body] = {
    "pad": lambda x, w: F.conv1d(F.pad(x, (2, 0)), w),
    "constant pad": lambda x, w: F.conv1d(nn.ConstantPad1d((2, 0), 0.0)(x), w),
    "padding and slice": lambda x, w: F.conv1d(x, w, padding=2)[..., : x.shape[-1]],
    "padding and slice from the end": lambda x, w: F.conv1d(x, w, padding=2)[..., :-2],
    "half and half": lambda x, w: F.conv1d(F.pad(x, (1, 0)), w, padding=1)[..., : x.shape[-1]],
    "pad before the transpose": padded_before_transpose,
    "dilated": lambda x, w: F.conv1d(F.pad(x, (6, 0)), w, dilation=3),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_op(name: str) -> None:
    model = Convolving(SPELLINGS[name])
    program, outcome = recognised(model)
    assert (outcome.applied, outcome.refused) == (1, ())
    (node,) = program.graph.find_nodes(op="call_function", target=CONVOLUTION)
    assert node.args[3:] == (3 if name == "dilated" else 1, 1)
    names = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in names if "conv1d" in name or "pad" in name]
    x = torch.randn(3, 5, CHANNELS)
    torch.testing.assert_close(program.run(x), model(x))
    check_metas(program.graph_module, [x])
    assert run_pass(program.graph_module, recognize_convolution).applied == 0, "idempotent"


@settings(max_examples=25, deadline=None)
@given(
    taps=st.integers(1, 5), dilation=st.integers(1, 3), groups=st.sampled_from([1, 2, 3, 6]),
    sliced=st.booleans(), length=st.integers(2, 9),
)  # fmt: skip
def test_any_kernel_keeps_the_numbers(
    taps: int, dilation: int, groups: int, sliced: bool, length: int
) -> None:
    behind = (taps - 1) * dilation

    def body(x: Tensor, weight: Tensor) -> Tensor:
        if sliced:
            return F.conv1d(x, weight, None, 1, behind, dilation, groups)[..., : x.shape[-1]]
        return F.conv1d(F.pad(x, (behind, 0)), weight, dilation=dilation, groups=groups)

    model = Convolving(body, CHANNELS // groups, taps)
    program, outcome = recognised(model)
    assert outcome.applied == 1
    x = torch.randn(2, length, CHANNELS)
    torch.testing.assert_close(program.run(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_kernel_of_one_is_a_linear() -> None:
    model = Convolving(lambda x, w: F.conv1d(x, w, torch.ones(CHANNELS)), taps=1)
    program, outcome = recognised(model)
    assert outcome.applied == 1
    assert program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    x = torch.randn(3, 5, CHANNELS)
    torch.testing.assert_close(program.run(x), model(x))


REFUSALS: dict[str, tuple[Body, str]] = {
    "both ways": (lambda x, w: F.conv1d(x, w, padding=1), "looks 1 position ahead: a kernel of 3 and 1 zeros"),
    "same": (lambda x, w: F.conv1d(x, w, padding="same"), "looks 1 position ahead"),
    "forwards": (lambda x, w: F.conv1d(F.pad(x, (0, 2)), w), "looks 2 positions ahead"),
    "dilated both ways": (
        lambda x, w: F.conv1d(F.pad(x, (2, 2)), w, dilation=2), "a kernel of 3 with dilation 2 and 0 zeros",
    ),
    "delayed": (lambda x, w: F.conv1d(F.pad(x, (3, 0)), w), "is 1 position behind its input"),
    "not cut": (lambda x, w: F.conv1d(x, w, padding=2), "more results than inputs"),
    "cut too late": (lambda x, w: F.conv1d(x, w, padding=2)[..., : x.shape[-1] + 1], "more results than inputs"),
    "stride": (lambda x, w: F.conv1d(x, w, stride=2, padding=2), "a convolution of stride 2"),
    "padded with ones": (lambda x, w: F.conv1d(F.pad(x, (2, 0), value=1.0), w), "looks 2 positions ahead"),
    "mirrored": (lambda x, w: F.conv1d(F.pad(x, (2, 0), mode="reflect"), w), "looks 2 positions ahead"),
    "padded channels": (lambda x, w: F.conv1d(F.pad(x[:, 1:], (2, 0, 1, 0)), w), "looks 2 positions ahead"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_its_reason(name: str) -> None:
    body, reason = REFUSALS[name]
    _, outcome = recognised(Convolving(body))
    assert outcome.applied == 0
    (refusal,) = outcome.refused
    assert reason in refusal.reason
    assert refusal.node is not None and "conv" in str(refusal.node.target)


def test_the_middle_of_a_result_is_not_its_beginning() -> None:
    """Results 1 to S of the padded convolution: each looks one position ahead."""
    program, outcome = recognised(
        Convolving(lambda x, w: F.conv1d(x, w, padding=2)[..., 1 : x.shape[-1] + 1])
    )
    assert outcome.applied == 0
    assert not program.graph.find_nodes(op="call_function", target=CONVOLUTION)
