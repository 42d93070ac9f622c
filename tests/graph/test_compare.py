"""The oracle judges rightly: correct results of deep programs pass, every kind of planted fault is caught."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.generators.graphs import generate
from torchweld.graph.compare import (
    TOLERANCES,
    Comparison,
    NonFiniteException,
    compare,
    compare_logits,
    is_data_movement,
    reference_float64,
    rounding_spread,
    unit_roundoff,
)

F32 = torch.float32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads and lose much when the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _reference(*shape: int, seed: int = 0) -> Tensor:
    """Values whose rows differ much in size, as hidden states do; exactly representable in float32."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    sizes = 10.0 ** (torch.rand(*shape[:-1], 1, generator=generator) * 4 - 2)
    return (values * sizes).double()


def _judge(actual: Tensor, ref: Tensor, **how: object) -> Comparison:
    return compare((actual,), (ref,), dtype_of_compute=actual.dtype, **how)  # type: ignore[arg-type]


# --- planted faults ---


def _one_element(x: Tensor, row: int, amount: float) -> Tensor:
    x[row, x.shape[1] // 2] += amount * x[row].abs().max()
    return x


def _row_zeroed(x: Tensor, row: int, amount: float) -> Tensor:
    x[row] = 0.0
    return x


def _row_scaled(x: Tensor, row: int, amount: float) -> Tensor:
    x[row] *= 1.0 + amount
    return x


def _all_scaled(x: Tensor, row: int, amount: float) -> Tensor:
    return x * (1.0 + amount)


def _all_zero(x: Tensor, row: int, amount: float) -> Tensor:
    return torch.zeros_like(x)


def _rows_permuted(x: Tensor, row: int, amount: float) -> Tensor:
    return x.roll(1, 0)


def _columns_permuted(x: Tensor, row: int, amount: float) -> Tensor:
    return x.roll(1, 1)


def _nan_planted(x: Tensor, row: int, amount: float) -> Tensor:
    x[row, -1] = math.nan
    return x


def _infinity_planted(x: Tensor, row: int, amount: float) -> Tensor:
    x[row, 0] = math.inf
    return x


FAULTS = (
    _one_element,
    _row_zeroed,
    _row_scaled,
    _all_scaled,
    _all_zero,
    _rows_permuted,
    _columns_permuted,
    _nan_planted,
    _infinity_planted,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", FAULTS)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 40),
    columns=st.integers(2, 70),
    size=st.floats(2.0, 100.0),
)
@settings(max_examples=15, deadline=None)
def test_every_fault_is_caught(
    fault: Callable[[Tensor, int, float], Tensor],
    dtype: torch.dtype,
    seed: int,
    rows: int,
    columns: int,
    size: float,
) -> None:
    ref = _reference(rows, columns, seed=seed)
    right = ref.to(dtype)
    assert _judge(right, ref)
    # The amount is relative to what is granted without a yardstick: twice the bound has to be seen.
    amount = size * TOLERANCES[dtype].alone * unit_roundoff(dtype)
    assert not _judge(fault(right.clone(), seed % rows, amount), ref)


@given(seed=st.integers(0, 10_000), fault=st.sampled_from(FAULTS))
@settings(max_examples=60, deadline=None)
def test_a_yardstick_makes_the_oracle_sharper(
    seed: int, fault: Callable[[Tensor, int, float], Tensor]
) -> None:
    ref = _reference(17, 33, seed=seed)
    right = ref.float()
    assert _judge(right, ref, eager=(right.clone(),))
    assert not _judge(fault(right.clone(), seed % 17, 1e-5), ref, eager=(right.clone(),))


def test_what_the_common_oracle_lets_through_is_caught() -> None:
    ref = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).double()
    off, row, narrow, zeroed = ref.float(), ref.float(), ref.bfloat16(), ref.float()
    off[3, 5] += 0.09
    row[7] += 0.003
    narrow[0, 0] += 3.0
    zeroed[:15] = 0.0
    for wrong in (off, row, narrow, zeroed, ref.float() * 1.5):
        assert not _judge(wrong, ref)
    verdict = _judge(off, ref)
    assert verdict.worst_index == (0, 3, 5)
    assert verdict.max_abs == pytest.approx(0.09, rel=1e-3)
    assert "1 of 1000000 elements" in verdict.reasons[0] and "(3, 5)" in verdict.reasons[0]


