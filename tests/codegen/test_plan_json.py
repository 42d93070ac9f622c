"""Plans as JSON: what comes back prints the same C++, shares what was shared, and is never a damaged plan."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn

from tests import kernels_by_hand
from tests.tiny_models import tiny_inputs, tiny_model
from torchweld.codegen.build_plan import BuiltPlan, build_plan
from torchweld.codegen.cpp import print_unit
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Bind, Buffer, Kernel, RowPart, Store, part_terms, size_symbol
from torchweld.codegen.plan import EagerStep, Launch, Plan, ValueSpec
from torchweld.codegen.plan_json import SHARED, name_tensors, plan_from_json, plan_to_json
from torchweld.codegen.record_json import DamagedRecord, NotStorable, record_from_json, record_to_json
from torchweld.graph.capture import capture
from torchweld.graph.index import FloorDiv, Mod
from torchweld.graph.target import Target
from torchweld.graph.terms import Axis, Const, Load, Op, Term, axis_symbol, const
from torchweld.optimizer.pipeline import Settings, fuse, run_graph_passes, size_hints

TARGET = Target("test", 10.0, 100.0, 100.0, 100.0, 1.0, 1 << 20, 1 << 24, 2)
HAND_MADE = (
    kernels_by_hand.add_relu_broadcast, kernels_by_hand.rms_norm, kernels_by_hand.softmax_argmax,
    kernels_by_hand.gather_and_concat, kernels_by_hand.batched_matmul_pair, kernels_by_hand.norm_gated_linear,
    kernels_by_hand.attention,
)  # fmt: skip


def built_plan(model: nn.Module, inputs: tuple[Tensor, ...]) -> BuiltPlan:
    program = capture(model, inputs, verify=False)
    settings = Settings(TARGET, size_hints(program, inputs))
    return build_plan(fuse(run_graph_passes(program, settings), settings))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers(remove_duplicate=False))


def source(plan: Plan) -> str:
    return print_unit([launch.kernel for launch in plan.launches()]).source


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.bfloat16), ("gemma3_text", torch.float32), ("gpt2", torch.float32), ("bert", torch.float32)],
    ids=str,
)  # fmt: skip
def test_plans_of_models_come_back_whole(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(kind, tmp_path, dtype=dtype)
    tensors = tensors_of(model)
    plan = built_plan(model, tiny_inputs(kind)).plan
    data = plan_to_json(plan, name_tensors(tensors))
    again = plan_from_json(json.loads(json.dumps(data)), tensors)
    assert source(again) == source(plan)
    assert (again.inputs, again.outputs, again.sizes) == (plan.inputs, plan.outputs, plan.sizes)
    assert list(again.values.items()) == list(plan.values.items())
    assert [step.arguments for step in again.steps] == [step.arguments for step in plan.steps]
    assert len({id(s.kernel) for s in again.launches()}) == len({id(s.kernel) for s in plan.launches()})
    assert plan_to_json(again, name_tensors(tensors)) == data
    inputs = tiny_inputs(kind, 3, 5)
    for ours, theirs in zip(Executable(again)(*inputs), Executable(plan)(*inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", HAND_MADE, ids=lambda make: make.__name__)
def test_kernels_keep_their_text_and_their_sharing(make: Callable[[], Kernel]) -> None:
    kernel = make()
    again = record_from_json(record_to_json(kernel, Kernel, SHARED), Kernel, SHARED)
    assert print_unit([again]).source == print_unit([kernel]).source
    assert distinct_terms(again) == distinct_terms(kernel)


def distinct_terms(kernel: Kernel) -> int:
    return len({id(term) for part in kernel.parts for term in part_terms(part)})


def test_every_term_has_a_form() -> None:
    ours = {kind for kind in Term.__subclasses__() if kind.__module__ == Term.__module__}
    assert ours <= set(SHARED)


def round_trip(value: Any, kind: Any) -> Any:
    return record_from_json(json.loads(json.dumps(record_to_json(value, kind, SHARED))), kind, SHARED)


@pytest.mark.parametrize("value", [0.1, -0.0, 1e-45, math.inf, -math.inf, math.nan, 2**63 - 1, -5, True, 0])
def test_literals_keep_value_and_type(value: float | int | bool) -> None:
    again = round_trip(Const(torch.float32, value), Const).value
    assert type(again) is type(value)
    assert repr(again) == repr(value)


def test_expressions_come_back_as_they_stood() -> None:
    i, s = axis_symbol("i"), size_symbol("s0")
    unevaluated = sympy.Mul(2, sympy.Add(i, s), evaluate=False)
    for expr in (sympy.Integer(-3), i * s + 4, FloorDiv(i, s) - Mod(i, 7), s**2, unevaluated):
        again = round_trip(Axis("a", expr), Axis).extent
        assert again == expr
        assert again.args == expr.args
    assert round_trip(Axis("a", s), Axis).extent != axis_symbol("s0")


@pytest.mark.parametrize(
    "expr", [sympy.Max(size_symbol("s0"), 3), sympy.Symbol("x"), sympy.Rational(1, 2)], ids=str
)
def test_other_expressions_are_refused(expr: sympy.Expr) -> None:
    with pytest.raises(NotStorable, match="no JSON form"):
        record_to_json(Axis("a", expr), Axis)


def weighted_plan() -> tuple[Plan, dict[str, Tensor]]:
    """y[i] = x[i] * w[i], 5 elements, with w a constant."""
    n = axis_symbol("i")
    five = (sympy.Integer(5),)
    buffers = tuple(
        Buffer(name, torch.float32, five, role)
        for name, role in (("x", "input"), ("w", "weight"), ("y", "output"))
    )
    x, w = (Load(torch.float32, name, (n,)) for name in "xw")
    store = Store("y", (n,), Op(torch.float32, "mul", (x, w)))
    part = RowPart((Axis("i", five[0]),), (), (), (store,))
    kernel = Kernel("scale", buffers, (), (part,))
    weight = torch.arange(5.0)
    spec = ValueSpec("x", torch.float32, five)
    y = {"y": replace(spec, name="y")}
    return Plan((spec,), {"w": weight}, y, (Launch(kernel, ("x", "w", "y")),), ("y",), ()), {
        "layer.weight": weight
    }


def test_constants_are_names_and_follow_the_model() -> None:
    plan, tensors = weighted_plan()
    data = plan_to_json(plan, name_tensors(tensors))
    again = plan_from_json(data, {"layer.weight": torch.full((5,), 3.0)})
    assert torch.equal(Executable(again)(torch.ones(5))[0], torch.full((5,), 3.0))
    assert "layer.weight" in json.dumps(data)


def test_folded_constants_and_views_are_refused() -> None:
    plan, tensors = weighted_plan()
    for other in (tensors["layer.weight"].clone(), torch.arange(9.0)[::2]):
        with pytest.raises(NotStorable, match="no tensor of the model"):
            plan_to_json(replace(plan, constants={"w": other}), name_tensors(tensors))


def test_eager_steps_are_refused() -> None:
    plan, tensors = weighted_plan()
    graph = fx.Graph()
    graph.output((graph.placeholder("y"),))
    step = EagerStep(fx.GraphModule(nn.Module(), graph), ("y",), ("z",), "no kernel")
    with pytest.raises(NotStorable, match="GraphModule"):
        plan_to_json(replace(plan, steps=(*plan.steps, step)), name_tensors(tensors))


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    yield path
    children = enumerate(data) if isinstance(data, list) else data.items() if isinstance(data, dict) else ()
    for key, part in children:
        yield from leaves(part, (*path, key))


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    result = copy.deepcopy(data)
    place = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return result


@pytest.mark.parametrize("wrong", [{"x": 1}, [[]], 10**9, "?"], ids=str)
def test_damage_is_noticed_everywhere(wrong: Any) -> None:
    plan, tensors = weighted_plan()
    data = plan_to_json(plan, name_tensors(tensors))
    free = 0
    for path in leaves(data):
        try:
            plan_from_json(changed(data, path, wrong), tensors)
        except DamagedRecord:
            continue
        free += 1
    # Names and notes are free texts, extents and schedules free numbers; a structure in their place never is.
    assert free == 0 if isinstance(wrong, (dict, list)) else free < 20


@pytest.mark.parametrize("path", [("version",), ("exprs",), ("objects",), ("value",)], ids=str)
def test_missing_parts_are_noticed(path: tuple[str]) -> None:
    plan, tensors = weighted_plan()
    data = plan_to_json(plan, name_tensors(tensors))
    assert isinstance(data, dict)
    del data[path[0]]
    with pytest.raises(DamagedRecord, match="expected an object"):
        plan_from_json(data, tensors)


def bad_plans() -> dict[str, Plan]:
    """Plans that are well typed and wrong."""
    plan, _ = weighted_plan()
    launch = plan.launches()[0]
    part = launch.kernel.parts[0]
    assert isinstance(part, RowPart)
    store = part.stores[0]

    def with_part(**changes: Any) -> Plan:
        kernel = replace(launch.kernel, parts=(replace(part, **changes),))
        return replace(plan, steps=(replace(launch, kernel=kernel),))

    def with_value(value: Term) -> Plan:
        return with_part(stores=(replace(store, value=value),))

    return {
        "operation": with_value(Op(torch.float32, "mul", (const(1.0, torch.float32),))),
        "buffer": with_value(Load(torch.float32, "z", store.index)),
        "rank": with_value(Load(torch.float32, "x", (*store.index, *store.index))),
        "ref": with_part(binds=(Bind("a", const(1, torch.int64)),), stores=(replace(store, buffer="x"),)),
        "constant": replace(plan, constants={"w": torch.arange(6.0)}),
        "dtype": replace(plan, inputs=(replace(plan.inputs[0], dtype=torch.float64),)),
        "unknown": replace(plan, steps=(replace(launch, arguments=("x", "q", "y")),)),
    }


@pytest.mark.parametrize("name", bad_plans())
def test_wrong_plans_are_refused_when_read(name: str) -> None:
    plan = bad_plans()[name]
    tensors = {"layer.weight": plan.constants["w"]}
    data = plan_to_json(plan, name_tensors(tensors))
    with pytest.raises(DamagedRecord):
        plan_from_json(data, tensors)
