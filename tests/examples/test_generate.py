"""The generate_*.py scripts on SmolLM2: every strategy gives the text of plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from examples import (
    generate_lookahead,
    generate_lookup,
    generate_medusa,
    generate_plain,
    generate_reference,
    generate_speculative,
    train_medusa_heads,
)
from torchweld.decoding.generation import Generation
from torchweld.decoding.medusa import load_heads

Main = Callable[[Sequence[str] | None], Generation]

PROMPT = "one two three one two three one two"
ARGUMENTS = ["--prompt", PROMPT, "--tokens", "16"]


# One test, so that one worker compiles the model once.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_strategy_gives_the_plain_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    heads = tmp_path / "heads.safetensors"
    train_medusa_heads.main([str(heads), "--texts", "8", "--tokens", "12", "--epochs", "1"])
    assert load_heads(heads).count == 3
    plain = generate_plain.main(ARGUMENTS)
    assert plain.text is not None and plain.text in capsys.readouterr().out
    scripts: dict[str, tuple[Main, list[str]]] = {
        "lookup": (generate_lookup.main, []),
        "reference": (generate_reference.main, ["--reference", "three one two three one two three"]),
        "lookahead": (generate_lookahead.main, []),
        "speculative": (generate_speculative.main, []),
        "medusa": (generate_medusa.main, ["--heads", str(heads)]),
    }
    for name, (main, more) in scripts.items():
        found = main([*ARGUMENTS, *more])
        assert found.tokens == plain.tokens, name
        assert f"{found.statistics.passes} passes" in capsys.readouterr().out
        if name in ("lookahead", "speculative", "medusa"):
            assert found.statistics.drafted > 0, name