# --- correct programs pass ---


def _layer(x: Tensor, w: dict[str, Tensor], other_order: bool) -> Tensor:
    """One pre-norm decoder layer; `other_order` computes the same by other sums, as a fused kernel would."""

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        if not other_order:
            return x @ weight.t()
        pieces = [x[..., i : i + 16] @ weight[:, i : i + 16].t() for i in range(0, x.shape[-1], 16)]
        return torch.stack(pieces).flip(0).sum(0)

    def norm(x: Tensor) -> Tensor:
        if not other_order:
            return torch.rms_norm(x, x.shape[-1:], eps=1e-6)
        return x / ((x * x).flip(-1).mean(-1, keepdim=True) + 1e-6).sqrt()

    q, k, v = (linear(norm(x), w[name]).unflatten(-1, (4, -1)).transpose(0, 1) for name in "qkv")
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True) if other_order else scores.softmax(-1)
    x = x + linear((weights @ v).transpose(0, 1).flatten(1), w["o"])
    gate = linear(norm(x), w["g"])
    active = gate * torch.sigmoid(gate) if other_order else torch.nn.functional.silu(gate)
    return x + linear(active * linear(norm(x), w["u"]), w["d"])


def _deep(dtype: torch.dtype, other_order: bool, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "q": (64, 64),
        "k": (64, 64),
        "v": (64, 64),
        "o": (64, 64),
        "g": (160, 64),
        "u": (160, 64),
        "d": (64, 160),
    }
    x = torch.randn(20, 64, generator=generator).to(dtype)
    for _ in range(30):
        weights = {
            name: torch.randn(shape, generator=generator).to(F32) * std for name, shape in shapes.items()
        }
        x = _layer(x, {name: w.to(dtype) for name, w in weights.items()}, other_order)
    return x


@pytest.mark.parametrize("std", [0.05, 0.2])
def test_thirty_layers_in_another_order_pass_and_faults_in_them_do_not(std: float) -> None:
    ref, eager, fused = (_deep(*how, std) for how in ((torch.float64, False), (F32, False), (F32, True)))
    assert not torch.equal(eager, fused)
    verdict = _judge(fused, ref, eager=(eager,))
    assert verdict, verdict.reasons
    assert verdict.loosest < 1e-3
    for fault in FAULTS:
        assert not _judge(fault(fused.clone(), 7, 2e-3), ref, eager=(eager,)), fault.__name__


