"""The derived step graph: its signature, what moved, that it is right eagerly, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.support import check_metas
from torchweld.graph.capture import capture
from torchweld.graph.match import shape_of
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.passes import CANONICALIZE, RECOGNIZE
from torchweld.passes.rewrite_kv_cache import StepProgram, derive_step

aten = torch.ops.aten
WIDTH, HEADS, WORDS, PLACES, LENGTH = 12, 2, 19, 64, 11
Positions = Callable[[nn.Module, Tensor, Tensor], Tensor]
Bias = Callable[[Tensor], Tensor]


class Decoder(nn.Module):
    """Two layers of attention with a mask of our choice, position by position otherwise, in float64."""

    def __init__(self, positions: Positions, window: int | None = None, bias: Bias | None = None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.positions, self.window, self.bias = positions, window, bias
        for name, shape in (("words", (WORDS, WIDTH)), ("places", (PLACES, WIDTH))):
            self.register_buffer(name, torch.randn(shape, generator=draw, dtype=torch.float64))
        for layer in range(2):
            qkv = torch.randn(3 * WIDTH, WIDTH, generator=draw, dtype=torch.float64)
            self.register_buffer(f"qkv{layer}", qkv / 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.positions(self, ids, F.embedding(ids, self.get_buffer("words")))
        for layer in range(2):
            x = x + self.attend(x, self.get_buffer(f"qkv{layer}"))
            x = x + F.silu(x)
        return F.linear(F.layer_norm(x, (WIDTH,)), self.get_buffer("words"))

    def attend(self, x: Tensor, weight: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = F.linear(x, weight).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        place = torch.arange(length)
        if self.bias is not None:
            scores = scores + self.bias(place)
        hidden = place[:, None] < place[None, :]
        if self.window is not None:
            hidden = hidden | (place[:, None] - place[None, :] >= self.window)
        mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        return mixed.permute(0, 2, 1, 3).reshape(batch, length, WIDTH)


def normalised(model: nn.Module) -> Program:
    program = capture(model.eval(), (torch.arange(14).reshape(2, 7),), verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    return program


def derived(model: nn.Module, **options: object) -> StepProgram:
    step = derive_step(normalised(model), **options)  # type: ignore[arg-type]
    assert isinstance(step, StepProgram), step
    return step


def run_in_chunks(step: StepProgram, ids: Tensor, chunks: list[int]) -> list[Tensor]:
    """Logits of every call; the rows that come out go back in."""
    states = [
        torch.empty(0, ids.shape[0], state.heads, features, dtype=state.dtype)
        for state in step.states
        for features in (state.key_features, state.value_features)
    ]
    results: list[Tensor] = []
    start = 0
    for count in chunks:
        logits, rows = step.program.run(ids[:, start : start + count], tuple(states))  # type: ignore[misc]
        states = [torch.cat(pair) for pair in zip(states, rows, strict=True)]
        results.append(logits)
        start += count
    return results


POSITIONS: dict[str, Positions] = {
    "none": lambda m, ids, x: x,
    "arange": lambda m, ids, x: x + m.get_buffer("places")[torch.arange(x.shape[1])],
    "slice": lambda m, ids, x: x + m.get_buffer("places")[: x.shape[1]],
    "slice from 3": lambda m, ids, x: x + m.get_buffer("places")[3 : 3 + x.shape[1]],
    "counted": lambda m, ids, x: x + m.get_buffer("places")[torch.ones_like(ids).cumsum(1)],
    "every second": lambda m, ids, x: x + torch.arange(0, 2 * x.shape[1], 2).to(x.dtype)[:, None].sin(),
    "merged rows": lambda m, ids, x: F.relu(x.reshape(-1, WIDTH)).reshape(x.shape) + x,
}
MODELS: dict[str, Callable[[], Decoder]] = {
    **{name: lambda name=name: Decoder(POSITIONS[name]) for name in POSITIONS},  # type: ignore[misc]
    "window": lambda: Decoder(POSITIONS["arange"], window=3),
    "alibi": lambda: Decoder(POSITIONS["none"], bias=lambda place: place.to(torch.float64) * 0.3),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [4, 1, 6]], ids=["whole", "single", "mixed"])
def test_step_equals_the_model_without_cache(name: str, chunks: list[int]) -> None:
    model = MODELS[name]()
    ids = torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = model(ids)
    everything = torch.cat(run_in_chunks(derived(model, logits="all"), ids, chunks), 1)
    torch.testing.assert_close(everything, expected, rtol=1e-9, atol=1e-9)
    last = torch.cat(run_in_chunks(derived(model), ids, chunks), 1)
    ends = torch.tensor(chunks).cumsum(0) - 1
    torch.testing.assert_close(last, expected[:, ends], rtol=1e-9, atol=1e-9)


def test_signature_and_states() -> None:
    step = derived(MODELS["window"]())
    names = [node.name for node in step.program.placeholders]
    assert names == ["ids", "past_key_0", "past_value_0", "past_key_1", "past_value_1"]
    assert [(state.kind, state.window, state.heads) for state in step.states] == [("window", 3, HEADS)] * 2
    assert step.states[0].bytes_per_token == 2 * WIDTH * 8
    assert all(state.mask_proof for state in step.states)
    assert step.limit == PLACES and step.logits == "last"


def test_metas_tell_the_truth() -> None:
    step = derived(MODELS["slice from 3"]())
    past = torch.zeros(5, 2, HEADS, WIDTH // HEADS, dtype=torch.float64)
    check_metas(step.program.graph_module, [torch.arange(6).reshape(2, 3), past, past, past, past])


def test_only_the_last_position_runs_behind_the_last_attention() -> None:
    step = derived(MODELS["arange"]())
    (cut,) = (
        node for node in step.program.graph.nodes
        if node.target is aten.slice.Tensor and node.meta.get("made_by") == "rewrite_kv_cache"
    )  # fmt: skip
    behind = [node for node in step.program.graph.nodes if node.target is aten.silu.default]
    rows = [shape_of(node)[1] for node in behind]
    assert rows == [shape_of(step.program.placeholders[0])[1], 1], "the last layer's silu is cut too"
    assert shape_of(cut)[1] == 1


def test_source_program_stays_as_it_is() -> None:
    model = MODELS["arange"]()
    program = normalised(model)
    before = str(program.graph)
    derive_step(program)
    assert str(program.graph) == before


def test_normalising_the_step_changes_nothing_in_its_numbers() -> None:
    model = MODELS["alibi"]()
    step = derived(model)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(step.program.graph_module, pass_)
    ids = torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    last = run_in_chunks(step, ids, [4, 7])[-1]
    torch.testing.assert_close(last, model(ids)[:, -1:], rtol=1e-9, atol=1e-9)


def test_half_causal_mask_is_refused() -> None:
    """A prefix that every token sees: position 0 sees position 1."""

    class Prefix(Decoder):
        def attend(self, x: Tensor, weight: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q, k, v = (
                F.linear(x, weight).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            )
            place = torch.arange(length)
            visible = (place[:, None] >= place[None, :]) | (place[None, :] < 2)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
            return mixed.permute(0, 2, 1, 3).reshape(batch, length, WIDTH)

    refusal = derive_step(normalised(Prefix(POSITIONS["none"])))
    assert isinstance(refusal, Refusal) and refusal.node is not None


def test_mean_pooling_is_refused() -> None:
    class Pooled(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).mean(1)

    refusal = derive_step(normalised(Pooled(POSITIONS["none"])))
    assert isinstance(refusal, Refusal) and refusal.node is not None
    assert refusal.node.target is aten.mean.dim
    assert "mean over the sequence axis: a later token changes earlier outputs" in refusal.reason
