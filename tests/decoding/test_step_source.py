"""Steps from the cache: the bits of the cold start without a capture, and a miss for everything that might matter."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import VOCABULARY, tiny_model
from torchweld.codegen.cache import Cache
from torchweld.codegen.record_json import NotStorable
from torchweld.decoding.cached import CachedModel
from torchweld.decoding.step_source import StepSource
from torchweld.graph import fingerprint as fingerprint_module
from torchweld.graph.target import Target
from torchweld.optimizer.compile import Options
from torchweld.optimizer.warm_step import KEPT, StepStart, find_step_start, step_facts
from torchweld.passes.rewrite_kv_cache import StepProgram

TARGET = Target("test", 10.0, 100.0, 100.0, 100.0, 1.0, 1 << 20, 1 << 24, 2)
KINDS = ("llama", "gemma3_text", "gpt2")
TREE = (-1, 0, 0, 1)


@dataclass(frozen=True)
class Kept:
    """A tiny model whose steps, for rows and for trees, were compiled cold and stored."""

    model: nn.Module
    options: Options
    source: StepSource
    cold: CachedModel


@pytest.fixture(autouse=True, scope="module")
def settled_sources() -> None:
    """Where somebody writes torchweld's sources while it runs, there is no warm start, by design."""
    try:
        fingerprint_module.package_digest()
    except fingerprint_module.Unjudged as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest, folder: Path) -> Kept:
    return keep(request.param, folder)


@pytest.fixture
def llama(folder: Path) -> Kept:
    return keep("llama", folder)


@functools.cache
def keep(kind: str, root: Path) -> Kept:
    folder = root / kind
    (folder / "models").mkdir(parents=True)
    model = tiny_model(kind, folder / "models")
    options = Options(threads=1, target=TARGET, cache=Cache(folder / "cache"))
    source = StepSource.of_module(model, options=options)
    cold = CachedModel(source)
    cold.compiled(is_tree=True)
    assert source.is_captured
    return Kept(model, options, source, cold)


def copied(kept: Kept, folder: Path) -> Cache:
    """A copy of the cache, to be spoiled; what was compiled need not be compiled again."""
    assert kept.options.cache is not None
    cache = Cache(folder / "cache")
    shutil.copytree(kept.options.cache.folder, cache.folder, dirs_exist_ok=True)
    return cache


def start(model: nn.Module, options: Options, is_tree: bool = False) -> StepStart:
    found = StepSource.of_module(model, options=options)._find_start(is_tree)
    assert found is not None
    return found


def warm_start(model: nn.Module, options: Options) -> tuple[CachedModel, StepSource]:
    source = StepSource.of_module(model, options=options)
    return CachedModel(source, spare=4), source


def draw(batch: int, rows: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, rows), generator=torch.Generator().manual_seed(seed))


def logits_of_everything(model: CachedModel) -> list[Tensor]:
    """Prompts of equal and of different lengths, one row, several rows, padding, a tree, and what follows it."""
    found = [
        model.prefill(draw(2, 9, 1)),
        model.step(draw(2, 1, 2)),
        model.step(draw(2, 3, 3), logits_for="all"),
    ]
    found += [model.prefill([[3, 1, 4], [1, 5], [9, 2, 6, 5]]), model.step(draw(3, 2, 4), counts=[1, 0, 2])]
    found += [model.prefill(draw(1, 7, 5)), model.step(draw(1, 4, 6), parents=TREE, logits_for="all")]
    model.keep([0, 1, 3])
    return [*found, model.step(draw(1, 5, 7), logits_for="all")]


