"""The derived step graph: its signature, what moved, that it is right eagerly, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

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
from torchweld.passes.rewrite_kv_cache import StepProgram, derive_step, with_tree

aten = torch.ops.aten
WIDTH, HEADS, WORDS, PLACES, LENGTH = 12, 2, 19, 64, 11
Positions = Callable[[nn.Module, Tensor, Tensor], Tensor]
Bias = Callable[[Tensor], Tensor]
Sinks = Callable[[nn.Module, Tensor], Tensor]


class Decoder(nn.Module):
    """Two layers of attention with a mask of our choice, position by position otherwise, in float64."""

    def __init__(
        self,
        positions: Positions,
        window: int | None = None,
        bias: Bias | None = None,
        sinks: Sinks | None = None,
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.positions, self.window, self.bias, self.sinks = positions, window, bias, sinks
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
        scores = scores.masked_fill(hidden, -math.inf)
        if self.sinks is None:
            mixed = scores.softmax(-1) @ v
        else:
            sinks = self.sinks(self, place).reshape(1, HEADS, 1, 1).expand(batch, -1, length, -1)
            mixed = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v
        return mixed.permute(0, 2, 1, 3).reshape(batch, length, WIDTH)


def normalised(model: nn.Module) -> Program:
    program = capture(model.eval(), (torch.arange(14).reshape(2, 7),), verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    return program


def derived(model: nn.Module) -> StepProgram:
    step = derive_step(normalised(model))
    assert isinstance(step, StepProgram), step
    return step


def empty_caches(step: StepProgram, batch: int, capacity: int, spare: int) -> tuple[Tensor, ...]:
    """Caches full of NaN: what no row has written must not be read."""
    return tuple(
        torch.full((batch, state.heads, state.window + spare if state.window else capacity, features), math.nan,
                   dtype=state.dtype)
        for state in step.states
        for features in (state.key_features, state.value_features)
    )  # fmt: skip


def run_in_chunks(step: StepProgram, ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits [B, S, V] of all rows; the caches that come out go back in."""
    batch = ids.shape[0]
    caches = empty_caches(step, batch, ids.shape[1], max(chunks) - 1)
    results: list[Tensor] = []
    start = 0
    for count in chunks:
        past = torch.full((batch,), start)
        places = past[:, None] + torch.arange(count)
        rows = torch.arange(batch * count)
        logits, caches = step.program.run(ids[:, start : start + count], past, places, rows, caches)  # type: ignore[misc]
        results.append(logits.reshape(batch, count, -1))
        start += count
    return torch.cat(results, 1)


def learned_sinks(model: nn.Module, place: Tensor) -> Tensor:
    """Any numbers of the model that are not equal: of a size that matters beside the scores."""
    return model.get_buffer("words")[0, :HEADS] * 3 + 1


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
    "sinks": lambda: Decoder(POSITIONS["arange"], sinks=learned_sinks),
    "sinks, window": lambda: Decoder(POSITIONS["arange"], window=3, sinks=learned_sinks),
}


@lru_cache
def program_of(name: str) -> Program:
    return normalised(MODELS[name]())


