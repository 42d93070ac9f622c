"""Random programs through the whole pipeline: passes, fusion, plan, reference interpreter, C++.

Each stage is judged against float64 and the eager run (tests/pipeline/stages.py). A failure prints a program that
repeats it. `make fuzz SECONDS=n` draws fresh programs in the test marked `fuzz`.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.generators.graphs import GeneratedCase, generate, programs
from tests.pipeline.stages import (
    Judge,
    Stages,
    compile_stages,
    program_of,
    run_compiled,
    run_interpreted,
    symbolic_program,
)
from torchweld.codegen.plan import EagerStep
from torchweld.passes import FUSE

CASES, BLOCK = 300, 10
IS_FUZZING = settings.get_current_profile_name() == "fuzz"


def interpreted(case: GeneratedCase) -> tuple[Judge, Stages]:
    """A case through all stages up to the reference interpreter."""
    program = program_of(case)
    judge = Judge(program, case.inputs, case.description, case.code)
    stages = compile_stages(program, judge)
    judge.stage("interpreter", lambda *flat: run_interpreted(stages.built, flat))
    return judge, stages


def compile_and_judge(cases: list[tuple[Judge, Stages]]) -> None:
    """The C++ of several cases as one translation unit, each judged."""
    results = run_compiled([stages.built for _, stages in cases], [judge.inputs for judge, _ in cases])
    for (judge, _), outputs in zip(cases, results, strict=True):
        judge.accept("c++", outputs)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", range(CASES // BLOCK))
def test_block(block: int) -> None:
    """Ten seeds in the reference interpreter, a third of them also in C++ (another third in every block)."""
    seeds = range(block * BLOCK, (block + 1) * BLOCK)
    cases = [interpreted(generate(seed)) for seed in seeds]
    compile_and_judge([case for number, case in enumerate(cases) if (number + block) % 3 == 0])


def test_every_fusion_fires_and_forty_operations_get_kernels() -> None:
    applied: Counter[str] = Counter()
    in_kernels: set[str] = set()
    eager: set[str] = set()
    for number in range(90):
        case = generate(number)
        program = program_of(case)
        stages = compile_stages(program, Judge(program, case.inputs, case.description, case.code))
        applied.update(stages.applied())
        in_kernels |= {op for launch in stages.built.plan.launches() for op in launch.kernel.ops}
        eager |= {step.reason for step in stages.built.plan.steps if isinstance(step, EagerStep)}
    print(dict(applied), sorted(in_kernels), eager)
    for name in dict.fromkeys(str(pass_.NAME) for pass_ in FUSE):
        assert applied[name] > 0, f"{name} never fired"
    assert len(in_kernels) >= 40
    assert eager <= {"aten.cumsum.default: no rule gives its elements", "views of results"}


@pytest.mark.parametrize("number", range(10))
def test_symbolic_sizes(number: int) -> None:
    """One plan serves other batch and sequence sizes than the example's, down to 1."""
    case = generate(number, symbolic=True)
    program = symbolic_program(case)
    stages = compile_stages(program, Judge(program, case.inputs, case.description, case.code))
    for batch, tokens in ((2, 7), (3, 5), (1, 1), (1, 19)):
        generator = torch.Generator().manual_seed(batch * 100 + tokens)
        inputs = tuple(
            torch.randint(0, 31, (batch, tokens, *x.shape[2:]), generator=generator)
            if x.dtype == torch.int64
            else torch.randn(batch, tokens, *x.shape[2:], generator=generator).to(x.dtype)
            for x in case.inputs
        )
        label = f"{case.description} at batch {batch}, {tokens} tokens"
        judge = Judge(program, inputs, label, case.code)
        judge.stage("interpreter", lambda *flat: run_interpreted(stages.built, flat))


@pytest.mark.fuzz
@pytest.mark.timeout(900)
@settings(max_examples=60 if IS_FUZZING else 12)
@given(number=st.integers(1000, 2**31))
def test_fresh_seeds(number: int) -> None:
    """Programs of any seed in the interpreter and in C++; `generate(number)` repeats one."""
    note(f"generate({number})")
    compile_and_judge([interpreted(generate(number))])


@pytest.mark.fuzz
@pytest.mark.timeout(900)
@settings(max_examples=200 if IS_FUZZING else 15)
@given(case=programs())
def test_drawn_programs(case: GeneratedCase) -> None:
    """Programs that Hypothesis draws, and shrinks where one fails, in the interpreter."""
    interpreted(case)
