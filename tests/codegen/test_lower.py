"""From groups to kernels: buffers, sizes, parts, and what has no kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sympy import Integer
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.fusion_cases import FusionCase, kernel_of, lower, numbers, whole
from tests.passes.support import Case
from torchweld.codegen.ir import AttentionPart, Buffer, Kernel, MatmulPart, RowPart, size_symbol
from torchweld.codegen.lower import LoweredGroup, Lowerer, lower_group
from torchweld.graph.meaning import Unsupported
from torchweld.graph.ops import attention as _attention_op  # noqa: F401  registers torchweld::attention
from torchweld.graph.ops import rope as _rope_op  # noqa: F401  registers torchweld::rope
from torchweld.graph.rewrite import Refusal
from torchweld.graph.terms import Load, Op


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = torch.ops.torchweld.attention(q, k, v, None, "causal", 0, 0.5, 0.0)
    return result


def kinds(kernel: Kernel) -> list[type]:
    return [type(part) for part in kernel.parts]


def matmul_part(kernel: Kernel) -> MatmulPart:
    """The only part of a kernel."""
    (part,) = kernel.parts
    assert isinstance(part, MatmulPart)
    return part


# -- buffers and sizes ----------------------------------------------------------------------------------------


def test_buffers_are_inputs_in_order_of_use_and_then_outputs() -> None:
    kernel = lower(
        lambda m, x, r: F.linear(x, m.w, m.b) + r, numbers(5, 8), numbers(5, 6), w=numbers(6, 8), b=numbers(6)
    ).kernel
    five, six, eight = Integer(5), Integer(6), Integer(8)
    assert kernel.buffers == (
        Buffer("inputs_0", torch.float32, (five, eight), "input"),
        Buffer("w", torch.float32, (six, eight), "weight"),
        Buffer("b", torch.float32, (six,), "weight"),
        Buffer("inputs_1", torch.float32, (five, six), "input"),
        Buffer("add_out", torch.float32, (five, six), "output"),
    )
    assert kernel.sizes == ()
    assert [op.split(".")[1] for op in kernel.ops] == ["linear", "add"]
    assert all("test_lower.py" in source for source in kernel.sources)


def test_equal_names_get_numbers() -> None:
    kernel = lower(lambda m, x: (torch.exp(x), torch.exp(x + 1)), numbers(3)).kernel
    assert [buffer.name for buffer in kernel.buffers] == ["inputs_0", "exp_out", "exp_2_out"]


def test_a_stored_weight_is_bytes_with_a_format() -> None:
    kernel = lower(
        lambda m, x: F.linear(x, torch.ops.torchweld.dequantize(m.w, "Q8_0", 32)), numbers(5, 32),
        w=torch.zeros(6, 34, dtype=torch.uint8),
    ).kernel  # fmt: skip
    assert kernel.buffer("w") == Buffer("w", torch.uint8, (Integer(6), Integer(34)), "weight", "Q8_0")


def test_sizes_are_the_symbols_in_use_shortest_name_first() -> None:
    kernel = lower(lambda m, x: F.softmax(x, -1), numbers(2, 5, 4), dynamic=True).kernel
    shape = kernel.buffers[0].shape
    assert list(kernel.sizes) == sorted(
        (str(extent) for extent in shape[:2]), key=lambda name: (len(name), name)
    )
    assert shape[0] == size_symbol(str(shape[0])) and shape[2] == 4


def test_an_input_whose_shape_alone_is_read_is_no_buffer() -> None:
    case = Case(lambda m, x, y: torch.zeros_like(x) + y, numbers(3, 4), numbers(3, 4), dynamic=False)
    group = whole(case)
    lowered = lower_group(group, 2)
    assert [node.name for node in group.inputs] == ["inputs_0", "inputs_1"]
    assert lowered.input_positions == (1,)
    assert [buffer.name for buffer in lowered.kernel.buffers] == ["inputs_1", "add_out"]


def test_input_positions_follow_the_buffers() -> None:
    case = Case(lambda m, x, y: (y - x) * m.w, numbers(3, 4), numbers(3, 4), dynamic=False, w=numbers(4))
    group = whole(case)
    lowered = lower_group(group, 2)
    names = [group.inputs[position].name for position in lowered.input_positions]
    assert names == [buffer.name for buffer in lowered.kernel.buffers if buffer.role != "output"]


def test_too_many_buffers() -> None:
    def total(m: Any, *inputs: Tensor) -> Tensor:
        return sum(inputs[1:], inputs[0])

    lower(total, *[numbers(2)] * 47)
    with pytest.raises(Unsupported, match="49 buffers in one kernel, at most 48"):
        lower(total, *[numbers(2)] * 48)


def test_too_many_parts() -> None:
    inputs = [numbers(size) for size in range(2, 11)]
    lower(lambda m, *xs: tuple(x.exp() for x in xs), *inputs[:8])
    with pytest.raises(Unsupported, match="9 loop structures in one kernel, at most 8"):
        lower(lambda m, *xs: tuple(x.exp() for x in xs), *inputs)


def test_an_operation_without_a_rule() -> None:
    with pytest.raises(Unsupported, match=r"aten.cumsum.default: no rule gives its elements"):
        lower(lambda m, x: torch.cumsum(x, 0).exp(), numbers(3, 4))


# -- parts ----------------------------------------------------------------------------------------------------


def test_gate_and_up_share_a_loop_with_two_accumulators() -> None:
    kernel = lower(
        lambda m, x: F.silu(F.linear(x, m.gate)) * F.linear(x, m.up),
        numbers(5, 8),
        gate=numbers(6, 8),
        up=numbers(6, 8),
    ).kernel
    part = matmul_part(kernel)
    assert len(part.contracts) == 2 and len(part.stores) == 1
    assert [buffer.role for buffer in kernel.buffers] == ["input", "weight", "weight", "output"]


def test_an_accumulator_that_is_read_twice_is_one() -> None:
    part = matmul_part(
        lower(lambda m, x: (y := F.linear(x, m.w)) * torch.sigmoid(y), numbers(5, 8), w=numbers(6, 8)).kernel
    )
    assert len(part.contracts) == 1


def test_query_key_and_value_are_three_loops() -> None:
    kernel = lower(
        lambda m, x: (F.linear(x, m.q), F.linear(x, m.k), F.linear(x, m.v)), numbers(5, 8),
        q=numbers(12, 8), k=numbers(4, 8), v=numbers(4, 8),
    ).kernel  # fmt: skip
    assert kinds(kernel) == [MatmulPart] * 3
    assert [part.n.extent for part in kernel.parts if isinstance(part, MatmulPart)] == [12, 4, 4]


def test_rows_over_equal_extents_share_a_loop() -> None:
    kernel = lower(
        lambda m, x, y: (x.exp(), F.softmax(y, -1), y.sum(-1)), numbers(3, 4), numbers(3, 4)
    ).kernel
    assert [len(part.stores) for part in kernel.parts] == [2, 1], "the sum has other extents"
    first = kernel.parts[0]
    assert isinstance(first, RowPart) and [axis.extent for axis in first.grid] == [3]


def test_a_shared_loop_renames_data_dependent_indices() -> None:
    """Both gathers are read at the one loop's variables."""
    case = FusionCase(
        lambda m, i, j: (F.embedding(i, m.a), F.embedding(j, m.b)), torch.tensor([2, 0]), torch.tensor([1, 1]),
        a=numbers(3, 4), b=numbers(3, 4, seed=1),
    )  # fmt: skip
    case.groups.contract([group.id for group in case.groups.topological()])
    kernel = case.kernel("embedding")
    (part,) = kernel.parts
    assert isinstance(part, RowPart) and len(part.stores) == 2 and len(kernel.indirects) == 2
    used = {symbol for entry in kernel.indirects for term in (entry.term,) for symbol in loop_variables(term)}
    assert used == {part.grid[0].symbol}
    case.assert_fused_numbers()


