"""What `explain --quality` says of encoders, against errors that are computed in another way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny_models import VOCABULARY, tiny_inputs, tiny_model
from torchweld.graph.capture import capture
from torchweld.optimizer.compile import Options, compile_program
from torchweld.optimizer.measure_encoder import measure_encoder, split_windows, work_of
from torchweld.optimizer.measure_quality import QualityError

CALLS = ((1, 8), (3, 20))
TEXT = torch.randint(0, VOCABULARY, (130,), generator=torch.Generator().manual_seed(5))


def test_errors(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_model("bert", tmp_path_factory.mktemp("models"), hidden_size=64, intermediate_size=96)
    program = capture(model, tiny_inputs("bert"))
    done: list[int] = []
    found = measure_encoder(
        model, program, TEXT, text="noise", options=Options(threads=1), precisions=("f32", "bf16"), calls=CALLS,
        advance=done.append,
    )  # fmt: skip
    assert sum(done) == work_of(len(TEXT), ("f32", "bf16"), CALLS) == 3 * (128 + 120)
    assert [(row.precision, row.rows, row.tokens, row.vectors) for row in found] == [
        ("f32", 8, 128, 128), ("f32", 60, 120, 120), ("bf16", 8, 128, 128), ("bf16", 60, 120, 120),
    ]  # fmt: skip
    for row in found[:2]:
        assert row.relative_error_max < 1e-5 and row.cosine_min > 1 - 1e-10
    for row in found[2:]:
        assert (
            1e-4 < row.relative_error_mean < row.relative_error_max < 0.1 and 0.99 < row.cosine_min < 1 - 1e-8
        )

    compiled = compile_program(program, options=Options(threads=1, precision="bf16"))
    ids = TEXT[:120].reshape(2, 3, 20)
    errors, cosines = [], []
    for windows in ids:
        ours = compiled.run(windows, torch.ones_like(windows))
        with torch.no_grad():
            eager = model(windows, torch.ones_like(windows))
        assert isinstance(ours, Tensor)
        for mine, right in zip(ours.reshape(-1, 64).tolist(), eager.reshape(-1, 64).tolist(), strict=True):
            length = sum(b * b for b in right) ** 0.5
            errors.append(sum((a - b) ** 2 for a, b in zip(mine, right, strict=True)) ** 0.5 / length)
            mine_length = sum(a * a for a in mine) ** 0.5
            cosines.append(sum(a * b for a, b in zip(mine, right, strict=True)) / length / mine_length)
    assert found[3].relative_error_mean == pytest.approx(sum(errors) / 120, rel=1e-3)
    assert found[3].relative_error_max == pytest.approx(max(errors), rel=1e-3)
    assert found[3].cosine_mean == pytest.approx(sum(cosines) / 120, abs=1e-8)

    with pytest.raises(QualityError, match="the text has 7 tokens; expected at least 8"):
        measure_encoder(model, program, TEXT[:7], text="", calls=CALLS)


@given(count=st.integers(0, 300), batch=st.integers(1, 4), length=st.integers(1, 20))
def test_windows_are_the_text_in_order(count: int, batch: int, length: int) -> None:
    ids = torch.arange(count)
    windows = list(split_windows(ids, (batch, length)))
    assert all(window.shape == (batch, length) for window in windows)
    whole = torch.cat([window.flatten() for window in windows]) if windows else ids[:0]
    assert whole.equal(ids[: count // (batch * length) * batch * length])
