"""explain --decode over the factories of examples/huggingface_decoders.py: states, proofs and kernels of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples import huggingface_decoders
from torchweld.graph.capture_causal import capture_causal
from torchweld.optimizer.cli import app, run
from torchweld.optimizer.compile_step import normalise
from torchweld.optimizer.report_decode import StateRecord
from torchweld.passes.rewrite_kv_cache import StepProgram, derive_step

FILE = huggingface_decoders.__file__
ROW = 2 * 16 * 4  # bytes of a key and a value of one head

DECODERS = {
    "llama": (["causal"], 2, None, ["kv_idx <= q_idx"]),
    "mistral": (["window 32"], 2, None, ["kv_idx > q_idx - sliding_window", "kv_idx <= q_idx"]),
    "qwen3": (["causal"], 2, None, ["kv_idx <= q_idx"]),
    "gemma2": (["window 32", "causal"], 2, None, ["kv_idx > q_idx - sliding_window", "kv_idx <= q_idx"]),
    "phi3": (["causal"], 2, None, ["hides nothing", "kv_idx <= q_idx"]),
    "gpt2": (["causal"], 4, 512, ["kv_idx <= q_idx"]),
    "gpt_neox": (["causal"], 4, None, ["kv_idx <= q_idx"]),
    "bloom": (["causal"], 4, None, ["by the key's position alone"]),
    "olmo2": (["causal"], 2, None, ["kv_idx <= q_idx"]),
    "exaone4": (["window 32", "causal"], 2, None, ["kv_idx > q_idx - sliding_window", "kv_idx <= q_idx"]),
}


COMPILED = ("mistral", "gemma2", "bloom", "olmo2")
"""Those whose kernels are counted: windows, most kernels per layer, a mask that stays a tensor."""


def check_layers(name: str, layers: list[dict[str, Any]]) -> None:
    """Kind, window, bytes and proof of every layer, as they must be."""
    kinds, heads, _, words = DECODERS[name]
    named = [f"{layer['kind']} {layer['window'] or ''}".strip() for layer in layers]
    assert named == (kinds if len(kinds) == 2 else kinds * 2)
    assert [(layer["heads"], layer["bytes_per_token"]) for layer in layers] == [(heads, heads * ROW)] * 2
    for layer in layers:
        proof = layer["mask_proof"]
        wanted = [word for word in words if layer["kind"] == "window" or "sliding" not in word]
        assert "for every size" in proof and "masking_utils.py:" in proof
        assert all(word in proof for word in wanted), proof


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_decoders(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["explain", f"{FILE}:{name}", "--decode", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    _, heads, limit, _ = DECODERS[name]
    check_layers(name, content["layers"])
    assert content["bytes_per_token"] == 2 * heads * ROW and content["limit"] == limit
    assert 1 <= content["kernels_per_layer"] <= 8 and content["eager_fallbacks"] == 0


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in COMPILED])
def test_states_of_the_others(name: str) -> None:
    program, _ = normalise(capture_causal(getattr(huggingface_decoders, name)(), verify=False))
    step = derive_step(program)
    assert isinstance(step, StepProgram) and step.limit == DECODERS[name][2]
    check_layers(name, [vars(StateRecord.of(number, state)) for number, state in enumerate(step.states)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_in_a_narrow_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(app, ["explain", f"{FILE}:{name}", "--decode"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "2 layers: 2 causal" in text and "2 cross attentions, 1024 bytes per position" in text
    assert ["0-1", "cross", "4", "16", "16", "float32", "512"] in [line.split() for line in lines]
    assert any(f"kernels per layer {count} " in text for count in range(1, 9))
    assert ("by two positions alone" in text) is (name == "t5")


def test_every_factory_is_tried() -> None:
    made = {
        name
        for name, value in vars(huggingface_decoders).items()
        if callable(value) and getattr(value, "__code__", None) is not None and not value.__code__.co_argcount
    }
    assert made == {*DECODERS, "t5", "bart"} and Path(FILE).name == "huggingface_decoders.py"
