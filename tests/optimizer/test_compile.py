"""compile_program, its report, the gate, the profile, fuel, skipping, stage dumps and the way without a compiler."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from torchweld.codegen.executable import BuildError
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.optimizer.api import optimize
from torchweld.optimizer.compile import Options, compile_program, layer_number
from torchweld.optimizer.gate import NAME, keep_if_faster, measure
from torchweld.optimizer.pipeline import pass_names, size_hints
from torchweld.optimizer.profile import profile, profile_nodes, rank_correlation
from torchweld.optimizer.verify import Oracle, check_program

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """Two numbered layers of norm, linear and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Layers().eval(), (X,), verify=False)


def test_report_counts_kernels_of_the_busiest_layer_and_bytes(program: Program) -> None:
    compiled = compile_program(program, options=Options(strict=True, threads=1), example_inputs=[X])
    report = compiled.report
    assert report.kernels_per_layer == 2, [launch.kernel for launch in report.launches]
    assert {launch.layer for launch in report.launches} == {0, 1}
    assert report.bytes_over_minimum == 1.0
    assert dict(report.sizes) == size_hints(program, (X,))
    assert {phase.name for phase in report.phases} >= {"passes", "fusion", "plan", "build"}


def test_skipped_passes_and_fuel_leave_a_right_program(program: Program) -> None:
    reference = Oracle(program, [X])
    without = compile_program(program, options=Options(skip=frozenset(pass_names())), example_inputs=[X])
    assert reference.stage("skip all", without).ok
    assert without.report.passes == ()
    full = compile_program(program, options=Options(), example_inputs=[X])
    total = sum(record.applied for record in full.report.passes)
    for fuel in (0, 1, total // 2, total):
        burnt = compile_program(program, options=Options(fuel=fuel), example_inputs=[X])
        assert sum(record.applied for record in burnt.report.passes) <= fuel
        assert reference.stage(f"fuel {fuel}", burnt).ok
    assert len(without.report.launches) > len(full.report.launches)


def test_stage_dump_is_runnable_python(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHWELD_DUMP", str(tmp_path / "stages"))
    compile_program(program, options=Options(), example_inputs=[X])
    files = sorted((tmp_path / "stages").glob("*.py"))
    assert files and (tmp_path / "stages" / "unit.cpp").read_text().count("extern") > 0
    for file in files:
        compile(file.read_text(), str(file), "exec")


def test_without_a_compiler_it_says_so_and_runs_eagerly(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("TORCHWELD_CACHE_DIR", str(tmp_path / "cache"))
    target = compile_program(program, options=Options(skip=frozenset(pass_names()))).report.target
    with pytest.warns(UserWarning, match="runs this model eagerly"):
        compiled = compile_program(program, options=Options(target=target), example_inputs=[X])
    assert compiled.executable is None and compiled.report.eager_fallbacks == 1
    assert Oracle(program, [X]).stage("eager", compiled).ok
    with pytest.raises(BuildError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile_program(program, options=Options(strict=True, target=target), example_inputs=[X])


def test_gate_takes_a_slower_executable_back(program: Program) -> None:
    compiled = compile_program(program, options=Options(), example_inputs=[X])
    fast = compiled.executable
    assert fast is not None

    class Slow:
        """The real executable after a pause."""

        def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            time.sleep(0.05)
            return fast(*inputs)

    compiled.executable = Slow()  # type: ignore[assignment]
    verdict = keep_if_faster(compiled, program, [X])
    assert verdict is not None and not verdict.keep
    assert compiled.executable is None and "slower than torch" in str(compiled.eager_reason)
    last = compiled.report.passes[-1]
    assert (last.name, last.kept) == (NAME, False) and (last.measured_saving_us or 0) < 0
    assert Oracle(program, [X]).stage("taken back", compiled).ok


def test_gate_stops_early_when_the_executable_is_clearly_faster() -> None:
    calls = []
    verdict = measure(lambda: None, lambda: calls.append(time.sleep(0.06)))
    assert verdict.keep and len(calls) == 1


def test_profile_times_every_kernel(program: Program) -> None:
    compiled = compile_program(program, options=Options(threads=1), example_inputs=[X])
    result = profile(compiled)
    assert {row.kernel for row in result.rows} == {kernel.name for kernel in compiled.report.kernels}
    assert all(0 < row.measured_us < 1e6 for row in result.rows)
    assert all(launch.measured_us is not None for launch in compiled.report.launches)


def test_profile_of_nodes_counts_bytes_and_operations(program: Program) -> None:
    rows = {row.op: row for row in profile_nodes(program.graph_module, [X])}
    linear = rows["aten.linear.default"]
    assert linear.flops == 2 * 2 * 6 * 32 * 16
    assert linear.nbytes == 4 * (2 * 6 * 32 + 32 * 16 + 16 + 2 * 6 * 16)
    assert rows["aten.silu.default"].flops == 2 * 6 * 32
    assert all(row.microseconds > 0 and "test_compile.py" in row.source for row in rows.values())


def test_environment_asks_for_the_error_of_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWELD_VERIFY", "2")
    report = optimize(Layers().eval(), (X,)).report
    assert report.max_relative_error is not None
    fusions = [record for record in report.passes if record.name.startswith("fuse_")]
    assert fusions and all(record.error_added is not None for record in fusions)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 2, 3, 4], [10, 20, 30, 40], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 2, 2, 3], [1, 3, 3, 9], 1.0)],
)
def test_rank_correlation(first: list[float], second: list[float], expected: float) -> None:
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_check_program_has_a_stage_per_pass_that_changed_something(program: Program) -> None:
    result = check_program(program, [X], options=Options(threads=1))
    assert result.ok and result.executable
    names = [stage.name for stage in result.stages]
    assert names[0] == "captured" and names[-1] == "executable" and "fuse_vertical" in names


def test_a_kernel_over_the_end_of_a_layer_belongs_to_the_matrices_that_it_reads() -> None:
    """Norms behind every layer join the projections of the next: layers stay equally large."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"linear": nn.Linear(16, 16), "norm": nn.LayerNorm(16)}) for _ in range(3)
            )
            self.head = nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer["norm"](x + layer["linear"](x))  # type: ignore[index]
            return self.head(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    captured = capture(Behind().eval(), (X,), verify=False)
    compiled = compile_program(captured, options=Options(threads=1), example_inputs=[X])
    layers = [launch.layer for launch in compiled.report.launches]
    assert layers[-1] is None and "head" in compiled.report.launches[-1].kernel
    assert len({layers.count(number) for number in range(3)}) == 1


def test_layer_number_is_the_first_number_of_a_dotted_name() -> None:
    graph = torch.fx.Graph()
    names = {
        "layers.3.attn.q_proj.weight": 3,
        "h.0.mlp.2.weight": 0,
        "lm_head.weight": None,
        "w2.weight": None,
    }
    for name, expected in names.items():
        assert layer_number(graph.get_attr(name)) == expected
