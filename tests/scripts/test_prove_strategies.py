"""The proof of scripts/prove_strategies.py in short: real models, a few prompts and tokens, every layout of a cache."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from scripts.prove_strategies import prove_all, table_of
from scripts.strategy_proof import (
    STRATEGIES,
    NotEqual,
    Subject,
    cases,
    prove,
    prove_batch,
    read_prompts,
)

TOKENS = 12


def test_prompts_are_of_twenty_kinds() -> None:
    prompts = read_prompts()
    assert len(dict(prompts)) == len(prompts) == 20
    assert all(text.strip() and not text.endswith("\n") for _, text in prompts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_strategy_on_smollm2() -> None:
    subject = Subject("smollm2")
    two = cases(subject, read_prompts()[5:7], TOKENS)
    assert [case.layout.name for case in two] == ["grows", "up front"]
    results = list(prove_all(subject, two))
    assert len(results) == 2 * len(STRATEGIES) + 2
    for name in STRATEGIES:
        assert sum(result.drafted for result in results if result.strategy == name) > 0, name
    assert sum(result.accepted for result in results) > 2 * TOKENS
    out = io.StringIO()
    Console(file=out, width=100).print(table_of("smollm2", results))
    assert all(f" {name}" in out.getvalue() for name in (*STRATEGIES, "batch"))

    # What a proof is worth: another text, and another bit, must fail it.
    case, plain = two[0], subject.plain(two[0])
    with pytest.raises(NotEqual, match=r"smollm2, lookup, .*new token 3 is .*plain decoding gives \(0,\)"):
        prove(subject, "lookup", case, (*plain[:3], 0, *plain[4:]))
    text = (*case.prompt, *plain[:5])
    subject.known[text] = bytes(16)
    with pytest.raises(NotEqual, match=rf"behind {len(text)} tokens 0 of 49152 logits differ"):
        prove(subject, "trees", case, plain)
    with pytest.raises(NotEqual, match="batch"):
        prove_batch(subject, two[:1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rings_turn_on_gemma3() -> None:
    subject = Subject("gemma3")
    assert subject.window == 512
    (case,) = [
        case for case in cases(subject, read_prompts()[:4], TOKENS) if case.layout.name == "ring + 5 turns"
    ]
    assert len(case.prompt) < 517 < len(case.prompt) + TOKENS
    results = list(prove_all(subject, [case], ("lookup", "reference", "lookahead", "trees")))
    assert all(result.compared > TOKENS for result in results if result.strategy != "batch")
    assert sum(result.accepted for result in results) > TOKENS
