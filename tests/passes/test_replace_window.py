"""replace_window: exact up to the window, measured beyond it, on full causal layers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zoo import VOCAB, ZOO
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import run_pass
from torchweld.optimizer.compile import Options, compile_program
from torchweld.optimizer.lossy import change
from torchweld.passes.replace_window import ReplaceWindow

ATTENTION = torch.ops.torchweld.attention.default
IDS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def captured(name: str) -> Program:
    return capture(ZOO[name].make(), (), {"input_ids": IDS, "use_cache": False}, verify=False)


def flat(program: Program) -> list[Any]:
    return [IDS if isinstance(node.meta["val"], Tensor) else False for node in program.placeholders]


def kinds(program: Program) -> list[tuple[object, object]]:
    return [node.args[4:6] for node in program.graph.find_nodes(op="call_function", target=ATTENTION)]


@pytest.mark.parametrize(("window", "is_exact"), [(9, True), (4, False), (1, False)])
def test_exact_up_to_the_window(window: int, is_exact: bool) -> None:
    program = captured("llama")
    changed = change(program, ReplaceWindow(window), flat(program))
    assert (changed.outcome.applied, changed.outcome.refused) == (2, ())
    assert kinds(changed.program) == [("window", window)] * 2
    assert (changed.max_abs < 1e-5) == is_exact and (changed.comparison.kl_max < 1e-9) == is_exact
    assert run_pass(changed.program.graph_module, ReplaceWindow(window)).matched == 0


def test_window_layers_stay() -> None:
    program = captured("gemma3_text")
    changed = change(program, ReplaceWindow(5), flat(program))
    assert changed.outcome.applied == 1 and kinds(changed.program) == [("window", 8), ("window", 5)]
    proofs = [
        node.meta["mask_proof"]
        for node in changed.program.graph.find_nodes(op="call_function", target=ATTENTION)
    ]
    assert proofs[1].startswith("limited to 0 <= d <= 4 by replace_window; before: ")


def test_refuses_a_tensor_mask() -> None:
    program = captured("bloom")
    outcome = change(program, ReplaceWindow(4), flat(program)).outcome
    assert outcome.applied == 0
    assert {refusal.reason for refusal in outcome.refused} == {
        "a tensor mask stands on top of the causal one"
    }


def test_the_ledger_says_so() -> None:
    """A compilation with a lossy pass lists it as such, and its masks as they are then."""
    program = captured("llama")
    compiled = compile_program(program, options=Options(lossy=(ReplaceWindow(4),)), example_inputs=[IDS])
    (record,) = (record for record in compiled.report.passes if record.name == "replace_window")
    assert (record.exactness, record.applied) == ("lossy", 2)
    assert [mask.name for mask in compiled.report.masks] == ["window 4"]
    expected: Any = change(program, ReplaceWindow(4), flat(program)).program.graph_module(*flat(program))
    torch.testing.assert_close(compiled(*flat(program))[0], expected[0], rtol=1e-4, atol=1e-4)


def test_settings() -> None:
    with pytest.raises(ValueError, match="at least 1 position"):
        ReplaceWindow(0)