def loop_variables(term: Any) -> set[Any]:
    """Symbols of the index expressions of a term's loads."""
    if isinstance(term, Load):
        return {symbol for expr in term.index for symbol in expr.free_symbols}
    return {symbol for arg in getattr(term, "args", ()) for symbol in loop_variables(arg)}


def test_folds_over_other_axes_do_not_share_a_loop() -> None:
    """A sum per row and a sum per column need grids of their own."""
    kernel = lower(lambda m, x: (F.softmax(x, 0), F.softmax(x, 1)), numbers(4, 4)).kernel
    assert len(kernel.parts) == 2


def test_an_attention_beside_a_matmul() -> None:
    kernel = lower(
        lambda m, q, k, v, x: (attend(q, k, v), F.linear(x, m.w)),
        *[numbers(1, 2, 5, 4)] * 3,
        numbers(5, 8),
        w=numbers(6, 8),
    ).kernel
    assert kinds(kernel) == [AttentionPart, MatmulPart]


# -- concatenations -------------------------------------------------------------------------------------------


def test_a_concatenation_is_written_in_place() -> None:
    kernel = lower(
        lambda m, x, y: torch.cat([x.exp(), F.linear(y, m.w)], 1),
        numbers(3, 4),
        numbers(3, 8),
        w=numbers(6, 8),
    ).kernel
    assert kinds(kernel) == [RowPart, MatmulPart]
    rows, matmul = kernel.parts
    assert rows.stores[0].index[1].subs({axis.symbol: 0 for axis in (*rows.grid, *rows.inner)}) == 0  # type: ignore[union-attr]
    assert matmul.stores[0].index[1] == matmul.n.symbol + 4  # type: ignore[union-attr]
    assert [buffer.name for buffer in kernel.buffers if buffer.role == "output"] == ["cat_out"]


