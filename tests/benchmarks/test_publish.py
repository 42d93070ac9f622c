"""Markers in a page, and dated results."""

from datetime import date
from pathlib import Path

import pytest

from benchmarks.machine import Description, Disturbance
from benchmarks.peers.systems import MODELS
from benchmarks.publish import (
    PAGE,
    Circumstances,
    MarkersMissing,
    replace_between,
    report,
    update_page,
    write_dated,
    write_results,
)
from benchmarks.rows import Row, from_json
from torchweld.graph.target import SM_80

ROW = Row("smollm2", "tg128", "ours", 100.0, 1.0, "tok/s", 0.5)
CIRCUMSTANCES = Circumstances(
    date(2026, 1, 2), Description("Some CPU, 2 cores", 2, 8.0, "Linux", "3.11"), SM_80.ceilings(),
    Disturbance(0.0, 0.0, 0.1), Disturbance(0.01, 0.0, 0.2), 2, 5, (("ours", "version 1"),),
)  # fmt: skip
PAGE_TEXT = "above\n<!-- peers:begin -->\nold\n<!-- peers:end -->\nbelow\n"


def test_only_the_text_between_the_markers_changes() -> None:
    once = replace_between(PAGE_TEXT, "peers", "\nnew\n\n")
    assert once == "above\n<!-- peers:begin -->\nnew\n<!-- peers:end -->\nbelow\n"
    assert replace_between(once, "peers", "new") == once
    assert replace_between(once, "peers", "old") == PAGE_TEXT


@pytest.mark.parametrize(
    "page",
    [
        "no markers",
        "<!-- peers:begin -->\n",
        "<!-- peers:end -->\n<!-- peers:begin -->",
        PAGE_TEXT + PAGE_TEXT,
        PAGE_TEXT.replace("peers", "others"),
    ],
)
def test_a_page_without_its_markers_is_left_alone(tmp_path: Path, page: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(page, "utf-8")
    with pytest.raises(MarkersMissing, match=r"page\.md: expected one <!-- peers:begin -->"):
        update_page("peers", "new", path)
    assert path.read_text("utf-8") == page


def test_the_page_of_the_repository_has_every_pair_of_markers() -> None:
    page = PAGE.read_text("utf-8")
    for name in (*(f"peers-{model}" for model in MODELS), "scaling", "coldstart"):
        assert "a table" in replace_between(page, name, "a table")


def test_results_are_dated_and_complete(tmp_path: Path) -> None:
    text = report([ROW], CIRCUMSTANCES, "| promise |\n")
    path = write_results("peers", [ROW], text, CIRCUMSTANCES, tmp_path / "results")
    assert path.name == "2026-01-02-some-cpu-2-cores-2cpu-peers.md"
    written = path.read_text("utf-8")
    for part in (
        "Some CPU",
        "2039.0 GB/s",
        "Before the run: load 0.10",
        "ours: version 1",
        "promise",
        "tg128",
    ):
        assert part in written
    assert from_json(path.with_suffix(".json").read_text("utf-8")) == (ROW,)
    assert "<svg" in path.with_suffix(".svg").read_text("utf-8")
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".md", ".svg"]


def test_a_dated_table_says_how_it_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.publish.RESULTS", tmp_path)
    path = write_dated("decoding", "8 tokens, 2 rounds", "int8", "| a |\n", '[{"a": 1}]\n')
    assert path.name.endswith("-decoding-int8.md") and path.parent == tmp_path
    heading, table = path.read_text(encoding="utf-8").split("\n\n", 1)
    assert heading == "# decoding" and table.startswith("Measured on ")
    assert table.endswith("; int8, 8 tokens, 2 rounds.\n\n| a |\n")
    assert path.with_suffix(".json").read_text(encoding="utf-8") == '[{"a": 1}]\n'
