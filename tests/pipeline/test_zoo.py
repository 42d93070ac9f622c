"""The 24 small Hugging Face architectures through the whole pipeline, against float64."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.zoo import ZOO
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Options, compile_program
from torchweld.optimizer.verify import Oracle, check_program

NO_FALLBACK_IN_LAYERS = tuple(ZOO)[:16]
CHECKED_AFTER_EVERY_PASS = ("llama", "gemma3_text", "bert", "gpt2")


def _program(name: str, length: int = 9) -> tuple[Program, list[object]]:
    entry = ZOO[name]
    kwargs = entry.inputs(2, length)
    program = capture(entry.make(), (), kwargs, verify=False)
    return program, program.flatten_inputs((), kwargs)


@pytest.mark.parametrize("name", ZOO)
def test_compiled_model_is_within_the_tolerance_of_float64_at_two_sizes(name: str) -> None:
    program, flat = _program(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = compile_program(program, options=Options(strict=True), example_inputs=flat)
    first = Oracle(program, flat).stage("executable", compiled)
    assert first.ok, first.reasons
    entry = ZOO[name]
    other = program.flatten_inputs((), entry.inputs(1, 17 if entry.varying else 9, seed=1))
    second = Oracle(program, other).stage("executable", compiled)
    assert second.ok, second.reasons
    inside = [fallback for fallback in compiled.report.fallbacks if fallback.layer is not None]
    if name in NO_FALLBACK_IN_LAYERS:
        assert inside == []
    assert compiled.report.kernels_per_layer <= 8
    assert compiled.report.bytes_over_minimum <= 1.15


@pytest.mark.parametrize("name", CHECKED_AFTER_EVERY_PASS)
def test_every_stage_is_within_the_tolerance_of_float64(name: str) -> None:
    program, flat = _program(name)
    result = check_program(program, flat)
    assert result.ok, [stage for stage in result.stages if not stage.ok]
    assert {"captured", "recognize_attention", "fuse_vertical", "executable"} <= {
        s.name for s in result.stages
    }


def test_a_wrong_executable_is_caught() -> None:
    program, flat = _program("llama")
    compiled = compile_program(program, options=Options(), example_inputs=flat)

    def scaled(*inputs: object) -> tuple[object, ...]:
        return tuple(
            value * 1.001 if isinstance(value, torch.Tensor) else value for value in compiled(*inputs)
        )

    assert not Oracle(program, flat).stage("scaled", scaled).ok
