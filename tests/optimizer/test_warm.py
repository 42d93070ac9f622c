"""Warm starts: the same bits as the cold start, new weights, and a miss for everything that might matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import tiny_inputs, tiny_model
from torchweld.codegen import lower, toolchain
from torchweld.codegen.cache import Cache
from torchweld.graph import fingerprint as fingerprint_module
from torchweld.graph.capture import capture
from torchweld.graph.target import Target
from torchweld.graph.value_reads import ValueReads
from torchweld.models.layers import LayerNorm, RMSNorm
from torchweld.optimizer import api
from torchweld.optimizer.api import optimize
from torchweld.optimizer.compile import Compiled, Options, compile_program
from torchweld.optimizer.warm import WarmStart, find_warm_start

TARGET = Target("test", 10.0, 100.0, 100.0, 100.0, 1.0, 1 << 20, 1 << 24, 2)


@dataclass(frozen=True)
class Stored:
    """A tiny model that was compiled cold and stored."""

    model: nn.Module
    options: Options
    cold: Compiled
    folder: Path


def start(model: nn.Module, inputs: tuple[Tensor, ...], options: Options) -> WarmStart:
    found = find_warm_start(model, inputs, {}, options, True)
    assert found is not None
    return found


def compile_and_store(model: nn.Module, inputs: tuple[Tensor, ...], options: Options) -> Compiled:
    """As `optimize` does it, but for the comparison with torch's speed, which no test can rely on."""
    warm = start(model, inputs, options)
    program = capture(model, inputs, verify=False)
    with warm.reads:
        compiled = compile_program(program, options=options, example_inputs=inputs)
    assert warm.store(compiled)
    return compiled


def restored(
    model: nn.Module, options: Options, inputs: tuple[Tensor, ...] = tiny_inputs("llama")
) -> Compiled:
    compiled = start(model, inputs, options).restore()
    assert compiled is not None
    return compiled


@pytest.fixture(autouse=True, scope="module")
def settled_sources() -> None:
    """Where somebody writes torchweld's sources while it runs, there is no warm start, by design."""
    try:
        fingerprint_module.package_digest()
    except fingerprint_module.Unjudged as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("warm")
    options = Options(threads=1, target=TARGET, cache=Cache(folder / "cache"))
    (folder / "models").mkdir()
    model = tiny_model("llama", folder / "models")
    return Stored(model, options, compile_and_store(model, tiny_inputs("llama"), options), folder)


def test_the_result_has_the_bits_of_the_cold_start(llama: Stored) -> None:
    warm = restored(llama.model, llama.options)
    for sizes in ((1, 1), (2, 8), (3, 17)):
        (ids,) = tiny_inputs("llama", *sizes)
        assert torch.equal(warm.run(ids), llama.cold.run(ids))
        assert torch.equal(warm.run(ids=ids), llama.cold.run(ids=ids))


def test_the_report_is_the_cold_one_but_for_the_phases(llama: Stored) -> None:
    warm = restored(llama.model, llama.options).report
    assert replace(warm, phases=()) == replace(llama.cold.report, phases=())
    assert [phase.name for phase in warm.phases] == ["warm start", "build"]


def test_optimize_starts_warm(llama: Stored) -> None:
    inputs = tiny_inputs("llama")
    fast = optimize(llama.model, inputs, options=llama.options)
    assert fast.compiled.groups is None
    assert torch.equal(fast(*inputs), llama.cold.run(*inputs))
    assert fast.report.kernels_per_layer == llama.cold.report.kernels_per_layer


