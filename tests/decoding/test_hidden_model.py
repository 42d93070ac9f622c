"""Hidden states beside the logits of a derived, compiled step: logits keep their bits, states are the model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.decoding.toy_models import Markov, ToyModel
from tests.tiny_models import VOCABULARY, tiny_model
from torchweld.decoding.cached import CachedModel, NotDecodable
from torchweld.decoding.hidden_model import HiddenModel
from torchweld.decoding.show_statistics import read_statistics
from torchweld.decoding.statistics import Statistics
from torchweld.decoding.step_model import DecodingError
from torchweld.graph.capture import capture
from torchweld.graph.capture_causal import capture_causal


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rows_of_a_tree_show_their_states(tmp_path: Path) -> None:
    program = capture_causal(tiny_model("llama", tmp_path))
    plain, model = CachedModel(program), HiddenModel.from_program(program, max_length=40)
    assert (model.vocab_size, model.features, model.max_length) == (VOCABULARY, 48, 40)
    told = read_statistics(Statistics("medusa", 3, 4, 3, 0, 3, 0, 0, (), 3, 0.1, 0.2, 0.0), model)
    assert told.bytes_per_pass is not None and told.bytes_per_pass > 1000
    assert told.gb_s is not None and told.gb_s > 0.0 and told.share_of_read is not None
    prompt = [5, 9, 2]
    assert torch.equal(model.prefill([prompt]), plain.prefill([prompt]))
    assert model.hidden.shape == (1, 1, 48)

    ids, parents = torch.tensor([[7, 8, 9, 3]]), [-1, 0, 0, 2]
    rows = [0, 3, 1]
    logits = model.step(ids, parents=parents, logits_for=rows)
    path = plain.step(torch.tensor([[7, 9, 3]]), logits_for="all")
    assert torch.equal(logits[0, :2], path[0, ::2])
    assert model.hidden.shape == (1, 3, 48)
    assert model.head is not None
    # The head that was cut out makes the logits of the states, and row 3 is the text 7 9 3.
    again = model.head.run(model.hidden.contiguous())
    assert isinstance(again, Tensor)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    state = model.hidden[0, 1].clone()
    model.keep([0, 2])
    assert model.lengths == (5,)
    model.step(torch.tensor([[3]]))
    assert torch.equal(model.hidden[0, 0], state)
    assert model.truncate(2) == (4,) and model.lengths == (2,)


def test_a_step_that_nothing_compiled_has_no_report() -> None:
    with pytest.raises(DecodingError, match="a ToyModel; expected a CachedModel"):
        HiddenModel(ToyModel(Markov(6)), 2).compiled()


def test_a_model_without_an_output_head_is_refused() -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 4)

        def forward(self, ids: Tensor) -> Tensor:
            states: Tensor = self.words(ids)
            return states

    program = capture(States(), (torch.zeros(2, 3, dtype=torch.int64),), verify=False)
    with pytest.raises(NotDecodable, match="no output head"):
        HiddenModel.from_program(program)
