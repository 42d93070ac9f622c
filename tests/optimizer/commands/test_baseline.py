"""The decoded copy computes the same, shares what it can, and leaves the original alone."""

import torch
from torch import nn

from torchweld.graph.formats import get_format
from torchweld.models.layers import StoredEmbedding, StoredLinear
from torchweld.models.weights import StoredTensor
from torchweld.optimizer.commands.baseline import decoded_model

ROWS, COLUMNS = 7, 64


class Tied(nn.Module):
    """Embedding and head over the same stored bytes, with a dense norm between them."""

    def __init__(self) -> None:
        super().__init__()
        data = torch.randint(0, 256, (ROWS, 2 * 18), dtype=torch.uint8)
        # The scale of each of the two blocks of a row: 0.5 in float16, so that no random scale is NaN.
        data[:, [0, 18]], data[:, [1, 19]] = 0x00, 0x38
        stored = StoredTensor("Q4_0", (ROWS, COLUMNS), data)
        self.embed, self.head = StoredEmbedding(stored), StoredLinear(stored)
        self.norm = nn.RMSNorm(COLUMNS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.embed(ids)))
        return result


def test_same_numbers_in_float32() -> None:
    model = Tied()
    twin = decoded_model(model)
    ids = torch.tensor([[0, 3, 6]])
    assert torch.equal(model(ids), twin(ids))
    assert isinstance(twin, Tied)
    assert (twin.head.format, twin.head.weight.dtype) == ("F32", torch.float32)
    expected = get_format("Q4_0").decode_rows(model.head.weight, COLUMNS)
    assert torch.equal(twin.head.weight, expected)


def test_ties_stay_tied_and_the_rest_is_shared() -> None:
    model = Tied()
    twin = decoded_model(model)
    assert isinstance(twin, Tied)
    assert twin.head.weight is twin.embed.weight
    assert twin.norm.weight is model.norm.weight


def test_the_original_keeps_its_bytes() -> None:
    model = Tied()
    decoded_model(model)
    assert (model.head.format, model.head.weight.dtype) == ("Q4_0", torch.uint8)


def test_nothing_stored_nothing_copied() -> None:
    plain = nn.Linear(3, 3)
    assert decoded_model(plain) is plain
