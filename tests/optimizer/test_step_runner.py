"""A step run over a text in chunks gives the logits of the whole text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tiny_models import VOCABULARY, tiny_inputs, tiny_model
from torchweld.graph.capture import capture
from torchweld.optimizer.compile import Compiled, Options
from torchweld.optimizer.compile_step import compile_step, normalise
from torchweld.optimizer.step_runner import StepRunner
from torchweld.passes.rewrite_kv_cache import StepProgram, derive_step

Made = tuple[nn.Module, StepProgram, Compiled]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model with a window of 5 and a layer that sees everything, and its compiled step."""
    model = tiny_model("gemma3_text", tmp_path_factory.mktemp("models"))
    step = derive_step(normalise(capture(model, tiny_inputs("gemma3_text")))[0])
    assert isinstance(step, StepProgram)
    return model, step, compile_step(step, Options(threads=1, strict=True))


@settings(max_examples=25)
@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_chunks(made: Made, counts: list[int], seed: int) -> None:
    model, step, compiled = made
    ids = torch.randint(0, VOCABULARY, (sum(counts),), generator=torch.Generator().manual_seed(seed))
    runner = StepRunner(step, compiled, len(ids))
    logits = torch.cat([runner(part) for part in torch.split(ids, counts)])
    with torch.no_grad():
        want: Tensor = model(ids[None])[0]
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_no_room(made: Made) -> None:
    _, step, compiled = made
    runner = StepRunner(step, compiled, 5)
    runner(torch.arange(3))
    with pytest.raises(ValueError, match="3 rows behind 3 positions; expected 1 to 2"):
        runner(torch.arange(3))
    assert runner(torch.arange(2)).shape == (2, VOCABULARY)
