"""The benchmark of decoding strategies: turns, rows, refusals. What is fast is not decided here."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from typer.testing import CliRunner

from benchmarks import decoding
from benchmarks.decoding import Arena, Contestant, measure_text, parse_heads, prompt_of, quoted, read_text
from benchmarks.decoding_rows import Counts, DecodingRow, measured_row, missing_row, render
from tests.decoding.toy_models import Markov, ToyModel
from torchweld.decoding.lookup import LookupProposer
from torchweld.decoding.step_model import Budget, Outcome, Proposal
from torchweld.models.tokenizer import ChatTemplate, Tokenizer

LETTERS = 256


def byte_tokenizer(chat: ChatTemplate | None = None) -> Tokenizer:
    def build() -> Core:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Core(BPE(vocab={text: number for number, text in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        return core

    return Tokenizer(Path("bytes"), build, None, (), chat)


class Failing(LookupProposer):
    """A proposer that gives up after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def propose(self, context: object, budget: Budget) -> Proposal:
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("no more guesses")
        return Proposal()

    def observe(self, outcome: Outcome) -> None:
        pass


def arena(**contestants: Contestant) -> Arena:
    plain = Contestant(ToyModel(Markov(LETTERS), max_length=4096), None)
    return Arena("toy", byte_tokenizer(), {"plain": plain, **contestants}, {"medusa": "needs trained heads"})


def test_rows_of_one_text() -> None:
    model = ToyModel(Markov(LETTERS), max_length=4096)
    rows = measure_text(arena(lookup=Contestant(model, LookupProposer())), "code", tokens=24, rounds=3)
    plain, lookup, medusa = rows
    assert (plain.strategy, plain.ratio_to_plain, plain.passes, plain.tokens) == ("plain", 1.0, 23, 24)
    assert plain.rounds == lookup.rounds == 3 and plain.mean_accepted == 0.0
    assert lookup.same_as_plain and lookup.tokens == 24
    assert (
        lookup.drafted >= lookup.accepted > 0 and lookup.passes < plain.passes
    )  # a chain of letters is a loop
    assert medusa.reason == "needs trained heads" and medusa.tokens_per_second is None


def test_a_strategy_that_fails_does_not_lose_the_others() -> None:
    for calls in (0, 30):  # before its rounds, and in the middle of them
        failing = Contestant(ToyModel(Markov(LETTERS), max_length=4096), Failing(calls))
        rows = {row.strategy: row for row in measure_text(arena(lookup=failing), "code", tokens=20, rounds=3)}
        assert rows["plain"].reason is None and rows["plain"].rounds == 3
        assert "no more guesses" in (rows["lookup"].reason or "")


def test_reference_runs_only_where_something_is_copied() -> None:
    reference = Contestant(ToyModel(Markov(LETTERS), max_length=4096), LookupProposer())
    for kind, expected in (("prose", False), ("copy", True)):
        rows = measure_text(arena(reference=reference), kind, tokens=8, rounds=1)
        assert any(row.strategy == "reference" for row in rows) is expected


def test_ratios_are_taken_within_rounds() -> None:
    counts = Counts((1, 2), 1, 3, 1, 1.0, 2.0)
    # the machine slowed down by ten in the last round: the ratio does not see it
    row = measured_row("m", "t", "s", counts, counts, [200.0, 220.0, 20.0], [100.0, 100.0, 10.0], False)
    assert row.ratio_to_plain == 2.0 and row.tokens_per_second == 200.0
    other = Counts((1, 3), 1, 3, 1, 1.0, 2.0)
    assert not measured_row("m", "t", "s", other, counts, [1.0], [1.0], False).same_as_plain


ROWS = (
    DecodingRow("toy", "copy", "lookup", 120.0, 3.1, 4.2, 1.0, 4.0, 128, 40, 200, 150, 5, True),
    DecodingRow("toy", "copy", "draft", 50.0, 0.5, 0.1, 1.0, 1.1, 128, 99, 200, 15, 5, False, True),
    missing_row("toy", "copy", "medusa", "no heads, none"),
)


def test_json_has_what_others_read() -> None:
    first = json.loads(render(ROWS, "json"))[0]
    expected = {"model": "toy", "text": "copy", "strategy": "lookup", "tokens_per_second": 120.0}
    assert expected.items() <= first.items() and (first["ratio_to_plain"], first["mean_accepted"]) == (
        3.1,
        4.2,
    )


def test_csv_and_markdown() -> None:
    lines = list(csv.DictReader(io.StringIO(render(ROWS, "csv"))))
    assert [line["strategy"] for line in lines] == ["lookup", "draft", "medusa"]
    assert lines[2]["tokens_per_second"] == "" and lines[2]["reason"] == "no heads, none"
    table = render(ROWS, "md")
    assert "| copy | lookup | 120.0 | 1.0 | 3.10 | 4.20 | 4.00 | 40 | yes |" in table
    assert "50.0 \\*" in table and "| NO |" in table and "- medusa: no heads, none" in table
    with pytest.raises(ValueError, match="expected md, csv or json"):
        render(ROWS, "xml")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", decoding.TEXTS)
def test_texts_are_there(kind: str) -> None:
    assert 200 < len(read_text(kind)) < 3000 and read_text(kind).isascii()


def test_the_copy_begins_again() -> None:
    text = read_text("copy")
    beginning = text.rpartition('"')[2]
    assert quoted(text).startswith(beginning) and len(quoted(text)) > 500
    with pytest.raises(ValueError, match="quotes nothing"):
        quoted("nothing")


def test_chat_is_written_as_the_model_wants_it() -> None:
    rendered = byte_tokenizer(
        ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    )
    assert rendered.decode(prompt_of("chat", rendered)).startswith("[user]I have two")
    bare = byte_tokenizer()
    assert bare.decode(prompt_of("chat", bare)).startswith("Question: I have two")
    assert bare.decode(prompt_of("prose", bare)) == read_text("prose")


def test_heads_by_model(tmp_path: Path) -> None:
    file = tmp_path / "heads"
    file.touch()
    assert parse_heads([f"smollm2={file}"], decoding.MODELS) == {"smollm2": file}
    for text, words in (("heads", "MODEL=FILE"), ("bert=x", "MODEL=FILE"), ("gemma3=none", "no such file")):
        with pytest.raises(ValueError, match=words):
            parse_heads([text], decoding.MODELS)


@pytest.mark.parametrize(
    "arguments", [["-o", "xml"], ["--strategy", "luck"], ["--heads", "x"], ["--precision", "int3"]]
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments: list[str]) -> None:
    import typer

    app = typer.Typer()
    app.command()(decoding.main)
    done = CliRunner().invoke(app, ["--busy", *arguments])
    assert done.exit_code == 2
