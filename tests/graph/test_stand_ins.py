"""Stored weights that are decoded piece by piece: the numbers of the whole weight, in less memory at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.graph.test_capture_few_rows import COLUMNS, READS, decoded_rows, stored
from torchweld.graph.ops.dequantize import dequantize
from torchweld.graph.stand_ins import DecodedInPieces

__all__ = ["decoded_rows"]  # the fixture


class Small(DecodedInPieces):
    PIECE = 48 * COLUMNS  # type: ignore[misc]


@given(st.sampled_from(sorted(READS)), st.integers(1, 4), st.integers(0, 5))
def test_every_way_to_read_sees_the_weight(read: str, batch: int, length: int) -> None:
    data, x = stored(200), torch.randn(batch, length, COLUMNS)
    expected = READS[read](x, dequantize(data, "Q8_0", COLUMNS))
    with Small() as mode:
        for _ in range(2):
            got = READS[read](x, dequantize(data, "Q8_0", COLUMNS))
            torch.testing.assert_close(got, expected)
    assert mode.used


@pytest.mark.parametrize(("rows", "pieces"), [(48, [48]), (49, [48, 1]), (200, [48, 48, 48, 48, 8])])
def test_a_linear_decodes_a_piece_at_a_time(rows: int, pieces: list[int], decoded_rows: list[int]) -> None:
    data = stored(rows)
    done: list[int] = []
    with Small(lambda part: done.append(part.shape[0])) as mode:
        F.linear(torch.randn(3, COLUMNS), dequantize(data, "Q8_0", COLUMNS))
    assert decoded_rows == pieces
    assert done == (pieces if rows > 48 else [])
    assert mode.used == (rows > 48)
