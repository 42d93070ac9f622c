"""A cache whose memory held another text before: what lies in slots that are not used never reaches a result."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.codegen.cpp_cases import same_bits
from tests.tiny_models import tiny_model
from torchweld.decoding.cached import CachedModel
from torchweld.optimizer.compile import Options

LENGTH, MORE = 333, 21


def logits(model: CachedModel, ids: Tensor) -> list[Tensor]:
    """A prompt, single tokens, and many at once."""
    found = [model.prefill(ids[:, :LENGTH])]
    found += [model.step(ids[:, at : at + 1]) for at in range(LENGTH, LENGTH + 2)]
    return [*found, model.step(ids[:, LENGTH + 2 :], logits_for="all")]


def spoil(model: CachedModel) -> set[int]:
    """Write what is not a number into all of the cache; its addresses."""
    for tensor in model.cache.tensors():
        tensor.fill_(torch.nan)
    return {tensor.data_ptr() for tensor in model.cache.tensors()}


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [("llama", "f32"), ("llama", "bf16"), ("gemma3_text", "int8")],
)
def test_not_a_number_in_unused_slots(
    architecture: str, precision: Literal["f32", "bf16", "int8"], tmp_path: Path
) -> None:
    changes = {"sliding_window": 300} if architecture == "gemma3_text" else {}
    module = tiny_model(
        architecture, tmp_path, hidden_size=64, head_dim=32, max_position_embeddings=1024, **changes
    )
    model = CachedModel.from_module(module, options=Options(precision=precision, threads=2))
    ids = torch.randint(0, 97, (1, LENGTH + MORE), generator=torch.Generator().manual_seed(0))
    want = logits(model, ids)
    assert model.compiled().eager_reason is None
    old = spoil(model)
    model.prefill(ids)
    old |= spoil(model)
    found = logits(model, ids)
    new = {tensor.data_ptr() for tensor in model.cache.tensors()}
    assert old & new, "the memory of the first text serves the second one"
    for one, other in zip(found, want, strict=True):
        assert same_bits(one, other)
