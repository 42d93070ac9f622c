"""Every stored format decodes to the bits that gguf.quants gives, for every layout of the input."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from torchweld.graph.formats import FORMATS, StoredFormat, get_format
from torchweld.graph.formats.dense import DenseFormat
from torchweld.graph.ops.dequantize import dequantize


def random_rows(fmt: StoredFormat, rows: int, blocks: int, seed: int) -> torch.Tensor:
    """Random bytes with finite scales: uint8 [rows, blocks * block_bytes]."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks, fmt.block_bytes), dtype=np.uint8)
    for at in fmt.scales:
        scale = rng.normal(0, 1, (rows, blocks, 1)).astype(np.float16)
        data[..., at : at + 2] = scale.view(np.uint8)
    if isinstance(fmt, DenseFormat):
        values = torch.from_numpy(rng.normal(0, 3, (rows, blocks))).to(fmt.dtype)
        data = values.unsqueeze(-1).view(torch.uint8).numpy()
    return torch.from_numpy(data.reshape(rows, blocks * fmt.block_bytes))


def reference(fmt: StoredFormat, data: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(quants.dequantize(data.numpy().copy(), gguf.GGMLQuantizationType(fmt.gguf_type)))


@pytest.mark.parametrize("name", FORMATS)
def test_layout_constants_match_gguf(name: str) -> None:
    fmt = FORMATS[name]
    assert gguf.GGMLQuantizationType(fmt.gguf_type).name == name
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(fmt.gguf_type)] == (fmt.block, fmt.block_bytes)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_decode_equals_gguf_bit_for_bit(name: str, rows: int, blocks: int, seed: int) -> None:
    fmt = FORMATS[name]
    data = random_rows(fmt, rows, blocks, seed)
    ours = dequantize(data, name, blocks * fmt.block)
    assert ours.shape == (rows, blocks * fmt.block)
    assert torch.equal(ours.view(torch.int32), reference(fmt, data).view(torch.int32))


@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_value_in_every_place(name: str) -> None:
    fmt = FORMATS[name]
    data = random_rows(fmt, 256, 1, 0)
    fixed = {at + i for at in fmt.scales for i in (0, 1)} if fmt.scales else set(range(fmt.block_bytes))
    for place in range(fmt.block_bytes):
        if place not in fixed:
            data[:, place] = torch.arange(256, dtype=torch.uint8).roll(place)
    assert torch.equal(dequantize(data, name, fmt.block), reference(fmt, data))


@pytest.mark.parametrize("name", FORMATS)
def test_strided_unaligned_and_leading_dims(name: str) -> None:
    fmt = FORMATS[name]
    data = random_rows(fmt, 6, 2, 1)
    want = reference(fmt, data)
    padded = torch.zeros(6, data.shape[1] + 3, dtype=torch.uint8)
    padded[:, 1:-2] = data
    assert torch.equal(dequantize(padded[:, 1:-2], name, 2 * fmt.block), want)
    assert torch.equal(dequantize(data.reshape(2, 3, -1), name, 2 * fmt.block), want.reshape(2, 3, -1))
    assert torch.equal(dequantize(data[0], name, 2 * fmt.block), want[0])
    assert torch.equal(dequantize(data[::2], name, 2 * fmt.block), want[::2])
    assert dequantize(data[:0], name, 2 * fmt.block).shape == (0, 2 * fmt.block)


@pytest.mark.parametrize("name", FORMATS)
def test_input_is_neither_changed_nor_aliased(name: str) -> None:
    fmt = FORMATS[name]
    data = random_rows(fmt, 2, 1, 3)
    before = data.clone()
    dequantize(data, name, fmt.block).fill_(7.0)
    assert torch.equal(data, before)


@pytest.mark.parametrize("name", FORMATS)
def test_finite_finds_one_bad_scale(name: str) -> None:
    fmt = FORMATS[name]
    data = random_rows(fmt, 4, 2, 4)
    assert fmt.finite(data)
    for at in fmt.scales or (0,):
        bad = data.clone()
        bad[3, -fmt.block_bytes + at :][: fmt.block_bytes] = 0xFF
        assert not fmt.finite(bad)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="did you mean 'Q4_K'"):
        get_format("q4k")
    with pytest.raises(ValueError, match="33 values is not a whole number of blocks of 32"):
        dequantize(torch.zeros(1, 34, dtype=torch.uint8), "Q8_0", 33)
    with pytest.raises(ValueError, match="is 34 bytes, got 35"):
        dequantize(torch.zeros(1, 35, dtype=torch.uint8), "Q8_0", 32)
    with pytest.raises(ValueError, match="expected uint8"):
        dequantize(torch.zeros(1, 34), "Q8_0", 32)


class GatherAndDecode(torch.nn.Module):
    def __init__(self, data: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("data", data)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantize(torch.nn.functional.embedding(ids, self.get_buffer("data")), "Q4_K", 512)


def test_op_exports_with_symbolic_leading_dims() -> None:
    data = random_rows(FORMATS["Q4_K"], 10, 2, 5)
    model = GatherAndDecode(data)
    batch, seq = torch.export.Dim("b"), torch.export.Dim("s")
    example = (torch.zeros(2, 3, dtype=torch.long),)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch, 1: seq},))
    assert "torchweld.dequantize" in program.graph_module.code
    for shape in ((1, 1), (4, 7)):
        ids = torch.randint(0, 10, shape)
        assert torch.equal(program.module()(ids), reference(FORMATS["Q4_K"], data)[ids])


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "F32"])
def test_opcheck(name: str) -> None:
    fmt = FORMATS[name]
    torch.library.opcheck(dequantize, (random_rows(fmt, 3, 2, 6), name, 2 * fmt.block))