def test_a_stack_is_written_in_place() -> None:
    kernel = lower(lambda m, x, y: torch.stack([x.exp(), y.neg()], 1), numbers(3, 4), numbers(3, 4)).kernel
    assert [part.stores[0].index[1] for part in kernel.parts] == [0, 1]
    assert all(len(part.stores[0].index) == 3 for part in kernel.parts)


@pytest.mark.parametrize("count", [2, 8, 9, 16, 17])
def test_a_concatenation_has_a_kernel_whatever_its_length(count: int) -> None:
    case = FusionCase(lambda m, x: torch.cat([x + n for n in range(count)], -1), numbers(2, 3))
    cat = case.group_of("cat")
    assert cat.eager is None
    assert len(kernel_of(case.groups, cat).parts) == (count if count <= 8 else 1)
    case.assert_fused_numbers()


# -- work behind and in front of anchors ----------------------------------------------------------------------


def test_an_epilogue_through_heads_stores_where_the_result_lies() -> None:
    part = matmul_part(
        lower(
            lambda m, x: F.linear(x, m.w).view(5, 2, 3).transpose(0, 1) * 2, numbers(5, 8), w=numbers(6, 8)
        ).kernel
    )
    (row,) = part.rows
    head, place, column = part.stores[0].index
    assert place == row.symbol
    for n in range(6):
        at = {part.n.symbol: n}
        assert (head.subs(at), column.subs(at)) == (n // 3, n % 3)


def test_an_epilogue_through_a_batch_of_one_and_a_broadcast_in_front() -> None:
    part = matmul_part(
        lower(lambda m, x, y: F.linear(x, m.w) + y, numbers(5, 8), numbers(1, 1, 6), w=numbers(6, 8)).kernel
    )
    assert len(part.stores[0].index) == 3 and part.stores[0].index[0] == 0


def test_rope_behind_a_matmul_is_refused() -> None:
    """A feature and its partner stand in different columns: two accumulators would do the whole matmul twice."""

    def rotate(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        result: Tensor = torch.ops.torchweld.rope(
            F.linear(x, m.w).view(5, 2, 4).transpose(0, 1), cos, sin, False
        )
        return result

    inputs = numbers(5, 8), numbers(5, 4, seed=1), numbers(5, 4, seed=2)
    case = FusionCase(rotate, *inputs, w=numbers(8, 8, seed=3))
    with pytest.raises(ValueError, match="computed twice"):
        case.groups.contract([group.id for group in case.groups.topological()])


@pytest.mark.parametrize(
    "behind",
    [
        lambda y: F.rms_norm(y, (6,)),
        lambda y: F.layer_norm(y, (6,)),
        lambda y: F.softmax(y, -1),
        lambda y: y.sum(0),
        lambda y: y.argmin(-1),
    ],
)
def test_a_reduction_behind_a_matmul_is_refused(behind: Any) -> None:
    with pytest.raises(
        Unsupported, match="a reduction or a selection over the result of a matmul or an attention"
    ):
        lower(lambda m, x: behind(F.linear(x, m.w)), numbers(5, 8), w=numbers(6, 8))


def test_a_reduction_behind_an_attention_is_refused() -> None:
    with pytest.raises(
        Unsupported, match="a reduction or a selection over the result of a matmul or an attention"
    ):
        lower(lambda m, q, k, v: F.rms_norm(attend(q, k, v), (4,)), *[numbers(1, 2, 5, 4)] * 3)


def test_a_matmul_behind_an_attention_is_refused() -> None:
    with pytest.raises(
        Unsupported, match="a reduction or a selection over the result of a matmul or an attention"
    ):
        lower(lambda m, q, k, v: F.linear(attend(q, k, v), m.w), *[numbers(1, 2, 5, 4)] * 3, w=numbers(3, 4))


def test_an_index_that_is_reduced_in_the_same_kernel_is_refused() -> None:
    with pytest.raises(Unsupported, match="an index that is the result of a reduction in the same kernel"):
        lower(lambda m, x: F.embedding(x.argmax(-1), m.w), numbers(4, 8), w=numbers(8, 3))


def test_an_index_that_is_computed_is_legal() -> None:
    kernel = lower(lambda m, i: F.embedding(i * 2 + 1, m.w), torch.tensor([0, 1]), w=numbers(8, 3)).kernel
    (indirect,) = kernel.indirects
    assert indirect.extent == 8 and isinstance(indirect.term, Op)


# -- equal structure ------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Scaled linears one behind the other."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in scales)
        self.scales = scales

    def forward(self, m: Any, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = layer(x) * scale
        return x


def kernels_of_layers(*scales: float) -> list[LoweredGroup]:
    case = FusionCase(Layers(*scales).requires_grad_(False), numbers(3, 8))
    for number in range(len(scales)):
        case.groups.contract((case.group_of("linear", number).id, case.group_of("mul", number).id))
    found = [case.groups.lowered[group.id] for group in case.groups.topological()]
    assert all(isinstance(lowered, LoweredGroup) for lowered in found)
    return [lowered for lowered in found if isinstance(lowered, LoweredGroup)]


def test_equal_layers_are_lowered_once() -> None:
    first, second, third = kernels_of_layers(2.0, 2.0, 2.0)
    assert second is third
    assert first is not second, "it reads the model's input, under that name"


def test_layers_that_differ_in_a_number_are_not_equal() -> None:
    _, second, third, fourth = kernels_of_layers(2.0, 2.0, 3.0, 3.0)
    assert second is not third and third is fourth


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda m, x, y: (x.neg().exp(), y.neg().exp()), (numbers(3), numbers(4))),
        (lambda m, x, y: (x.neg().exp(), y.neg().exp()), (numbers(3), numbers(3).double())),
        (lambda m, x, y: (x.neg().exp(), y.neg().abs()), (numbers(3), numbers(3))),
        (lambda m, x, y: (x.neg().sum(0), y.neg().sum(1)), (numbers(3, 3), numbers(3, 3))),
        (lambda m, x, y: (x.neg().sum(0), y.neg().sum(0, keepdim=True)), (numbers(3, 3), numbers(3, 3))),
        (
            lambda m, x, y: (torch.add(x.neg(), 1, alpha=2), torch.add(y.neg(), 1, alpha=3)),
            (numbers(3), numbers(3)),
        ),
    ],
    ids=["shape", "dtype", "operation", "argument", "flag", "keyword"],
)
def test_what_differs_is_not_lowered_once(function: Any, inputs: tuple[Tensor, ...]) -> None:
    """The readers of neg: their input has one name, and everything else is compared."""
    case = FusionCase(function, *inputs)
    last = [case.groups.owner[node] for node in case.graph_module.graph.output_node().all_input_nodes]
    one, other = (case.groups.lowered[number] for number in last)
    assert one is not other


