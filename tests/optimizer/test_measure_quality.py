"""What `explain --quality` says of language models, against KL that is computed in another way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tiny_models import VOCABULARY, tiny_inputs, tiny_model
from torchweld.codegen.cpp_packed import PRECISIONS, Precision
from torchweld.decoding.cached import CachedModel
from torchweld.graph.capture import capture
from torchweld.graph.float64 import to_float64
from torchweld.optimizer import measure_quality
from torchweld.optimizer.compile import Options
from torchweld.optimizer.measure_quality import (
    LEAST_TAIL,
    QualityError,
    blocks,
    measure_language,
    split_passages,
    work_of,
)
from torchweld.optimizer.report_quality import LanguageQuality
from torchweld.optimizer.step_runner import StepRunner

TEXT = torch.randint(0, VOCABULARY, (150,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A Llama whose sizes are whole blocks of 32, so that every precision has its own kernels."""
    folder = tmp_path_factory.mktemp("models")
    return tiny_model("llama", folder, hidden_size=64, intermediate_size=96)


def logits_in_chunks(model: nn.Module, precision: Precision, rows: int) -> Tensor:
    """[S, V], by the decoding harness."""
    cached = CachedModel.from_module(model, options=Options(threads=1, precision=precision))
    first = cached.prefill([TEXT[:1].tolist()])  # one row: CachedModel begins with a prompt
    rest = [cached.step(part[None], logits_for="all")[0] for part in torch.split(TEXT[1:], rows)]
    return torch.cat([first, *rest])


@pytest.fixture(scope="module")
def measured(model: nn.Module) -> tuple[LanguageQuality, ...]:
    done: list[int] = []
    program = capture(model, tiny_inputs("llama"))
    found = measure_language(program, TEXT, text="noise", options=Options(threads=1), advance=done.append)
    assert sum(done) == work_of(len(TEXT))
    return found


def test_every_precision_at_few_and_at_many_rows(measured: tuple[LanguageQuality, ...]) -> None:
    assert [(row.precision, row.rows) for row in measured] == [(p, n) for p in PRECISIONS for n in (8, 512)]
    assert all(row.tokens == len(TEXT) and row.text == "noise" for row in measured)


def test_f32_is_exact_and_others_are_not(measured: tuple[LanguageQuality, ...]) -> None:
    found = {(row.precision, row.rows): row for row in measured}
    for rows in (8, 512):
        exact = found["f32", rows]
        assert exact.kl_max < 1e-9 and exact.top1 == 1.0
        assert exact.perplexity == pytest.approx(exact.reference_perplexity, rel=1e-5)
    # Weights that are plain numbers are kept in bfloat16 for any number of rows; activations for many alone.
    few, many = found["bf16", 8], found["bf16", 512]
    assert 1e-8 < few.kl_mean < many.kl_mean < many.kl_max < 1.0


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_kl_computed_in_another_way(
    model: nn.Module, measured: tuple[LanguageQuality, ...], precision: Precision
) -> None:
    whole = to_float64(model, (TEXT[None],))
    assert isinstance(whole, Tensor)
    reference = whole[0].log_softmax(-1)
    row = next(row for row in measured if (row.precision, row.rows) == (precision, 512))
    ours = logits_in_chunks(model, precision, 149).double().log_softmax(-1)
    kl = F.kl_div(ours, reference, reduction="none", log_target=True).sum(-1)
    expected = math.exp(F.nll_loss(reference[:-1], TEXT[1:]).item())
    assert row.reference_perplexity == pytest.approx(expected, rel=1e-9)
    # The harness runs the first token alone, in float: of 150 positions one has another error.
    assert row.kl_mean == pytest.approx(kl.mean().item(), rel=0.25, abs=1e-12)
    assert row.kl_max == pytest.approx(kl.max().item(), rel=0.25, abs=1e-11)
    agreed = (ours.argmax(-1) == reference.argmax(-1)).double().mean().item()
    assert row.top1 == pytest.approx(agreed, abs=1.01 / 150)
    assert row.perplexity == pytest.approx(math.exp(F.nll_loss(ours[:-1], TEXT[1:]).item()), rel=1e-3)


def test_a_wrong_step_is_seen(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(StepRunner):
        """Logits of the row before, from the second row of a call on."""

        def __call__(self, ids: Tensor) -> Tensor:
            logits = super().__call__(ids)
            return torch.cat([logits[:1], logits[:-1]])

    monkeypatch.setattr(measure_quality, "StepRunner", Late)
    program = capture(model, tiny_inputs("llama"))
    for row in measure_language(program, TEXT, text="", options=Options(threads=1), precisions=("f32",)):
        assert row.kl_mean > 0.1 and row.top1 < 0.9


def test_a_model_of_few_positions_reads_passages(tmp_path: Path) -> None:
    program = capture(tiny_model("gpt2", tmp_path, n_positions=40), tiny_inputs("gpt2"))
    found = measure_language(program, TEXT, text="", options=Options(threads=1), precisions=("f32",))
    assert {row.tokens for row in found} == {120}  # three passages of 40; 30 tokens are too short a fourth
    assert all(row.kl_max < 1e-9 for row in found)


@given(count=st.integers(LEAST_TAIL, 3000), size=st.sampled_from([64, 512]))
def test_blocks_cover_all_and_none_is_short(count: int, size: int) -> None:
    found = list(blocks(count, size))
    assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])] and found[-1][1] == count
    assert all(LEAST_TAIL <= end - start < size + LEAST_TAIL for start, end in found)


@given(count=st.integers(LEAST_TAIL, 300), limit=st.none() | st.integers(LEAST_TAIL, 200))
def test_passages(count: int, limit: int | None) -> None:
    ids = torch.arange(count)
    passages = list(split_passages(ids, limit))
    joined = torch.cat(passages)
    assert joined.equal(ids[: len(joined)]) and count - len(joined) < LEAST_TAIL
    assert all(LEAST_TAIL <= len(part) <= (limit or count) for part in passages)


def test_refusals(model: nn.Module, tmp_path: Path) -> None:
    program = capture(model, tiny_inputs("llama"))
    with pytest.raises(QualityError, match="the text has 31 tokens; expected at least 32"):
        measure_language(program, TEXT[:31], text="")
    with pytest.raises(QualityError, match="the model reads 31 positions"):
        next(split_passages(TEXT, 31))
    encoder = capture(tiny_model("bert", tmp_path), tiny_inputs("bert"))
    with pytest.raises(QualityError, match="has no float64 reference"):
        measure_language(encoder, TEXT, text="")
