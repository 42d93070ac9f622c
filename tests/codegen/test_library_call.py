"""What of a group has a form in ATen, and that damaged forms are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchweld.codegen.build_plan import BuiltPlan
from torchweld.codegen.library_call import LibraryCall, Operation, Product
from torchweld.codegen.library_runs import LibraryRuns
from torchweld.codegen.plan import SizeTable
from torchweld.codegen.plan_json import name_tensors, plan_from_json, plan_to_json
from torchweld.graph.capture import capture
from torchweld.graph.ops.dequantize import dequantize
from torchweld.optimizer.compile import Options, compile_program


class Layer(nn.Module):
    """float32 [B, S, 64] -> [B, S, 64], through views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, S, 64] -> [B, S, 64]."""
        y = self.up(self.norm(x))
        z: Tensor = self.down(F.silu(y))
        return x + z


@pytest.fixture(scope="module")
def plan() -> BuiltPlan:
    program = capture(Layer().eval(), (torch.randn(2, 5, 64),), {}, dynamic=True)
    compiled = compile_program(program, options=Options(threads=1))
    assert compiled.built is not None
    return compiled.built


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 4), length=st.integers(1, 40))
def test_launches_through_aten_compute_the_model_at_any_size(
    plan: BuiltPlan, batch: int, length: int
) -> None:
    assert not plan.not_in_library
    x, model = torch.randn(batch, length, 64), Layer().eval()
    runs = LibraryRuns(plan.plan, "f32")
    names = plan.plan.inputs[0].shape
    table = SizeTable(
        {str(size): value for size, value in zip(names, x.shape, strict=True) if size.is_Symbol}
    )
    values = {plan.plan.inputs[0].name: x} | {name: t.detach() for name, t in plan.plan.constants.items()}
    for launch in plan.plan.launches():
        for name in launch.written():
            values[name] = torch.full(table.shape(plan.plan.values[name]), torch.nan)
        places = [values[name] for name in launch.written()]
        runs.run(runs.prepare(launch, table), [values[name] for name in launch.read()], places)
    torch.testing.assert_close(values[plan.plan.outputs[0]], model(x), rtol=1e-5, atol=1e-5)


def test_a_plan_from_the_cache_has_the_same_forms(plan: BuiltPlan) -> None:
    tensors = dict(plan.plan.constants)
    data = plan_to_json(plan.plan, name_tensors(tensors))
    assert plan_from_json(data, tensors).library == plan.plan.library


def reason(model: Callable[..., Tensor], *inputs: Tensor) -> list[str]:
    compiled = compile_program(capture(model, inputs, {}, dynamic=True), options=Options(threads=1))
    assert compiled.built is not None and not compiled.built.plan.library
    return list(compiled.built.not_in_library.values())


def test_products_without_weights_are_refused() -> None:
    (said,) = reason(lambda a, b: a @ b, torch.randn(70, 8), torch.randn(8, 9))
    assert (
        "is not among the operations that ATen is asked for" in said
        or "products are not with weights" in said
    )


class Stored(nn.Module):
    """A linear with a weight of a file: float32 [rows, 64] -> [rows, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(64, 68, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [rows, 64] -> [rows, 64]."""
        return F.linear(x, dequantize(self.weight, "Q8_0", 64))


def test_stored_weights_are_refused() -> None:
    (said,) = reason(Stored().eval(), torch.randn(70, 64))
    assert said == "its weights are stored as Q8_0: ATen would need them decoded"


def test_other_dtypes_are_refused() -> None:
    linear = nn.Linear(64, 64).to(torch.bfloat16).eval()
    (said,) = reason(linear, torch.randn(70, 64, dtype=torch.bfloat16))
    assert said.endswith("is bfloat16, not float32")


def form(**changes: object) -> LibraryCall:
    linear = Operation("aten.linear.default", '[[{"value": 0}, {"value": 1}], {}]')
    good: dict[str, object] = {
        "inputs": 2, "operations": (linear,), "sizes": (), "results": (2,), "products": (Product(0, 1, 8, 8),),
        "rows": sympy.Integer(70),
    }  # fmt: skip
    return LibraryCall(**(good | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"operations": (Operation("aten.from_file.default", "[[], {}]"),)}, "from_file.default is none of"),
        (
            {"operations": (Operation("aten.relu.default", '[[{"value": 2}], {}]'),)},
            "there is no value 2 before it",
        ),
        (
            {"operations": (Operation("aten.relu.default", '[[{"size": 0}], {}]'),)},
            "there is no size 0 before it",
        ),
        ({"operations": (Operation("aten.relu.default", "[[{"),)}, "Expecting property name"),
        ({"results": (1,)}, "expected numbers of operations"),
        ({"results": ()}, "expected numbers of operations"),
        ({"products": (Product(1, 1, 8, 8),)}, "is no product of these operations"),
    ],
)
def test_forms_that_contradict_themselves_are_refused(changes: dict[str, object], said: str) -> None:
    assert form().results == (2,)
    with pytest.raises(ValueError, match=said):
        form(**changes)