def test_a_weight_is_not_an_input_of_the_same_name() -> None:
    """Executables pack weights."""
    case = FusionCase(lambda m, x: (m.neg.exp(), x.neg().exp()), numbers(3), neg=numbers(3))
    kernels = [kernel_of(case.groups, case.group_of("exp", n)) for n in range(2)]
    assert [kernel.buffer("neg").role for kernel in kernels] == ["weight", "input"]


def test_equal_readers_of_equal_names_are_lowered_once() -> None:
    case = FusionCase(lambda m, x, y: (x.neg().exp(), y.neg().exp()), numbers(3), numbers(3))
    last = [case.groups.owner[node] for node in case.graph_module.graph.output_node().all_input_nodes]
    assert case.groups.lowered[last[0]] is case.groups.lowered[last[1]]


def test_a_value_that_is_read_elsewhere_makes_another_kernel() -> None:
    """The same operations of inputs of the same name, but one of the groups has one more output."""

    def function(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = x.neg().exp()
        return kept.abs(), y.neg().exp().abs(), kept.sin()

    case = FusionCase(function, numbers(3), numbers(3))
    pairs = [(case.group_of("exp", n).id, case.group_of("abs", n).id) for n in range(2)]
    for pair in pairs:
        case.groups.contract(pair)
    kernels = [kernel_of(case.groups, case.group_of("exp", n)) for n in range(2)]
    assert [len(kernel.buffers) for kernel in kernels] == [3, 2]
    case.assert_fused_numbers()


def test_a_refusal_is_remembered_and_names_the_group_it_is_asked_about() -> None:
    def two(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.neg()
        return torch.cumsum(h, 0).neg(), torch.cumsum(h.abs(), 0)

    case = FusionCase(two, numbers(3))
    lowerer = Lowerer(2)
    first, second = (lowerer(case.group_of("cumsum", n)) for n in range(2))
    assert isinstance(first, Refusal) and isinstance(second, Refusal)
    assert first.reason == second.reason == "aten.cumsum.default: no rule gives its elements"
    assert first.node is not second.node


def test_cores_count_in_the_work_only() -> None:
    case = Case(lambda m, x: F.linear(x.tanh(), m.w), numbers(5, 8), dynamic=False, w=numbers(6, 8))
    one, many = lower_group(whole(case), 1), lower_group(whole(case), 4)
    assert many.work.flops - one.work.flops == 3 * 5 * 8 * 14
    assert (many.work.reads, many.work.writes, many.work.parts) == (one.work.reads, one.work.writes, 1)
