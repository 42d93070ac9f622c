"""The compiler's optimization level changes how fast kernels are, never a bit of what they compute.

The rest of the suite relies on it: outside tests/codegen and tests/pipeline it compiles with -O1 (tests/conftest.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tests.codegen.cpp_cases import same_bits
from tests.tiny_models import tiny_model
from torchweld.codegen import toolchain
from torchweld.decoding.cached import CachedModel
from torchweld.optimizer.compile import Options


def logits(module: nn.Module, precision: Literal["f32", "bf16", "int8"], level: str) -> list[Tensor]:
    """A prompt of 37 tokens, one token behind it, and five at once, compiled at `level`."""
    with pytest.MonkeyPatch.context() as patch:
        flags = tuple(level if flag == "-O3" else flag for flag in toolchain.BASE_FLAGS)
        assert level in flags
        patch.setattr(toolchain, "BASE_FLAGS", flags)
        model = CachedModel.from_module(module, options=Options(precision=precision))
        ids = torch.randint(0, 200, (1, 43), generator=torch.Generator().manual_seed(0))
        results = [
            model.prefill(ids[:, :37]),
            model.step(ids[:, 37:38]),
            model.step(ids[:, 38:], logits_for="all"),
        ]
        assert model.compiled().eager_reason is None
    return results


@pytest.mark.parametrize(
    ("architecture", "precision"), [("gemma3_text", "f32"), ("llama", "bf16"), ("gemma3_text", "int8")]
)
def test_same_bits(architecture: str, precision: Literal["f32", "bf16", "int8"], tmp_path: Path) -> None:
    module = tiny_model(architecture, tmp_path, seed=1, vocab_size=200, hidden_size=64)
    for fast, slow in zip(logits(module, precision, "-O3"), logits(module, precision, "-O1"), strict=True):
        assert same_bits(fast, slow)