def test_cancellation_passes_with_a_spread_and_not_by_luck() -> None:
    """A sum whose terms cancel has an error far beyond u * |sum|; the disturbed runs know how far."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.sum.dim_IntList, (x, [-1])),))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    values = torch.randn(1, 501, generator=torch.Generator().manual_seed(3))
    values[0, -1] = -values[0, :-1].double().sum().float()
    reference, spread = reference_float64(module, (values,)), rounding_spread(module, (values,), F32)
    total = torch.zeros(1)
    for column in values.flip(-1).unbind(-1):
        total = total + column
    in_another_order = (total,)
    assert not compare(in_another_order, reference, dtype_of_compute=F32)
    assert compare(in_another_order, reference, dtype_of_compute=F32, spread=spread)
    assert not compare((in_another_order[0] + 1e-2,), reference, dtype_of_compute=F32, spread=spread)
    assert compare(in_another_order, reference, dtype_of_compute=F32, condition=1e6)


def test_generated_programs_pass_and_faults_in_them_are_caught() -> None:
    caught = planted = 0
    for seed in range(60):
        case = generate(seed, dtype=F32)
        module, actual = case.with_fake_values(), case.module(*case.inputs)
        reference = reference_float64(module, case.inputs)
        spread = rounding_spread(module, case.inputs, F32)
        moves = is_data_movement(module)
        verdict = compare(actual, reference, dtype_of_compute=F32, spread=spread, data_movement=moves)
        assert verdict, f"{case}\n{verdict.reasons}\n{case.code()}"
        for i, output in enumerate(actual):
            if not output.is_floating_point() or not output.numel() or not output.abs().max() > 0:
                continue
            wrong = output.clone(memory_format=torch.contiguous_format)
            place = int(wrong.abs().flatten().argmax())
            wrong.view(-1)[place] *= 1.01
            outputs = (*actual[:i], wrong, *actual[i + 1 :])
            planted += 1
            caught += not compare(outputs, reference, dtype_of_compute=F32, spread=spread)
    assert planted > 100
    assert caught >= 0.99 * planted, f"{caught} of {planted}"


@pytest.mark.parametrize(
    ("dtype", "amount"), [(F32, 2e-4), (torch.bfloat16, 0.15), (torch.float16, 0.05), (torch.float64, 1e-12)]
)
def test_without_a_yardstick_the_table_alone_is_this_sharp(dtype: torch.dtype, amount: float) -> None:
    ref = _reference(5, 9)
    assert not _judge(_one_element(ref.to(dtype, copy=True), 2, amount), ref)


def test_an_eager_row_that_is_right_by_luck_sets_no_standard() -> None:
    ref = _reference(9, 4)
    noisy = (ref * (1 + 1e-5)).float()
    lucky = noisy.clone()
    lucky[0] = ref[0].float()
    assert _judge(noisy, ref, eager=(lucky,))
    assert not _judge((ref * (1 + 2e-4)).float(), ref, eager=(lucky,))


def test_a_single_number_may_be_further_off_than_an_eager_one() -> None:
    ref = torch.tensor([[1.0]], dtype=torch.float64)
    eager, other, wrong = ((ref + error).float() for error in (2e-6, 1e-4, 1e-3))
    assert _judge(other, ref, eager=(eager,))
    assert not _judge(wrong, ref, eager=(eager,))


# --- exactness ---


@pytest.mark.parametrize(
    ("actual", "reference", "word"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2).double(), "shape"),
        (torch.zeros(2).int(), torch.zeros(2).long(), "dtype"),
        (torch.zeros(2), torch.zeros(2).long(), "dtype"),
        (
            torch.tensor([1, 2, 4]),
            torch.tensor([1, 2, 3]),
            "1 of 3 elements differ bitwise, first at (2,): 4",
        ),
        (torch.tensor([True]), torch.tensor([False]), "differ bitwise"),
        (3, 4, "value 3, expected 4"),
    ],
)
def test_shapes_dtypes_integers_and_bools_are_exact(actual: object, reference: object, word: str) -> None:
    verdict = compare((actual,), (reference,), dtype_of_compute=F32)
    assert not verdict and word in verdict.reasons[0]


def test_the_number_of_outputs_is_exact() -> None:
    one = torch.zeros(1)
    assert "2 outputs, expected 1" in compare((one, one), (one,), dtype_of_compute=F32).reasons[0]


def test_an_eager_run_fixes_the_dtype() -> None:
    ref = torch.ones(4, dtype=torch.float64)
    assert compare((ref.float(),), (ref,), dtype_of_compute=F32)
    assert not compare((ref.float(),), (ref,), dtype_of_compute=F32, eager=(ref.bfloat16(),))


def test_data_movement_is_exact_to_the_bit() -> None:
    ref = _reference(4, 5)
    moved = ref.float()
    assert _judge(moved, ref, data_movement=True)
    next_up = torch.nextafter(moved, torch.tensor(math.inf))
    assert _judge(next_up, ref) and not _judge(next_up, ref, data_movement=True)
    zero = torch.zeros(3)
    assert _judge(-zero, zero.double()) and not _judge(-zero, zero.double(), data_movement=True)


def test_empty_outputs_pass_and_scalars_are_rows() -> None:
    assert _judge(torch.zeros(0, 3), torch.zeros(0, 3).double())
    assert _judge(torch.tensor(1.0), torch.tensor(1.0).double())
    assert not _judge(torch.tensor(1.01), torch.tensor(1.0).double())


def test_a_row_of_zeros_grants_nothing() -> None:
    ref = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    wrong = ref.float()
    wrong[0, 1] = 1e-9
    assert not _judge(wrong, ref)


def test_an_unknown_dtype_of_compute_is_an_error() -> None:
    with pytest.raises(KeyError):
        compare((torch.zeros(1),), (torch.zeros(1),), dtype_of_compute=torch.int32)


# --- NaN and infinity ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_have_their_places(value: float) -> None:
    ref = _reference(3, 4)
    ref[1, 2] = value
    assert _judge(ref.float(), ref)
    for other in {0.0, math.nan, math.inf, -math.inf} - {value}:
        wrong = ref.float()
        wrong[1, 2] = other
        if not (math.isnan(other) and math.isnan(value)):
            assert not _judge(wrong, ref), other


def test_a_fully_masked_row_may_be_zero_only_if_named_and_only_wholly() -> None:
    ref = _reference(3, 4)
    ref[1] = math.nan
    zeros = ref.float()
    zeros[1] = 0.0
    half = zeros.clone()
    half[1, 0] = math.nan
    allowed = frozenset({NonFiniteException.FULLY_MASKED_ATTENTION_ROW})
    assert not _judge(zeros, ref)
    assert _judge(zeros, ref, exceptions=allowed)
    assert not _judge(half, ref, exceptions=allowed)


def test_a_wider_intermediate_may_save_an_overflow_only_if_named_and_right() -> None:
    ref = _reference(3, 4)
    eager = ref.half()
    eager[0, 0] = math.inf
    allowed = frozenset({NonFiniteException.WIDER_INTERMEDIATE})
    assert not _judge(ref.half(), ref, eager=(eager,))
    assert _judge(ref.half(), ref, eager=(eager,), exceptions=allowed)
    wrong = ref.half()
    wrong[0, 0] += 2 * ref[0].abs().max()
    assert not _judge(wrong, ref, eager=(eager,), exceptions=allowed)


# --- logits ---


def test_logits_agree_with_torch_and_name_the_first_disagreement() -> None:
    ref = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    mine = ref + 0.1 * torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(1))
    best = int(ref[1, 3].argmax())
    mine[1, 3, best] -= 10.0
    verdict = compare_logits(mine, ref)
    log_q, log_p = mine.double().log_softmax(-1), ref.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert verdict.kl_mean == pytest.approx(expected.mean().item(), rel=1e-9)
    assert verdict.kl_max == pytest.approx(expected.max().item(), rel=1e-9)
    agree = mine.argmax(-1) == ref.argmax(-1)
    assert verdict.top1_agreement == pytest.approx(agree.double().mean().item())
    assert verdict.first_disagreement == tuple((~agree).nonzero()[0].tolist())
    assert verdict.lost_gap > 0


def test_equal_logits_and_bad_logits() -> None:
    ref = torch.randn(3, 7)
    same = compare_logits(ref, ref)
    assert (same.kl_max, same.top1_agreement, same.first_disagreement, same.lost_gap) == (0.0, 1.0, None, 0.0)
    assert compare_logits(torch.full_like(ref, math.nan), ref).kl_max == math.inf
    with pytest.raises(ValueError, match="expected equal"):
        compare_logits(ref, ref[:2])