def test_a_warm_start_captures_lowers_and_compiles_nothing(
    llama: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((lower, "lower_group"), (api, "capture"), (toolchain, "build_library")):
        counted(owner, name)
    optimize(llama.model, tiny_inputs("llama"), options=llama.options)
    assert calls == []
    optimize(llama.model, tiny_inputs("llama"), options=replace(llama.options, warm=False))
    assert {"lower_group", "capture"} <= set(calls)


def test_changed_weights_start_warm_and_count(llama: Stored, tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path, seed=8)
    (ids,) = tiny_inputs("llama", 2, 9)
    result = restored(other, llama.options).run(ids)
    with torch.no_grad():
        expected = other(ids)
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (result - llama.cold.run(ids)).abs().max() > 0.1 * expected.abs().max()


def test_calls_that_do_not_fit_are_refused_alike(llama: Stored) -> None:
    warm = restored(llama.model, llama.options)
    (ids,) = tiny_inputs("llama")
    calls: list[Callable[[Compiled], object]] = [
        lambda c: c.run(), lambda c: c.run(ids, ids), lambda c: c.run(tokens=ids), lambda c: c.run([ids]),
        lambda c: c.run(ids.float()), lambda c: c.run(ids[0]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as cold:
            call(llama.cold)
        with pytest.raises(type(cold.value)) as again:
            call(warm)
        assert str(again.value) == str(cold.value)


def test_what_was_not_kept_says_so(llama: Stored) -> None:
    warm = restored(llama.model, llama.options)
    with pytest.raises(RuntimeError, match="warm=False"):
        _ = warm.fused
    with pytest.raises(RuntimeError, match="warm=False"):
        warm.program.run(*tiny_inputs("llama"))


# -- misses ---------------------------------------------------------------------------------------------------------


def first(model: nn.Module, cls: type[Any]) -> Any:
    return next(module for module in model.modules() if isinstance(module, cls))


def set_eps(model: nn.Module) -> None:
    first(model, RMSNorm).eps = 1e-3


def set_config(model: Any) -> None:
    model.config = replace(model.config, norm_eps=1e-3)


def widen(model: Any) -> None:
    model.lm_head.weight = torch.cat((model.lm_head.weight, model.lm_head.weight))


def halve(model: Any) -> None:
    model.norm.weight = model.norm.weight.double()


def tie(model: Any) -> None:
    model.lm_head.weight = model.embed_tokens.weight


def transpose(model: Any) -> None:
    weight = model.layers[0].self_attn.q_proj.weight
    model.layers[0].self_attn.q_proj.weight = weight.t().contiguous().t()


def add_bias(model: Any) -> None:
    model.lm_head.bias = torch.zeros(model.lm_head.weight.shape[0])


def share_layer(model: Any) -> None:
    model.layers[1] = model.layers[0]


def train(model: nn.Module) -> None:
    model.train()


@pytest.mark.parametrize(
    "change", [set_eps, set_config, widen, halve, tie, transpose, add_bias, share_layer, train]
)
def test_another_model_is_a_miss(change: Callable[[Any], None], llama: Stored, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    assert start(model, tiny_inputs("llama"), llama.options).key == start_key(llama)
    change(model)
    found = start(model, tiny_inputs("llama"), llama.options)
    assert found.key != start_key(llama)
    assert found.restore() is None


def start_key(llama: Stored) -> str:
    return start(llama.model, tiny_inputs("llama"), llama.options).key


@pytest.mark.parametrize(
    "changes",
    [{"skip": frozenset({"fuse_input"})}, {"fuel": 3}, {"guide": "measure"}, {"threads": 2},
     {"target": replace(TARGET, l2_bytes=1 << 21)}],
    ids=str,
)  # fmt: skip
def test_other_options_are_a_miss(changes: dict[str, Any], llama: Stored) -> None:
    assert start(llama.model, tiny_inputs("llama"), replace(llama.options, **changes)).restore() is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TORCHWELD_FUEL", "2"), ("TORCHWELD_SKIP", "fuse_input"), ("TORCHWELD_ISA", "portable")],
)
def test_another_environment_is_a_miss(
    variable: str, value: str, llama: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert start(llama.model, tiny_inputs("llama"), llama.options).restore() is None


def test_other_inputs_are_a_miss(llama: Stored) -> None:
    (ids,) = tiny_inputs("llama")
    calls: list[tuple[tuple[object, ...], dict[str, object], Any]] = [
        ((ids[:1],), {}, True), ((ids.int(),), {}, True), ((), {"ids": ids}, True), ((ids,), {}, False),
        ((ids,), {}, {"ids": (0,)}), ((ids.t().contiguous().t(),), {}, True),
    ]  # fmt: skip
    for args, kwargs, dynamic in calls:
        found = find_warm_start(llama.model, args, kwargs, llama.options, dynamic)
        assert found is not None
        assert found.restore() is None


def test_another_torchweld_is_a_miss(llama: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "package_digest", lambda: "another")
    assert start(llama.model, tiny_inputs("llama"), llama.options).restore() is None


def test_another_default_dtype_is_a_miss(llama: Stored) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert start(llama.model, tiny_inputs("llama"), llama.options).restore() is None
    finally:
        torch.set_default_dtype(torch.float32)


# -- no warm start --------------------------------------------------------------------------------------------------


class Foreign(LayerNorm):
    """Written by somebody else: nobody knows what it reads."""


def hook(model: Any) -> None:
    model.norm.register_forward_hook(lambda module, args, output: output * 2)


def foreign_part(model: Any) -> None:
    model.norm = Foreign(torch.ones(48), torch.zeros(48), 1e-5)


def own_forward(model: Any) -> None:
    model.norm.forward = lambda x: x


def own_object(model: Any) -> None:
    model.norm.table = object()


def loose_tensor(model: Any) -> None:
    model.norm.table = (torch.ones(3),)


def tensor_subclass(model: Any) -> None:
    class Special(Tensor):
        pass

    model.norm.weight = model.norm.weight.as_subclass(Special)


def other_device(model: Any) -> None:
    model.norm.weight = model.norm.weight.to("meta")


@pytest.mark.parametrize(
    "change",
    [hook, foreign_part, own_forward, own_object, loose_tensor, tensor_subclass, other_device],
)
def test_what_cannot_be_judged_starts_cold(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    options = Options(target=TARGET, cache=Cache(tmp_path / "cache"))
    assert find_warm_start(model, tiny_inputs("llama"), {}, options, True) is not None
    change(model)
    assert find_warm_start(model, tiny_inputs("llama"), {}, options, True) is None


def test_a_replaced_method_starts_cold(llama: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: x)
    assert find_warm_start(llama.model, tiny_inputs("llama"), {}, llama.options, True) is None


def test_functions_and_watched_compilations_start_cold(
    llama: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny_inputs("llama")
    assert find_warm_start(torch.relu, inputs, {}, llama.options, True) is None
    for options in (replace(llama.options, warm=False), replace(llama.options, after_pass=lambda *_: None)):
        assert find_warm_start(llama.model, inputs, {}, options, True) is None
    for name, value in (("TORCHWELD_DUMP", str(tmp_path)), ("TORCHWELD_VERIFY", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert find_warm_start(llama.model, inputs, {}, llama.options, True) is None


# -- what is in the cache -------------------------------------------------------------------------------------------


def test_damaged_entries_are_misses_and_are_replaced(llama: Stored, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    options = replace(llama.options, cache=cache)
    inputs = tiny_inputs("llama")
    kept = start(llama.model, inputs, options)
    kept.store(llama.cold)
    data = cache.get_json(kept.key)
    assert isinstance(data, dict) and isinstance(data["exprs"], list)
    payload = cache.get(kept.key)
    assert payload is not None
    payload.write_bytes(payload.read_bytes()[:-40])
    assert kept.restore() is None
    damaged = (data | {"version": 0}, data | {"exprs": data["exprs"][:-1]}, data | {"value": []})
    for wrong in ([], {"version": 1}, *damaged):
        cache.put_json(kept.key, wrong)
        assert start(llama.model, inputs, options).restore() is None
    assert start(llama.model, inputs, options).store(llama.cold)
    again = restored(llama.model, options)
    assert torch.equal(again.run(*inputs), llama.cold.run(*inputs))


class Scaled(nn.Module):
    """x * number + weight: a pass looks at the number, since a product with 1 goes away."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.register_buffer("number", torch.tensor(number))
        self.register_buffer("weight", torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.number + self.weight


def foreign_start(model: nn.Module, options: Options, inputs: tuple[Tensor, ...]) -> WarmStart:
    """A warm start past the fingerprint, which refuses classes of tests."""
    tensors = dict(model.named_buffers())
    assert options.cache is not None
    return WarmStart("0" * 64, model, inputs, {}, options, options.cache, tensors, ValueReads(tensors))


def store_foreign(model: nn.Module, options: Options, inputs: tuple[Tensor, ...]) -> tuple[WarmStart, bool]:
    kept = foreign_start(model, options, inputs)
    program = capture(model, inputs, verify=False)
    with kept.reads:
        compiled = compile_program(program, options=options, example_inputs=inputs)
    return kept, kept.store(compiled)


def test_values_that_decided_something_must_be_the_same(tmp_path: Path) -> None:
    options = Options(threads=1, target=TARGET, cache=Cache(tmp_path / "cache"))
    inputs = (torch.rand(3, 5),)
    kept, stored = store_foreign(Scaled(1.0), options, inputs)
    assert stored
    assert kept.reads.names == {"number"}
    same, other = Scaled(1.0), Scaled(3.0)
    warm = foreign_start(same, options, inputs).restore()
    assert warm is not None
    assert torch.allclose(warm.run(*inputs), same(*inputs))
    assert foreign_start(other, options, inputs).restore() is None


def test_outputs_keep_their_structure(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"b": x + 1, "a": (x * 2, [x.sum(-1), None, 3]), "same": x}

    options = Options(threads=1, target=TARGET, cache=Cache(tmp_path / "cache"))
    model, inputs = Nested(), (torch.rand(3, 5),)
    assert store_foreign(model, options, inputs)[1]
    warm = foreign_start(model, options, inputs).restore()
    assert warm is not None
    result: Any = warm.run(*inputs)
    assert list(result) == ["b", "a", "same"]
    doubled, (total, nothing, three) = result["a"]
    assert type(result["a"]) is tuple and type(result["a"][1]) is list
    assert torch.equal(doubled, inputs[0] * 2) and torch.equal(result["same"], inputs[0])
    assert torch.allclose(total, inputs[0].sum(-1))
    assert (nothing, three) == (None, 3)


def test_folded_weights_are_not_stored(tmp_path: Path) -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.rand(5))

        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + self.weight)

    options = Options(threads=1, target=TARGET, cache=Cache(tmp_path / "cache"))
    kept, stored = store_foreign(Folding(), options, (torch.rand(3, 5),))
    assert kept.reads.names == {"weight"}
    assert not stored
    assert kept.restore() is None
