"""Function names in one translation unit: unique, and none that the C library has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.codegen.cpp_cases import plan_of, pointwise
from torchweld.codegen.cpp import print_unit
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Kernel
from torchweld.graph.terms import op


def _negation(name: str, count: int) -> Kernel:
    """y = -x under the given names."""
    kernel = pointwise(lambda terms: op("neg", *terms), [torch.float32], torch.float32, count)
    return dataclasses.replace(kernel, name=name)


def test_a_renamed_function_does_not_take_the_name_of_another() -> None:
    # The first is called like its own buffer and becomes x0_2; the second wants that name.
    unit = print_unit([_negation("x0", 3), _negation("x0_2", 4), _negation("x0", 5)])
    assert len(set(unit.symbols)) == 3


@pytest.mark.parametrize("name", ["floor", "round", "sqrt", "abs", "index", "memcpy"])
def test_a_kernel_named_like_a_library_function_compiles(name: str) -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(Executable(plan_of(_negation(name, 3)), threads=1)(x)[0], -x)
