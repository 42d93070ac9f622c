"""explain --decode: what it derives of small Hugging Face models, of a file, and of what does not decode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.zoo import LAYERS, POSITIONS, WINDOW, ZOO
from torchweld.graph.capture import capture
from torchweld.optimizer.cli import app, run
from torchweld.optimizer.commands.decode import explain_decoding
from torchweld.optimizer.report_decode import DecodeReport

SOURCE = """
import torch
from torch import nn

class Decoder(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(16, 8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, ids):
        x = self.embedding(ids)
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return (x + y[:, 0]) @ self.embedding.weight.T

def causal():
    return Decoder(True).eval(), (torch.arange(14).reshape(2, 7),)

def both_ways():
    return Decoder(False).eval(), (torch.arange(14).reshape(2, 7),)
"""


def explained(name: str) -> DecodeReport:
    entry = ZOO[name]
    ids = {"input_ids": entry.inputs(2, 9)["input_ids"]}
    return explain_decoding(capture(entry.make(), (), ids, verify=False), name=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "states", "limit"),
    [
        ("gemma3_text", [("window", WINDOW), ("causal", 0)], None),
        ("opt", [("causal", 0)] * LAYERS, POSITIONS),
        ("falcon", [("causal", 0)] * LAYERS, None),
    ],
)
def test_hugging_face_models(name: str, states: list[tuple[str, int]], limit: int | None) -> None:
    report = explained(name)
    assert report.refusal is None
    assert [(layer.kind, layer.window) for layer in report.layers] == states
    assert all("for every size" in layer.mask_proof and layer.bytes_per_token > 0 for layer in report.layers)
    assert 1 <= report.kernels_per_layer <= 8
    assert report.limit == limit


def test_what_sees_later_tokens_is_refused_at_its_attention() -> None:
    report = explained("bert")
    assert report.refusal is not None and not report.layers
    assert "attention without a causal mask" in report.refusal and "torchweld.attention" in report.refusal


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.py"
    path.write_text(SOURCE, encoding="utf-8")
    assert run(app, ["explain", f"{path}:causal", "--decode", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (layer,) = content["layers"]
    assert (layer["kind"], layer["window"], layer["bytes_per_token"]) == ("causal", 0, 2 * 8 * 4)
    assert layer["mask_proof"] and 1 <= content["kernels_per_layer"] <= 8
    assert run(app, ["explain", f"{path}:both_ways", "--decode"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "does not decode" in said and "model.py:15" in said
