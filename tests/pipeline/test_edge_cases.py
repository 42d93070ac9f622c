"""Hand-written programs at the edges of the operations' rules, through every stage and both kernel back ends."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.meaning.single_operations import run_unfused
from tests.pipeline.edge_cases import CASES
from tests.pipeline.stages import Judge, Stages, compile_stages, run_compiled, run_interpreted, traced

KINDS = tuple(dict.fromkeys(name.partition(":")[0] for name in CASES))
pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom")


@functools.cache
def compiled(name: str) -> tuple[Judge, Stages]:
    """A case after all passes, with its judge."""
    function, inputs = CASES[name]
    program = traced(function, inputs)
    judge = Judge(program, inputs, name, lambda: str(program.graph))
    return judge, compile_stages(program, judge)


@pytest.mark.parametrize("name", CASES)
def test_reference_interpreter(name: str) -> None:
    judge, stages = compiled(name)
    judge.stage("interpreter", lambda *flat: run_interpreted(stages.built, flat))


@pytest.mark.parametrize("name", CASES)
def test_every_operation_alone(name: str) -> None:
    function, inputs = CASES[name]
    run_unfused(traced(function, inputs), inputs, name)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_cpp(kind: str) -> None:
    """One translation unit per kind: compiling costs more than running."""
    cases = [compiled(name) for name in CASES if name.startswith(f"{kind}:")]
    results = run_compiled([stages.built for _, stages in cases], [judge.inputs for judge, _ in cases])
    for (judge, _), outputs in zip(cases, results, strict=True):
        judge.accept("c++", outputs)


def test_an_index_outside_its_table_is_an_error() -> None:
    function = torch.nn.functional.embedding
    ids, table = torch.tensor([1, 0]), torch.randn(3, 4)
    program = traced(lambda i, w: function(i, w) + 1, (ids, table))
    stages = compile_stages(program, Judge(program, (ids, table), "embedding", lambda: ""))
    with pytest.raises(IndexError):
        run_interpreted(stages.built, (torch.tensor([1, 3]), table))
    with pytest.raises(IndexError, match="outside its table"):
        run_compiled([stages.built], [(torch.tensor([1, 3]), table)])
