"""The meaning of operations against torch's own operator samples (`op_db`): sizes 0, scalars, strides, promotion.

Every sample is traced, lowered one kernel per operation without any pass, run in the reference interpreter and
judged against eager torch and float64.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Generator, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from tests.meaning.single_operations import run_unfused
from tests.meaning.test_overloads import CALLS
from tests.pipeline.stages import traced
from torchweld.graph.meaning import RULES
from torchweld.graph.program import Program

NAMES = tuple(
    """abs add addcdiv addcmul addmm all amax amin any arange argmax argmin atan2 baddbmm bmm broadcast_to cat ceil
    chunk clamp clone constant_pad_nd cos div.floor_rounding div.no_rounding_mode div.trunc_rounding dot eq erf exp
    exp2 expand expand_as expm1 flatten flip floor floor_divide fmod full full_like gather ge gt index_select isinf
    isnan le lerp linalg.vector_norm log log1p log2 log_softmax log_softmax.with_dtype logical_and logical_not
    logical_or logical_xor logit logsumexp lt masked_fill matmul max.binary max.reduction_no_dim
    max.reduction_with_dim maximum mean min.binary min.reduction_no_dim min.reduction_with_dim minimum mm mT mul mv
    nan_to_num narrow ne neg new_full new_ones new_zeros nn.functional.dropout nn.functional.elu
    nn.functional.embedding nn.functional.gelu nn.functional.hardsigmoid nn.functional.hardswish
    nn.functional.hardtanh nn.functional.layer_norm nn.functional.leaky_relu nn.functional.linear
    nn.functional.logsigmoid nn.functional.normalize nn.functional.pad.constant nn.functional.pad.reflect
    nn.functional.relu nn.functional.relu6 nn.functional.rms_norm nn.functional.silu nn.functional.softplus
    ones ones_like permute pow prod reciprocal remainder repeat repeat_interleave reshape round rsqrt rsub
    scalar_tensor select sigmoid sign sin slice softmax softmax.with_dtype split split.list_args split_with_sizes
    sqrt square squeeze squeeze.multiple stack std sub sum t T tanh to transpose tril triu true_divide trunc unbind
    unflatten unsqueeze var view view_as where zeros zeros_like __getitem__ __radd__ __rdiv__ __rpow__ __rsub__
    bool byte char double float half bfloat16 int long short cfloat norm""".split()
)

#: Operations of which some samples have no kernel, and why; an entry that no sample needs any more is an error.
RUNS_EAGERLY = MappingProxyType(
    {
        "cfloat": "values of torch.complex64",
        "gather": "selects from a single number|empty index",
        "index_select": "selects from a single number",
        "linalg.vector_norm": "vector norm of order",
        "nn.functional.normalize": "vector norm of order",
        "nn.functional.pad.reflect": "padding mode 'reflect'",
        "norm": "vector norm of order",
        "repeat_interleave": "flattened tensor",
    }
)
INTEGER_MATMUL = "matmul of torch.int64"
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
_EXAMINED = 40
_EVENLY = {torch.float32: 4, torch.int64: 2, torch.bfloat16: 1, torch.bool: 1}


@pytest.fixture(autouse=True)
def same_samples_in_any_order() -> None:
    """The table draws its samples from the global generators."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


@functools.cache
def operators() -> dict[str, Any]:
    """torch's table of operators by name; importing it takes seconds."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {".".join(filter(None, (info.name, info.variant_test_name))): info for info in op_db}


def samples(name: str, dtype: torch.dtype) -> list[Any]:
    """A few samples spread over what torch has, those with empty tensors first, some of them non-contiguous."""
    info = operators()[name]
    if dtype not in info.dtypes:
        return []
    generator = iter(info.sample_inputs("cpu", dtype))
    every = list(itertools.islice(generator, _EXAMINED))
    # Left to the garbage collector, it would leave its `no_grad` in the middle of somebody's trace.
    if isinstance(generator, Generator):
        generator.close()
    empty = [
        s for s in every if any(t.numel() == 0 for t in pytree.tree_leaves(s.input) if isinstance(t, Tensor))
    ]
    chosen = [*empty[:2], *every[:: -(-len(every) // _EVENLY[dtype]) or 1]]
    return chosen + [sample.noncontiguous() for sample in chosen[:1] if dtype == torch.float32]


def programs(name: str, dtype: torch.dtype) -> Iterator[tuple[Program, list[Tensor]]]:
    """The samples as programs with their tensors; those that call operations without a rule are left out."""
    info = operators()[name]
    for sample in samples(name, dtype):
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def call(
            *tensors: Tensor, leaves: list[Any] = leaves, spec: Any = spec, places: list[int] = places
        ) -> object:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            first, args, kwargs = pytree.tree_unflatten(filled, spec)
            return info.op(first, *args, **kwargs)

        inputs = [leaves[place].detach() for place in places]
        program = traced(call, inputs)
        calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
        if calls and all(target in RULES for target in calls):
            yield program, inputs


@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str) -> None:
    reasons: list[str] = []
    count = 0
    for dtype in DTYPES:
        for number, (program, inputs) in enumerate(programs(name, dtype)):
            count += 1
            found = run_unfused(program, inputs, f"{name}, sample {number} of {dtype}")
            reasons += [reason for reason in found if INTEGER_MATMUL not in reason]
    assert count > 0, "no sample reaches a rule: take the name off the list"
    expected = RUNS_EAGERLY.get(name)
    if expected is None:
        assert not reasons
    else:
        assert reasons, f"every sample of {name} has a kernel now: take it out of RUNS_EAGERLY"
        assert all(any(part in reason for part in expected.split("|")) for reason in reasons), reasons


ELSEWHERE = {
    "torchweld.append_rows.default": "test_append_rows.py",
    "torchweld.cached_attention.default": "cached_cases.py",
    "torchweld.cached_running.default": "test_cached_rows.py",
    "torchweld.cached_rows.default": "test_cached_rows.py",
    "aten.topk.default": "test_cpp_best.py",
}
"""Rules of operations on a cache, and of what is found only behind a matmul: tested against their eager meaning in a
file of tests/codegen each."""


def test_every_rule_is_reached() -> None:
    """A rule that neither the samples nor the list of overloads call would be untested."""
    folder = Path(__file__).parent.parent / "codegen"
    for target, file in ELSEWHERE.items():
        assert target.split(".")[1] in (folder / file).read_text(), f"{file} does not test {target}"
    reached: set[object] = set(CALLS)
    for name in NAMES:
        for program, _ in itertools.islice(programs(name, torch.float32), 2):
            reached |= {node.target for node in program.graph.nodes}
    assert {str(target) for target in RULES if target not in reached} == set(ELSEWHERE)
