"""All 24 architectures: captured with symbolic sizes, equal to eager at sizes which capture did not trace."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree

from tests.zoo import ZOO, ZooEntry
from torchweld.graph.capture import capture
from torchweld.graph.edit import writes

SIZES = ((1, 1), (3, 21))
CASES = [
    pytest.param(name, attention, marks=pytest.mark.slow if number else ())
    for name, entry in ZOO.items()
    for number, attention in enumerate(entry.attentions)
]


def test_there_are_twenty_four() -> None:
    assert len(ZOO) == 24


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_captures_and_equals_eager(name: str, attention: str) -> None:
    entry = ZOO[name]
    model = entry.make(attention)
    program = capture(model, (), entry.inputs(1, 12))
    assert not any(writes(node) for node in program.graph.nodes)
    assert all(s.low == 1 for s in program.sizes)
    assert {s.dim for s in program.sizes} == ({0, 1} if "length" in entry.varying else {0})
    for batch, length in SIZES:
        check_equal(
            program.run(**padded(entry, batch, length)), run_eager(model, padded(entry, batch, length))
        )


def padded(entry: ZooEntry, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs whose last row ends in padding, so that the mask matters."""
    inputs = entry.inputs(batch, length, seed=batch)
    if "attention_mask" in inputs and length > 2:
        inputs["attention_mask"][-1, -2:] = 0
    return inputs


def run_eager(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> object:
    with torch.no_grad():
        return model(**inputs)


def check_equal(actual: object, expected: object) -> None:
    mine = [leaf for leaf in pytree.tree_leaves(actual) if isinstance(leaf, torch.Tensor)]
    theirs = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, torch.Tensor)]
    assert len(mine) <= len(theirs) and mine, "the program returns what eager returns, without caches"
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_outputs_depend_on_inputs(name: str) -> None:
    """A zoo whose outputs are all alike would let wrong graphs pass."""
    model, entry = ZOO[name].make(), ZOO[name]
    first, second = (run_eager(model, entry.inputs(2, 9, seed))[0] for seed in (1, 2))  # type: ignore[index]
    assert (first - second).std() > 0.3 * first.std()