def test_the_same_bits_without_a_capture(kept: Kept) -> None:
    warm, source = warm_start(kept.model, kept.options)
    cold = CachedModel(kept.source, spare=4)
    pairs = zip(logits_of_everything(warm), logits_of_everything(cold), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert not source.is_captured
    for is_tree in (False, True):
        phases = [phase.name for phase in warm.compiled(is_tree=is_tree).report.phases]
        assert phases == ["warm start", "build"], "no passes, no fusion"


def test_everything_known_of_a_step_is_known_again(kept: Kept) -> None:
    warm, _ = warm_start(kept.model, kept.options)
    assert (warm.states, warm.vocab_size, warm.max_length) == (
        kept.cold.states, kept.cold.vocab_size, kept.cold.max_length,
    )  # fmt: skip
    assert warm.fingerprint == kept.cold.fingerprint
    for is_tree in (False, True):
        known = start(kept.model, kept.options, is_tree).restore()
        assert known is not None
        step, compiled = known
        cold_step, cold = kept.source.compiled(is_tree=is_tree)
        assert [getattr(step, name) for name in KEPT] == [getattr(cold_step, name) for name in KEPT]
        assert step.is_tree == is_tree
        assert step.program.in_spec == cold_step.program.in_spec
        assert step.program.out_spec == cold_step.program.out_spec
        assert step.program.parameters == cold_step.program.parameters
        assert step.program.name == cold_step.program.name
        assert replace(compiled.report, phases=()) == replace(cold.report, phases=())


def test_the_public_way_starts_warm(llama: Kept) -> None:
    model = CachedModel.from_module(llama.model, options=llama.options, max_length=30)
    assert not model._source.is_captured and model.max_length == 30
    ids = draw(1, 6, 8)
    assert torch.equal(model.prefill(ids), llama.cold.prefill(ids))


def test_changed_weights_start_warm_and_count(llama: Kept, tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path, seed=8)
    warm, source = warm_start(other, llama.options)
    ids = draw(2, 9, 9)
    with torch.no_grad():
        expected = other(ids)[:, -1]
    result = warm.prefill(ids)
    assert not source.is_captured
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (result - llama.cold.prefill(ids)).abs().max() > 0.1 * expected.abs().max()


def test_a_tree_that_was_not_kept_is_made_when_it_is_needed(llama: Kept, tmp_path: Path) -> None:
    """A process that saw no tree kept only the step for rows; the next one captures for the tree alone."""
    options = replace(llama.options, cache=copied(llama, tmp_path))
    assert options.cache is not None
    options.cache.put_json(start(llama.model, options, is_tree=True).warm.key, {})
    warm, source = warm_start(llama.model, options)
    assert not source.is_captured
    again = logits_of_everything(warm)
    assert source.is_captured
    for ours, theirs in zip(again, logits_of_everything(CachedModel(llama.source, spare=4)), strict=True):
        assert torch.equal(ours, theirs)
    third, third_source = warm_start(llama.model, options)
    logits_of_everything(third)
    assert not third_source.is_captured


def test_what_takes_long_is_said(llama: Kept) -> None:
    """Cold: every stage, one after the other; warm: one."""
    said: list[str] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        said.append(name)
        yield
        said.append("")

    options = replace(llama.options, warm=False)
    StepSource.of_module(llama.model, options=options, phase=phase).compiled(is_tree=False)
    assert said == ["capture", "", "derive the cache of", "", "compile", ""]
    said.clear()
    StepSource.of_module(llama.model, options=llama.options, phase=phase).compiled(is_tree=False)
    assert said == ["load the kernels of", ""]


# -- misses ---------------------------------------------------------------------------------------------------------


def set_eps(model: Any) -> None:
    model.config = replace(model.config, norm_eps=1e-3)


def halve(model: Any) -> None:
    model.norm.weight = model.norm.weight.double()


def widen(model: Any) -> None:
    model.lm_head.weight = torch.cat((model.lm_head.weight, model.lm_head.weight))


@pytest.mark.parametrize("change", [set_eps, halve, widen])
def test_another_model_is_a_miss(change: Callable[[Any], None], llama: Kept, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    assert start(model, llama.options).restore() is not None
    change(model)
    assert start(model, llama.options).restore() is None


@pytest.mark.parametrize(
    "changes",
    [{"skip": frozenset({"fuse_input"})}, {"fuel": 3}, {"threads": 2}, {"target": replace(TARGET, l2_bytes=1 << 21)}],
    ids=str,
)  # fmt: skip
def test_other_options_are_a_miss(changes: dict[str, Any], llama: Kept) -> None:
    assert start(llama.model, replace(llama.options, **changes)).restore() is None


def test_another_torchweld_is_a_miss(llama: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "package_digest", lambda: "another")
    assert start(llama.model, llama.options).restore() is None


def test_rows_trees_and_the_model_itself_are_three_entries(llama: Kept) -> None:
    keys = {start(llama.model, llama.options, is_tree).warm.key for is_tree in (False, True)}
    plain = find_step_start(llama.model, (None,), llama.options, ())
    assert plain is not None
    assert len(keys | {plain.warm.key}) == 3
    other = find_step_start(llama.model, (draw(2, 7, 0),), llama.options, (256, False))
    assert other is not None and other.warm.key not in keys


def test_options_that_forbid_it_and_foreign_models_start_cold(llama: Kept) -> None:
    for options in (replace(llama.options, warm=False), replace(llama.options, after_pass=lambda *_: None)):
        assert StepSource.of_module(llama.model, options=options)._find_start(False) is None

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama.model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(ids)
            return logits

    foreign = StepSource.of_module(Foreign().eval(), options=llama.options)
    assert foreign._find_start(False) is None
    model = CachedModel(foreign)
    assert foreign.is_captured
    ids = draw(2, 5, 1)
    assert torch.allclose(model.prefill(ids), llama.cold.prefill(ids), rtol=1e-4, atol=1e-5)


def test_an_entry_of_a_model_is_no_step(llama: Kept, tmp_path: Path) -> None:
    """An entry without the facts of a step, put where a step belongs, is not taken."""
    found = start(llama.model, replace(llama.options, cache=copied(llama, tmp_path)))
    assert found.restore() is not None
    assert found.warm.store(llama.cold.compiled(), None)
    assert found.restore() is None


# -- what is in the cache -------------------------------------------------------------------------------------------


def test_cut_entries_are_rebuilt(llama: Kept, tmp_path: Path) -> None:
    cache = copied(llama, tmp_path)
    found = start(llama.model, replace(llama.options, cache=cache))
    payload = cache.get(found.warm.key)
    assert payload is not None
    payload.write_bytes(payload.read_bytes()[:-40])
    model, source = warm_start(llama.model, replace(llama.options, cache=cache))
    assert source.is_captured
    ids = draw(1, 6, 8)
    assert torch.equal(model.prefill(ids), llama.cold.prefill(ids))
    again, source = warm_start(llama.model, replace(llama.options, cache=cache))
    assert not source.is_captured
    assert torch.equal(again.prefill(ids), llama.cold.prefill(ids))


def edited_step(data: Any, change: Callable[[list[Any]], None]) -> Any:
    """A copy of an entry with its facts of the step changed; they are the last field."""
    copy = json.loads(json.dumps(data))
    change(copy["value"][-1])
    return copy


def wrong_inputs(facts: list[Any]) -> None:
    facts[-1] = '["tuple", "leaf"'


def wrong_state(facts: list[Any]) -> None:
    facts[0][0][3] = "two"


def unknown_dtype(facts: list[Any]) -> None:
    facts[0][0][6] = "os.system"


def missing_fact(facts: list[Any]) -> None:
    facts.pop()


def no_states(facts: list[Any]) -> None:
    facts[0] = []


def fewer_heads(facts: list[Any]) -> None:
    facts[0][0][3] = 1


def other_type(facts: list[Any]) -> None:
    facts[0][0][6] = "float64"


def wide_vocabulary(facts: list[Any]) -> None:
    facts[2] = VOCABULARY + 1


def is_tree(facts: list[Any]) -> None:
    facts[4] = True


def fewer_inputs(facts: list[Any]) -> None:
    facts[-1] = facts[-1].replace('"leaf", ', "", 1)


EDITS = (
    fewer_inputs, wrong_inputs, wrong_state, unknown_dtype, missing_fact, no_states, fewer_heads, other_type,
    wide_vocabulary, is_tree,
)  # fmt: skip


@pytest.mark.parametrize("change", EDITS)
def test_edited_entries_are_rebuilt(change: Callable[[list[Any]], None], llama: Kept, tmp_path: Path) -> None:
    cache = copied(llama, tmp_path)
    found = start(llama.model, replace(llama.options, cache=cache))
    data = cache.get_json(found.warm.key)
    cache.put_json(found.warm.key, edited_step(data, lambda facts: None))
    assert found.restore() is not None
    cache.put_json(found.warm.key, edited_step(data, change))
    assert start(llama.model, replace(llama.options, cache=cache)).restore() is None


def test_a_step_with_more_to_say_is_not_stored(llama: Kept) -> None:
    @dataclass(frozen=True)
    class Longer(StepProgram):
        extra: str | None = None

    step, _ = llama.source.compiled(is_tree=False)
    values = {name: getattr(step, name) for name in ("program", *KEPT)}
    assert step_facts(Longer(**values)).vocabulary == VOCABULARY
    with pytest.raises(NotStorable, match="extra"):
        step_facts(Longer(**values, extra="one"))
