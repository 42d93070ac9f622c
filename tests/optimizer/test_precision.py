"""Options(precision=...) reaches the kernels, and f32 stays what it was."""

from __future__ import annotations

import pytest
import torch

from torchweld import Options, capture, compile_program


def test_precision_of_a_compiled_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)).eval()
    x = torch.randn(40, 96)
    program = capture(model, (x,))
    with torch.no_grad():
        want = model(x)
    errors = {}
    for precision in ("f32", "bf16"):
        compiled = compile_program(program, options=Options(threads=1, precision=precision, strict=True))
        assert compiled.executable is not None
        assert ("tw_R16_BF16>" in compiled.executable.source.split("MatmulPart")[1]) == (precision == "bf16")
        got = compiled.run(x)
        assert isinstance(got, torch.Tensor)
        errors[precision] = float((got - want).abs().max() / want.abs().max())
    assert errors["f32"] < 1e-6 < errors["bf16"] < 1e-2


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision='f16': expected one of f32, bf16, int8"):
        Options(precision="f16")  # type: ignore[arg-type]
