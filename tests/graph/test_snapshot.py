"""A call that writes to its inputs is found out, wherever in their storage it writes."""

from __future__ import annotations

import torch

from torchweld.graph.snapshot import changed_inputs, inputs_unchanged, snapshot


def test_nothing_changed() -> None:
    inputs = {"x": torch.randn(3, 4)[:, ::2], "y": [torch.arange(3), 7], "z": torch.zeros(0)}
    before = snapshot(inputs)
    inputs["x"] + 1  # type: ignore[operator]
    assert inputs_unchanged(before, inputs)


def test_a_write_to_the_input_and_a_write_beside_it() -> None:
    base = torch.zeros(10)
    x = base[2:5]
    before = snapshot((x,))
    x[1] = 1.0
    assert not inputs_unchanged(before, (x,))
    x[1] = 0.0
    assert inputs_unchanged(before, (x,))
    base[9] = 1.0
    assert "bytes of its storage changed" in changed_inputs(before, (x,))[0]


def test_the_sign_of_a_zero_and_a_nan_count() -> None:
    x = torch.tensor([0.0, float("nan")])
    before = snapshot((x,))
    assert inputs_unchanged(before, (x,))
    x[0] = -0.0
    assert not inputs_unchanged(before, (x,))


def test_shape_strides_and_number_of_inputs_count() -> None:
    x = torch.zeros(2, 3)
    before = snapshot((x, 1))
    assert "was ((2, 3)" in changed_inputs(before, (x.t(), 1))[0]
    assert changed_inputs(before, (x, 2)) and changed_inputs(before, (x,))
    x.resize_(3, 2)
    assert not inputs_unchanged(before, (x, 1))
