"""The examples without a strategy in their name run from end to end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples import demo, huggingface_model, optimize_decorator


def test_a_hugging_face_model_as_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    huggingface_model.main()
    first, *report = capsys.readouterr().out.splitlines()
    difference = float(first.removeprefix("largest difference of a logit from torch's: "))
    assert difference < 1e-4
    assert any("LlamaForCausalLM" in line for line in report)


def test_optimize_as_a_decorator(capsys: pytest.CaptureFixture[str]) -> None:
    optimize_decorator.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["gated (2, 10, 32)", "block (2, 10, 64)", "gated (1, 3, 32)", "block (1, 3, 64)"]
    assert any("Block" in line for line in lines[4:])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(sys, "argv", ["demo", "--tokens", "3"])
    demo.main()
    assert "3 of 3 tokens are the same" in capsys.readouterr().out
    assert any((tmp_path / "kernels").rglob("*.py")), "a kernel is a file that runs alone"
