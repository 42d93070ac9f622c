"""drop_layers: the layers that the data flow shows are the model's, and what stays is the model without them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.support import check_metas
from tests.tiny_models import tiny_model
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.passes import CANONICALIZE, RECOGNIZE
from torchweld.passes.drop_layers import ATTENTION, drop_layers, find_layers

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
LAYERS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
}


def canonical(model: nn.Module) -> Program:
    program = capture(model.eval(), (IDS,), verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    return program


def without(model: nn.Module, numbers: list[int]) -> nn.Module:
    """The model with these entries of its list of layers left out."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 4]
    (layers,) = lists
    for number in sorted(numbers, reverse=True):
        del layers[number]
    return model


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_what_stays_is_the_model_without_them(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, tmp_path, **LAYERS[kind])
    program = canonical(model)
    before = program.run(IDS)
    layers = find_layers(program)
    assert not isinstance(layers, Refusal) and len(layers) == 4
    mine = {id(t) for t in program.graph_module.state_dict(keep_vars=True).values()}
    for numbers in ([1], [1, 2], [0, 2], [0, 1, 3], [3]):
        dropped = drop_layers(program, numbers)
        assert not isinstance(dropped, Refusal)
        check_metas(dropped.graph_module, (IDS,))
        attentions = [node for node in dropped.graph.nodes if node.target is ATTENTION]
        assert len(attentions) == 4 - len(numbers)
        expected = without(copy.deepcopy(model), numbers)(IDS)
        torch.testing.assert_close(dropped.run(IDS), expected, rtol=1e-4, atol=1e-5)
        kept = dropped.graph_module.state_dict(keep_vars=True).values()
        assert all(id(tensor) in mine for tensor in kept), "weights are shared"
    torch.testing.assert_close(program.run(IDS), before, rtol=0, atol=0)


class Blocks(nn.Module):
    """Residual attention blocks of the given widths, with `side` read by every block behind the first if it is set."""

    def __init__(self, widths: tuple[int, ...], side: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.side = side
        self.words = nn.Embedding(10, widths[0])
        self.blocks = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, ids: Tensor) -> Tensor:
        first = x = self.words(ids)
        for block in self.blocks:
            h = x.unsqueeze(1)
            mixed = F.scaled_dot_product_attention(h, h, h, is_causal=True).squeeze(1)
            x = block(x + mixed + (first if self.side else 0.0))
        return self.head(x)  # type: ignore[no-any-return]


def refused(model: nn.Module, numbers: list[int]) -> Refusal:
    result = drop_layers(canonical(model), numbers)
    assert isinstance(result, Refusal)
    return result


def test_numbers_that_name_no_layer_are_refused() -> None:
    assert "there is no layer 5 to drop; expected 0 to 2" in refused(Blocks((8, 8, 8, 8)), [1, 5]).reason
    assert "there is no layer -1" in refused(Blocks((8, 8, 8, 8)), [-1]).reason


def test_one_layer_has_to_stay() -> None:
    refusal = refused(Blocks((8, 8, 8, 8)), [0, 1, 2])
    assert "all 3 layers are to be dropped" in refusal.reason and refusal.node is not None


def test_a_layer_that_changes_the_width_is_refused() -> None:
    refusal = refused(Blocks((8, 12, 12, 12)), [0])
    assert "layer 0 gives a value of another shape" in refusal.reason and refusal.node is not None


def test_a_stream_of_two_values_is_refused() -> None:
    refusal = refused(Blocks((8, 8, 8, 8), side=True), [1])
    assert "3 attentions in" in refusal.reason and refusal.node is not None


def test_a_model_without_attention_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 10)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids)  # type: ignore[no-any-return]

    assert "0 attentions" in refused(Flat(), [0]).reason


def test_nothing_to_drop_changes_nothing() -> None:
    program = canonical(Blocks((8, 8, 8)))
    dropped = drop_layers(program, [])
    assert not isinstance(dropped, Refusal)
    assert str(dropped.graph) == str(program.graph)
