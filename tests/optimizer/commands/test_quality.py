"""explain --quality from the command line: a model with a tokenizer, texts of the user, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from tests.tiny_models import tiny_model
from torchweld.optimizer.cli import app, run
from torchweld.optimizer.sample_text import NAME, english_text

FACTORY = """
import torch

def linear():
    return torch.nn.Linear(4, 4).eval(), (torch.randn(2, 4),)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers over bytes."""
    root = tmp_path_factory.mktemp("models")
    tiny_model("llama", root, vocab_size=256)
    (found,) = root.iterdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE(vocab={text: number for number, text in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.save(str(found / "tokenizer.json"))
    return found


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(english_text()[:100], "utf-8")
    assert (
        run(app, ["explain", str(folder), "--quality", "--text", str(text), "--threads", "1", "--json"]) == 0
    )
    done = capsys.readouterr()
    rows = json.loads(done.out)["quality"]
    assert [(row["precision"], row["rows"]) for row in rows] == [
        (precision, count) for precision in ("f32", "bf16", "int8") for count in (8, 512)
    ]
    assert all(row["tokens"] == 100 and row["text"] == "mine.txt" for row in rows)
    assert rows[0]["kl_max"] < 1e-9 < rows[3]["kl_mean"]
    assert rows[0]["perplexity"] == pytest.approx(rows[0]["reference_perplexity"], rel=1e-5)
    assert done.err == ""


def test_the_text_that_ships(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["explain", str(folder), "--quality", "--threads", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"2000 tokens of {NAME}; perplexity of float64" in out and "top-1 equal" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smollm2", "--quality", "--decode"], "--decode and --quality"),
        (["smollm2", "--text", "x"], "expected --quality with it"),
        (["FOLDER", "--quality", "--text", "none.txt"], "none.txt: No such file"),
        (["FOLDER", "--quality", "--text", "BINARY"], "is no UTF-8 text (byte 3)"),
        (["FOLDER", "--quality", "--text", "SHORT"], "the text has 5 tokens; expected at least 32"),
        (["FACTORY:linear", "--quality"], "has no tokenizer, and precisions are compared on a text"),
    ],
)
def test_refusals_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (tmp_path / "factory.py").write_text(FACTORY, "utf-8")
    (tmp_path / "binary").write_bytes(b"abc\xff")
    (tmp_path / "short").write_text("short", "utf-8")
    places = {"FOLDER": folder, "BINARY": tmp_path / "binary", "SHORT": tmp_path / "short"}
    given = [
        str(places.get(word, word)).replace("FACTORY", str(tmp_path / "factory.py")) for word in arguments
    ]
    assert run(app, ["explain", *given]) == 2
    done = capsys.readouterr()
    assert done.out == "" and done.err.count("\n") == 1 and words in done.err