def step_of(name: str) -> StepProgram:
    step = derive_step(program_of(name))
    assert isinstance(step, StepProgram), step
    return step


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [4, 1, 6]], ids=["whole", "single", "mixed"])
def test_step_equals_the_model_without_cache(name: str, chunks: list[int]) -> None:
    model = MODELS[name]()
    ids = torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    found = run_in_chunks(step_of(name), ids, chunks)
    torch.testing.assert_close(found, model(ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_sequences_of_different_lengths_share_a_call(name: str) -> None:
    """Rows of both sequences behind pasts of 6 and 2, chosen rows only: each as if it were alone."""
    model = MODELS[name]()
    step = step_of(name)
    ids = torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    caches = empty_caches(step, 2, LENGTH, 6)
    everything = torch.arange(12)
    _, caches = step.program.run(  # type: ignore[misc]
        ids[:, :6], torch.zeros(2, dtype=torch.int64), torch.arange(6).expand(2, 6), everything, caches
    )
    past = torch.tensor([6, 2])
    new = torch.stack([ids[0, 6:9], ids[1, 2:5]])
    chosen = torch.tensor([2, 4])  # the last of the first, the middle of the second
    logits, _ = step.program.run(new, past, past[:, None] + torch.arange(3), chosen, caches)  # type: ignore[misc]
    assert logits.shape == (1, 2, WORDS)
    expected = model(ids)
    torch.testing.assert_close(logits[0, 0], expected[0, 8], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits[0, 1], expected[1, 3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_every_path_of_a_tree_equals_its_text(name: str) -> None:
    """Rows 0 - 1 - 3 and 0 - 2 behind four tokens of text."""
    model = MODELS[name]()
    step = with_tree(step_of(name))
    assert [node.name for node in step.program.placeholders][4] == "path"
    text = torch.randint(WORDS, (1, 4), generator=torch.Generator().manual_seed(3))
    new = torch.tensor([[5, 7, 8, 9]])
    caches = empty_caches(step, 1, LENGTH, 3)
    chain = torch.arange(4).expand(1, 4, 4).tril() - torch.ones(1, 4, 4, dtype=torch.int64).triu(1)
    zero, rows = torch.zeros(1, dtype=torch.int64), torch.arange(4)
    _, caches = step.program.run(text, zero, torch.arange(4)[None], rows, chain, caches)  # type: ignore[misc]
    path = torch.tensor([[[0, -1, -1, -1], [0, 1, -1, -1], [0, 2, -1, -1], [0, 1, 3, -1]]])
    places = torch.tensor([[4, 5, 5, 6]])
    logits, _ = step.program.run(new, zero + 4, places, rows, path, caches)  # type: ignore[misc]
    for row, tokens in enumerate(([5], [5, 7], [5, 8], [5, 7, 9])):
        expected = model(torch.cat([text, torch.tensor([tokens])], 1))[0, -1]
        torch.testing.assert_close(logits[0, row], expected, rtol=1e-9, atol=1e-9)


def test_signature_and_states() -> None:
    step = step_of("window")
    names = [node.name for node in step.program.placeholders]
    assert names == ["ids", "past", "positions", "rows", "key_0", "value_0", "key_1", "value_1"]
    assert [(state.kind, state.window, state.heads) for state in step.states] == [("window", 3, HEADS)] * 2
    assert step.states[0].bytes_per_token == 2 * WIDTH * 8
    assert all(state.mask_proof for state in step.states)
    assert (step.limit, step.vocabulary, step.token_limit) == (PLACES, WORDS, WORDS)


def test_layers_of_one_kind_share_a_capacity() -> None:
    class Mixed(Decoder):
        def attend(self, x: Tensor, weight: Tensor) -> Tensor:
            self.window = 3 if weight is self.get_buffer("qkv0") else None
            return super().attend(x, weight)

    step = derived(Mixed(POSITIONS["none"]))
    assert [state.kind for state in step.states] == ["window", "causal"]
    ring, wide, *_ = (shape_of(node)[2] for node in step.program.placeholders[4::2])
    assert ring != wide
    ids = torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    found = run_in_chunks(step, ids, [4, 1, 6])
    torch.testing.assert_close(found, Mixed(POSITIONS["none"])(ids), rtol=1e-9, atol=1e-9)


def test_metas_tell_the_truth() -> None:
    step = step_of("slice from 3")
    past = torch.tensor([3, 1])
    caches = empty_caches(step, 2, 8, 0)
    check_metas(
        step.program.graph_module,
        [torch.arange(6).reshape(2, 3), past, past[:, None] + torch.arange(3), torch.arange(5), *caches],
    )


def test_only_the_chosen_rows_run_behind_the_last_attention() -> None:
    step = step_of("arange")
    behind = [node for node in step.program.graph.nodes if node.target is aten.silu.default]
    rows = [shape_of(node)[1] for node in behind]
    batch, new = shape_of(step.program.placeholders[0])
    assert rows == [batch * new, shape_of(step.program.placeholders[3])[0]], (
        "the last layer's silu is cut too"
    )


def test_positions_behind_the_last_attention_are_those_of_the_chosen_rows() -> None:
    class Late(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            words, places = self.get_buffer("words"), self.get_buffer("places")
            late = places[torch.arange(ids.shape[1])] + places[2 : 2 + ids.shape[1]]
            return super().forward(ids) * (ids >= 0)[:, :, None] + torch.ones_like(ids)[:, :, None] * (
                late @ words.T
            )

    model = Late(POSITIONS["arange"])
    step = derived(model)
    ids = torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(run_in_chunks(step, ids, [4, 1, 6]), model(ids), rtol=1e-9, atol=1e-9)
    past, places = torch.zeros(2, dtype=torch.int64), torch.arange(LENGTH).expand(2, LENGTH)
    chosen = torch.tensor([LENGTH + 3, 7])
    logits, _ = step.program.run(ids, past, places, chosen, empty_caches(step, 2, LENGTH, 0))  # type: ignore[misc]
    expected = torch.stack([model(ids)[1, 3], model(ids)[0, 7]])
    torch.testing.assert_close(logits[0], expected, rtol=1e-9, atol=1e-9)
    assert not step.program.graph.find_nodes(op="call_function", target=torch.ops.torchweld.attention.default)


def test_new_rows_are_written_once_and_the_old_cache_is_not_read() -> None:
    """What lets an executable write in place."""
    step = step_of("alibi")
    for cache in step.program.placeholders[4:]:
        readers = [user for user in cache.users if user.target is not aten.sym_size.int]
        assert [str(reader.target) for reader in readers] == ["torchweld.append_rows.default"]


def test_source_program_stays_as_it_is() -> None:
    program = program_of("arange")
    before = str(program.graph)
    derive_step(program)
    assert str(program.graph) == before


def test_normalising_the_step_changes_nothing_in_its_numbers() -> None:
    model = MODELS["alibi"]()
    step = step_of("alibi")
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(step.program.graph_module, pass_)
    ids = torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run_in_chunks(step, ids, [4, 7]), model(ids), rtol=1e-9, atol=1e-9)


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


def test_a_fixed_batch_is_refused() -> None:
    program = capture(MODELS["none"](), (torch.arange(14).reshape(2, 7),), dynamic={"ids": [1]}, verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    refusal = derive_step(program)
    assert isinstance(refusal, Refusal) and "the batch of ids is fixed at 2" in refusal.reason


def test_a_mask_by_position_on_top_of_a_window_is_refused() -> None:
    model = Decoder(POSITIONS["none"], window=3, bias=lambda place: place.to(torch.float64) * 0.3)
    refusal = derive_step(normalised(model))
    assert isinstance(refusal, Refusal) and "left the ring" in refusal.reason


def test_sinks_that_follow_the_length_are_refused() -> None:
    def by_length(model: nn.Module, place: Tensor) -> Tensor:
        return learned_sinks(model, place) * place.to(torch.float64).mean()

    refusal = derive_step(normalised(Decoder(POSITIONS["none"], sinks=by_length)))
    assert isinstance(refusal, Refusal) and refusal.node is not None
    assert refusal.node.target is aten.mean.default or "mean" in refusal.reason, refusal


def test_sinks_from_another_input_are_refused() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = Decoder(POSITIONS["none"], sinks=lambda model, place: self.given)

        def forward(self, ids: Tensor, given: Tensor) -> Tensor:
            self.given = given
            result: Tensor = self.decoder(ids)
            return result

    inputs = (torch.arange(14).reshape(2, 7), torch.ones(HEADS, dtype=torch.float64))
    program = capture(Given().eval(), inputs, dynamic={"ids": [0, 1]}, verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    refusal = derive_step(program)
    assert isinstance(refusal, Refusal) and "depend on other inputs" in refusal.reason, refusal
