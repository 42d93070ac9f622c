"""Rows appended to a cache in place: what is written, what stays, what is refused, and a whole decoder step."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional as F

from tests.codegen.cached_cases import plan_of_graph, symbolic_graph
from tests.codegen.cpp_cases import same_bits
from tests.pipeline.stages import run_interpreted
from torchweld.codegen.build_plan import BuiltPlan
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import AttentionPart
from torchweld.codegen.lower import LoweredGroup, Lowerer, lower_group
from torchweld.codegen.plan import EagerStep, Launch, PlanError
from torchweld.codegen.plan_json import plan_from_json, plan_to_json
from torchweld.codegen.reference import group_reference
from torchweld.graph.groups import Group
from torchweld.graph.rewrite import Refusal

ops = torch.ops.torchweld
HEADS, KEY_HEADS, WIDTH, HIDDEN = 4, 2, 8, 32


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- one append -----------------------------------------------------------------------------------------------


def append(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor]:
    return (ops.append_rows(cache, rows.exp().transpose(1, 2), past),)


@functools.cache
def append_plan(dtype: torch.dtype = torch.float32) -> BuiltPlan:
    inputs = (
        numbers(2, KEY_HEADS, 11, WIDTH).to(dtype),
        numbers(2, 3, KEY_HEADS, WIDTH).to(dtype),
        torch.tensor([5, 2]),
    )
    return plan_of_graph(symbolic_graph(append, inputs, {0: (0, 2), 1: (0, 1), 2: (0,)}))


@functools.cache
def append_executable(threads: int = 1, dtype: torch.dtype = torch.float32) -> Executable:
    return Executable(append_plan(dtype).plan, threads=threads)


@given(
    past=st.lists(st.integers(0, 1000), max_size=3), count=st.integers(0, 9), spare=st.integers(0, 9),
    threads=st.sampled_from([1, 2]), seed=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_rows_go_to_their_slots_and_nothing_else_changes(
    past: list[int], count: int, spare: int, threads: int, seed: int
) -> None:
    cache = numbers(len(past), KEY_HEADS, max(1, count + spare), WIDTH, seed=seed)
    rows, lengths = (
        numbers(len(past), count, KEY_HEADS, WIDTH, seed=seed + 9),
        torch.tensor(past, dtype=torch.int64),
    )
    (expected,) = append(cache, rows, lengths)
    (interpreted,) = run_interpreted(append_plan(), (cache, rows, lengths))
    assert isinstance(interpreted, Tensor)
    torch.testing.assert_close(interpreted, expected, rtol=1e-6, atol=0)
    given_cache = cache.clone()
    (result,) = append_executable(threads)(given_cache, rows, lengths)
    assert result is given_cache
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
    slots = {(before + t) % cache.shape[2] for before in past[:1] for t in range(count)}
    for slot in range(cache.shape[2]) if past else ():
        if slot not in slots:
            assert torch.equal(result[0, :, slot], cache[0, :, slot])


def test_a_16_bit_cache() -> None:
    cache, rows = numbers(1, KEY_HEADS, 6, WIDTH).bfloat16(), numbers(1, 3, KEY_HEADS, WIDTH).bfloat16()
    past = torch.tensor([4])
    (expected,) = append(cache, rows, past)
    (result,) = append_executable(1, torch.bfloat16)(cache, rows, past)
    assert torch.equal(result, expected)


def test_calls_with_other_caches_between_them_and_with_errors_write_the_right_one() -> None:
    """An executable looks closely only at a cache that it did not see at the call before."""
    executable = append_executable()
    rows = torch.zeros(1, 2, KEY_HEADS, WIDTH)  # whose exp is exact
    first, second = (numbers(1, KEY_HEADS, 9, WIDTH, seed=seed) for seed in (1, 2))
    for step, cache in enumerate((first, first, second, first, second, second)):
        past = torch.tensor([step])
        (expected,) = append(cache, rows, past)
        other = second if cache is first else first
        before = other.clone()
        (result,) = executable(cache, rows, past)
        assert result is cache and torch.equal(cache, expected) and torch.equal(other, before)
        with pytest.raises(ValueError, match="dimension"):
            executable(other, rows[:, :, :1], past)
    grown = first.clone()
    first.set_(torch.cat([grown, grown], 2))  # type: ignore[no-untyped-call]
    (expected,) = append(first, rows, past)
    assert torch.equal(executable(first, rows, past)[0], expected) and torch.equal(first, expected)
    first.set_(grown.transpose(2, 3))  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="contiguous"):
        executable(first, rows, past)


def test_the_plan_has_one_launch_that_moves_the_rows_only() -> None:
    built = append_plan()
    (step,) = built.plan.steps
    assert isinstance(step, Launch) and step.updated() == step.written() == ("append_rows",)
    assert built.plan.in_place == {"append_rows": built.plan.inputs[0].name}
    assert [buffer.role for buffer in step.kernel.buffers] == ["input", "input", "update"]
    again = plan_from_json(plan_to_json(built.plan, lambda tensor: ""), {})
    assert again.in_place == built.plan.in_place


def test_cost_is_that_of_the_rows() -> None:
    cache, rows, past = (
        numbers(2, KEY_HEADS, 1000, WIDTH),
        numbers(2, 3, KEY_HEADS, WIDTH),
        torch.tensor([5, 2]),
    )
    module = symbolic_graph(append, (cache, rows, past), {})
    lowered = Lowerer(2)(_computing(module))
    assert isinstance(lowered, LoweredGroup)
    row_bytes = 2 * 3 * KEY_HEADS * WIDTH * 4
    assert (lowered.work.writes, lowered.work.reads) == (row_bytes, row_bytes + 2 * 8)


def _computing(module: fx.GraphModule) -> Group:
    targets = (torch.ops.aten.exp.default, ops.append_rows.default)
    return Group(0, tuple(node for node in module.graph.nodes if node.target in targets))


def test_the_reference_of_a_dump_is_plain_torch() -> None:
    inputs = (numbers(2, KEY_HEADS, 11, WIDTH), numbers(2, 3, KEY_HEADS, WIDTH), torch.tensor([5, 2]))
    group = _computing(symbolic_graph(append, inputs, {0: (0, 2), 1: (0, 1), 2: (0,)}))
    lowered = lower_group(group, 2)
    source = group_reference(group, lowered)
    assert "torchweld." not in source
    names: dict[str, Any] = {"torch": torch}
    exec(source, names)
    cache, rows, past = inputs
    (found,) = names["reference"](rows, past, cache, *(11, 2, 3))
    assert torch.equal(found, append(*inputs)[0])


def test_the_callers_tensor_must_be_contiguous_and_its_own() -> None:
    rows, past = numbers(1, 2, KEY_HEADS, WIDTH), torch.tensor([1])
    strided = numbers(1, KEY_HEADS, WIDTH, 5).transpose(2, 3)
    with pytest.raises(ValueError, match=r"input 0 \(.*\), which is updated in place: expected a contiguous"):
        append_executable()(strided, rows, past)
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        append_executable()(numbers(1, 1, 5, WIDTH).expand(1, KEY_HEADS, 5, WIDTH), rows, past)


def test_one_memory_for_two_caches_is_an_error() -> None:
    def both(a: Tensor, b: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        return ops.append_rows(a, rows, past), ops.append_rows(b, rows + 1, past)

    cache, rows, past = numbers(1, KEY_HEADS, 5, WIDTH), numbers(1, KEY_HEADS, 2, WIDTH), torch.tensor([4])
    built = plan_of_graph(symbolic_graph(both, (cache, cache.clone(), rows, past), {}))
    assert len(built.plan.launches()) == 1
    executable = Executable(built.plan, threads=1)
    with pytest.raises(ValueError, match="expected memory of its own, got that of"):
        executable(cache, cache, rows, past)
    found = executable(cache.clone(), cache.clone(), rows, past)
    for got, want in zip(found, both(cache, cache, rows, past), strict=True):
        assert torch.equal(got, want)


# -- what is no update in place -------------------------------------------------------------------------------


def read_before(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    return ops.append_rows(cache, rows, past), cache.sum(2)


def read_through_a_view(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    return ops.append_rows(cache, rows, past), cache.reshape(-1) * 2


def handed_through(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    return ops.append_rows(cache, rows, past), cache


def appended_twice(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    return ops.append_rows(cache, rows, past), ops.append_rows(cache, rows * 2, past)


def computed(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor]:
    return (ops.append_rows(cache * 2, rows, past),)


def onto_itself(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor]:
    return (ops.append_rows(cache, cache, past),)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (read_before, "reads the cache"),
        (read_through_a_view, "reads the cache"),
        (handed_through, "output reads the cache"),
        (appended_twice, "reads the cache"),
        (computed, "is computed, not given to the program"),
        (onto_itself, "append_rows reads the cache"),
    ],
)
def test_a_cache_that_is_needed_as_it_was_is_copied(function: Any, reason: str) -> None:
    inputs = (numbers(1, KEY_HEADS, 5, WIDTH), numbers(1, KEY_HEADS, 2, WIDTH, seed=1), torch.tensor([4]))
    built = plan_of_graph(symbolic_graph(function, inputs, {}))
    eager = [step for step in built.plan.steps if isinstance(step, EagerStep)]
    assert eager and all(
        reason in step.reason and "copy" in step.reason for step in eager if "views" not in step.reason
    )
    assert not built.plan.in_place
    copies = [tensor.clone() for tensor in inputs]
    outputs = Executable(built.plan, threads=1)(*copies)
    for found, expected in zip(outputs, function(*inputs), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(copies[0], inputs[0])


def test_a_size_of_the_cache_is_no_value_of_it() -> None:
    def function(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.arange(cache.shape[2]) * 2
        twice = torch.cumsum(torch.ones(2 * cache.shape[2]), 0)  # eager: there is no kernel for it
        return ops.append_rows(cache, rows.exp(), past), places, twice

    inputs = (numbers(1, KEY_HEADS, 5, WIDTH), numbers(1, KEY_HEADS, 2, WIDTH, seed=1), torch.tensor([4]))
    module = symbolic_graph(function, inputs, {0: (2,)})
    (cache, *_) = module.graph.find_nodes(op="placeholder")
    assert len(cache.users) == 2, "the size is read from the cache"
    built = plan_of_graph(module)
    assert built.plan.in_place == {"append_rows": cache.name}
    assert any(isinstance(step, EagerStep) for step in built.plan.steps)
    copies = [tensor.clone() for tensor in inputs]
    outputs = Executable(built.plan, threads=1)(*copies)
    assert outputs[0] is copies[0]
    for found, expected in zip(outputs, function(*inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_reads_the_updated_cache_is_another_kernel() -> None:
    def function(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        updated = ops.append_rows(cache, rows, past)
        return updated, updated.exp()

    inputs = (numbers(1, KEY_HEADS, 5, WIDTH), numbers(1, KEY_HEADS, 2, WIDTH, seed=1), torch.tensor([4]))
    module = symbolic_graph(function, inputs, {})
    nodes = tuple(node for node in module.graph.nodes if node.op == "call_function")
    refusal = Lowerer(2)(Group(0, nodes))
    assert isinstance(refusal, Refusal) and "what reads the cache is another kernel" in refusal.reason
    built = plan_of_graph(module)
    assert len(built.plan.launches()) == 2
    for found, expected in zip(
        Executable(built.plan, threads=2)(*[t.clone() for t in inputs]), function(*inputs), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_plan_that_reads_the_old_value_is_refused() -> None:
    plan = append_plan().plan
    name = plan.inputs[0].name
    for broken in (
        {"outputs": (*plan.outputs, name)},
        {"in_place": {}},
        {"in_place": {"append_rows": "nowhere"}},
        {"steps": (*plan.steps, EagerStep(fx.symbolic_trace(lambda x: x + 1), (name,), ("late",), "test"))},
    ):
        with pytest.raises(PlanError, match=r"step 0 .* updates"):
            type(plan)(**{**vars(plan), **broken}).check()


# -- a decoder layer ------------------------------------------------------------------------------------------


def step_of_layer(
    x: Tensor, past: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x [1, B * T, hidden], past [B], cos and sin [B * T, width]: what the cache derivation makes of a layer."""
    norm, wq, wk, wv, wo = weights
    batch, rows = past.shape[0], cos.shape[0]
    normed = F.rms_norm(x, (HIDDEN,), norm, 1e-6)

    def heads(value: Tensor, count: int, turned: bool) -> Tensor:
        value = value.view(1, rows, count, WIDTH).transpose(1, 2)
        if turned:
            value = value * cos + torch.cat((-value[..., WIDTH // 2 :], value[..., : WIDTH // 2]), -1) * sin
        return value.transpose(1, 2).reshape(batch, rows // batch, count, WIDTH).transpose(1, 2)

    q, k, v = (F.linear(normed, w) for w in (wq, wk, wv))
    keys = ops.append_rows(keys, heads(k, KEY_HEADS, True), past)
    values = ops.append_rows(values, heads(v, KEY_HEADS, False), past)
    mixed = ops.cached_attention(
        heads(q, HEADS, True), keys, values, past, None, None, "causal", 0, WIDTH**-0.5, 0.0
    )
    return x + F.linear(mixed.transpose(1, 2).reshape(1, rows, HEADS * WIDTH), wo), keys, values


def layer_inputs(past: list[int], count: int, capacity: int, seed: int = 0) -> tuple[Tensor, ...]:
    batch = len(past)
    weights = [
        numbers(out, HIDDEN, seed=out) / 6
        for out in (HEADS * WIDTH, KEY_HEADS * WIDTH, KEY_HEADS * WIDTH + 0)
    ]
    caches = [numbers(batch, KEY_HEADS, capacity, WIDTH, seed=seed + i) for i in (1, 2)]
    angles = numbers(batch * count, WIDTH, seed=seed + 3)
    x = numbers(1, batch * count, HIDDEN, seed=seed + 4)
    return (
        x,
        torch.tensor(past),
        angles.cos(),
        angles.sin(),
        *caches,
        numbers(HIDDEN),
        *weights,
        weights[0].T.contiguous(),
    )


@functools.cache
def layer_plan() -> BuiltPlan:
    module = symbolic_graph(
        step_of_layer, layer_inputs([5, 2], 3, 11), {0: (1,), 1: (0,), 2: (0,), 3: (0,), 4: (0, 2), 5: (0, 2)}
    )
    return plan_of_graph(module)


@functools.cache
def layer_executable(threads: int) -> Executable:
    return Executable(layer_plan().plan, threads=threads)


def test_the_rows_are_stored_by_the_kernel_that_makes_them() -> None:
    launches = layer_plan().plan.launches()
    writers = [launch for launch in launches if launch.updated()]
    assert len(writers) == 1 and set(writers[0].updated()) == {"append_rows", "append_rows_1"}
    attention = next(launch for launch in launches if isinstance(launch.kernel.parts[0], AttentionPart))
    assert {"append_rows", "append_rows_1"} <= set(attention.read())


@pytest.mark.parametrize(("past", "count"), [([0], 1), ([5, 2], 3), ([70, 0, 9], 1), ([130], 9)])
def test_a_layer_equals_eager(past: list[int], count: int) -> None:
    inputs = layer_inputs(past, count, max(past) + count + 3)
    expected = step_of_layer(*inputs)
    for found, want in zip(run_interpreted(layer_plan(), inputs), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    for threads in (1, 2):
        copies = [tensor.clone() for tensor in inputs]
        results = layer_executable(threads)(*copies)
        assert results[1] is copies[4] and results[2] is copies[5]
        for result, want in zip(results, expected, strict=True):
            torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-5)


def test_rows_fed_one_by_one_have_the_bits_of_rows_fed_together() -> None:
    inputs = layer_inputs([60], 8, 80)
    together = [tensor.clone() for tensor in inputs]
    outputs = layer_executable(2)(*together)[0]
    one_by_one = [tensor.clone() for tensor in inputs]
    for row in range(8):
        x, _, cos, sin = (
            tensor[..., row : row + 1, :].contiguous() if tensor.dim() > 1 else tensor
            for tensor in inputs[:4]
        )
        (output, *_) = layer_executable(1)(x, torch.tensor([60 + row]), cos, sin, *one_by_one[4:])
        assert same_bits(output[:, 0].contiguous(), outputs[:, row].contiguous())
    assert all(same_bits(a, b) for a, b in zip(one_by_one[4:6], together[4:6], strict=True))
