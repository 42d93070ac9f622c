"""The executable: checks of inputs, sizes, memory, eager steps, threads, forks, failures to build."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from sympy import Integer
from torch import fx

from tests.codegen.cpp_cases import plan_of, pointwise, random_buffers, same_bits
from tests.kernels_by_hand import ALL, attention, norm_gated_linear, rms_norm
from torchweld.codegen.cache import Cache
from torchweld.codegen.executable import BuildError, Executable
from torchweld.codegen.ir import Buffer, Kernel, RowPart, Store, size_symbol
from torchweld.codegen.plan import EagerStep, Launch, Plan, PlanError, ValueSpec
from torchweld.codegen.plan_inputs import ShapeError
from torchweld.codegen.prepared_call import PreparedCall
from torchweld.graph.terms import Axis, Const, Load, op

F32 = torch.float32
S = size_symbol("S")


def scale(factor: float) -> Kernel:
    """y = factor * x + 1, x of [S, 8]."""
    s, d = Axis("s", S), Axis("d", Integer(8))
    at = (s.symbol, d.symbol)
    value = op("add", op("mul", Load(F32, "x", at), Const(F32, factor)), Const(F32, 1.0))
    shape = (S, Integer(8))
    buffers = (Buffer("x", F32, shape, "input"), Buffer("y", F32, shape, "output"))
    return Kernel("scale", buffers, ("S",), (RowPart((s,), (d,), (), (Store("y", at, value),)),))


def spec(name: str) -> ValueSpec:
    return ValueSpec(name, F32, (S, Integer(8)))


def chain(length: int, outputs: tuple[str, ...]) -> Plan:
    """v1 = 0.5 v0 + 1, v2 = 0.5 v1 + 1, ..."""
    names = [f"v{n}" for n in range(length + 1)]
    steps = tuple(Launch(scale(0.5), (names[n], names[n + 1])) for n in range(length))
    return Plan((spec("v0"),), {}, {name: spec(name) for name in names[1:]}, steps, outputs, ("S",))


def expected(x: torch.Tensor, length: int) -> torch.Tensor:
    for _ in range(length):
        x = 0.5 * x + 1
    return x


def test_a_chain_runs_in_two_places_and_shares_one_function() -> None:
    executable = Executable(chain(10, ("v10", "v4")), threads=2)
    for rows in (1, 3, 1000, 0, 3):
        x = torch.randn(rows, 8)
        last, middle = executable(x)
        torch.testing.assert_close(last, expected(x, 10))
        torch.testing.assert_close(middle, expected(x, 4))
    stats = executable.stats()
    assert (stats.launches, stats.functions, stats.calls, stats.bindings) == (10, 1, 5, 4)
    assert stats.arena_bytes <= 2 * 128 < stats.unshared_bytes


def test_outputs_are_new_tensors_and_inputs_stay_unchanged() -> None:
    executable = Executable(chain(3, ("v3", "v1")), threads=1)
    x = torch.randn(5, 8)
    before = x.clone()
    first = executable(x)
    copies = [t.clone() for t in first]
    executable(torch.randn(5, 8))
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    assert first[0].data_ptr() != first[1].data_ptr()


def test_non_contiguous_expanded_and_aliased_inputs() -> None:
    kernel = pointwise(lambda t: op("sub", t[0], t[1]), [F32, F32], F32, 40)
    executable = Executable(plan_of(kernel), threads=1)
    base = torch.randn(80)
    assert torch.equal(executable(base[::2], base[:40])[0], base[::2] - base[:40])
    assert torch.equal(executable(torch.ones(1).expand(40), base[5:45])[0], 1 - base[5:45])
    assert torch.equal(executable(base[:40].requires_grad_(False), base[:40])[0], torch.zeros(40))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_prepared_call_sees_new_values_and_other_calls_in_between(threads: int) -> None:
    executable = Executable(chain(10, ("v10", "v0", "v4", "v4")), threads=threads)
    x, y, none = torch.randn(3, 8), torch.randn(70, 8), torch.empty(0, 8)
    calls = [(tensor, prepared(executable, tensor)) for tensor in (x, y, none)]
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for turn in range(3):
        for tensor, call in calls:
            tensor.normal_()
            last, given, middle, same = call()
            assert given is tensor and same is middle
            torch.testing.assert_close(last, expected(tensor, 10))
            torch.testing.assert_close(middle, expected(tensor, 4))
            before.append((last, last.clone()))
            other = torch.randn(3 + turn, 8)
            torch.testing.assert_close(executable(other)[0], expected(other, 10))
    assert all(torch.equal(result, copy) for result, copy in before), "results are the caller's own"


def prepared(executable: Executable, *inputs: torch.Tensor) -> PreparedCall:
    call = executable.prepare(*inputs)
    assert call is not None
    return call


def test_what_cannot_be_prepared() -> None:
    executable = Executable(chain(2, ("v2",)), threads=1)
    assert executable.prepare(torch.randn(8, 3).t()) is None, "a copy would not see new values"
    assert executable.prepare(torch.randn(3, 8, requires_grad=True)) is None
    with pytest.raises(ShapeError, match="expected 8"):
        executable.prepare(torch.randn(3, 7))


def test_wrong_inputs_are_named() -> None:
    executable = Executable(plan_of(rms_norm()), threads=1)
    w = torch.ones(33)
    with pytest.raises(TypeError, match=r"expected 2 inputs \(x, w\), got 1"):
        executable(w)
    with pytest.raises(TypeError, match=r"input 0 \(x\): expected torch.float32, got torch.float64"):
        executable(torch.ones(1, 2, 33, dtype=torch.float64), w)
    with pytest.raises(ShapeError, match=r"input 0 \(x\): expected shape \(B, S, 33\), got \(2, 33\)"):
        executable(torch.ones(2, 33), w)
    with pytest.raises(ShapeError, match=r"input 1 \(w\), dimension 0: expected 33, got 32"):
        executable(torch.ones(1, 2, 33), torch.ones(32))
    with pytest.raises(TypeError, match="expected a tensor, got list"):
        executable([1.0], w)  # type: ignore[arg-type]
    with pytest.raises(
        ShapeError, match=r"\(v\), dimension 1: expected S \(here 7, with B = 1, S = 7\), got 8"
    ):
        Executable(plan_of(attention()), threads=1)(
            torch.ones(1, 7, 64), torch.ones(1, 7, 32), torch.ones(1, 8, 32)
        )


def _graph(function, *names: str) -> fx.GraphModule:  # type: ignore[no-untyped-def]
    return fx.symbolic_trace(function)


def test_eager_steps_between_launches_may_return_views() -> None:
    view = EagerStep(_graph(lambda a: (a[1:], a.flip(0))), ("v1",), ("tail", "flipped"), "no kernel for flip")
    plan = Plan(
        (spec("v0"),), {}, {n: spec(n) for n in ("v1", "v2", "v3", "flipped")},
        (Launch(scale(0.5), ("v0", "v1")), view, Launch(scale(2.0), ("flipped", "v2")),
         Launch(scale(0.5), ("v2", "v3"))),
        ("tail", "v3"), ("S",),
    )  # fmt: skip
    executable = Executable(plan, threads=2)
    x = torch.randn(6, 8)
    tail, v3 = executable(x)
    kept = tail.clone()
    torch.testing.assert_close(tail, expected(x, 1)[1:])
    torch.testing.assert_close(v3, 0.5 * (2 * expected(x, 1).flip(0) + 1) + 1)
    executable(torch.randn(6, 8))
    assert torch.equal(tail, kept)
    assert executable.stats().eager_steps == 1


def test_sizes_reach_eager_steps_as_integers() -> None:
    step = EagerStep(_graph(lambda a, s: a * s), ("v0", "S"), ("y",), "test")
    (y,) = Executable(Plan((spec("v0"),), {}, {}, (step,), ("y",), ("S",)))(torch.ones(5, 8))
    assert torch.equal(y, torch.full((5, 8), 5.0))


def test_constants_are_used_and_not_given_away() -> None:
    weight = torch.randn(33)
    plan = plan_of(rms_norm())
    plan = dataclasses.replace(plan, inputs=plan.inputs[:1], constants={"w": weight}, outputs=("y", "w"))
    x = torch.randn(2, 3, 33)
    y, w = Executable(plan, threads=1)(x)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (33,), weight, 1e-6))
    w.zero_()
    assert weight.abs().sum() > 0


def test_an_output_that_is_an_input_is_that_input() -> None:
    plan = dataclasses.replace(chain(1, ("v1",)), outputs=("v0", "v1"))
    x = torch.randn(2, 8)
    assert Executable(plan, threads=1)(x)[0] is x


def test_broken_plans_are_refused() -> None:
    good = chain(2, ("v2",))
    with pytest.raises(PlanError, match=r"step 0 \(scale\) reads \['v1'\]"):
        Executable(dataclasses.replace(good, steps=good.steps[::-1]))
    with pytest.raises(PlanError, match=r"outputs \['v9'\]"):
        Executable(dataclasses.replace(good, outputs=("v9",)))
    with pytest.raises(PlanError, match="has 2 buffers, the launch 1"):
        Executable(dataclasses.replace(good, steps=(Launch(scale(0.5), ("v0",)),)))
    with pytest.raises(PlanError, match=r"computes \['v1'\], which exist already"):
        Executable(dataclasses.replace(good, steps=(good.steps[0], good.steps[0])))
    with pytest.raises(PlanError, match="are not sizes of the plan"):
        Executable(dataclasses.replace(good, sizes=()))


def test_no_compiler_is_a_build_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torchweld.codegen.toolchain.find_compiler", lambda: None)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        Executable(chain(1, ("v1",)), cache=Cache(tmp_path / "cache"))


def test_a_construct_without_words_is_a_build_error() -> None:
    kernel = pointwise(lambda t: t[0], [torch.complex64], torch.complex64, 3)
    with pytest.raises(BuildError, match=r"no C\+\+ type for torch.complex64"):
        Executable(plan_of(kernel))


def test_several_threads_may_call_one_executable() -> None:
    executable = Executable(plan_of(norm_gated_linear()), threads=2)
    kernel = norm_gated_linear()
    cases = [random_buffers(kernel, {"B": 1, "S": 3 + n}, n) for n in range(4)]
    wanted = [executable(*case.values())[0] for case in cases]
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(50):
            if not same_bits(executable(*cases[number].values())[0], wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(action) -> int:  # type: ignore[no-untyped-def]
    """Run `action` in a forked child; 0 if it returned True."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if action() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def test_a_forked_child_can_go_on() -> None:
    kernel = ALL["norm_gated_linear_f32"]()
    executable = Executable(plan_of(kernel), threads=2)
    buffers = random_buffers(kernel, {"B": 2, "S": 200})
    (want,) = executable(*buffers.values())
    # torch's own thread pool does not survive a fork: no operation of torch in the child
    wanted = want.numpy().tobytes()
    child = _in_child(lambda: executable(*buffers.values())[0].numpy().tobytes() == wanted)
    assert child == 0
    assert same_bits(executable(*buffers.values())[0], want)


def test_idle_threads_sleep() -> None:
    executable = Executable(plan_of(norm_gated_linear("F32")), threads=3)
    buffers = random_buffers(norm_gated_linear("F32"), {"B": 2, "S": 200})
    executable(*buffers.values())
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_bindings_are_bounded() -> None:
    executable = Executable(chain(2, ("v2",)), threads=1)
    for rows in range(1, 40):
        executable(torch.ones(rows, 8))
    assert executable.stats().bindings <= 16
