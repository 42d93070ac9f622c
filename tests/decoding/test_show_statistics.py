"""Statistics on the screen: units, width, what is left out where it is not known."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from tests.decoding.toy_models import Markov, ToyModel
from torchweld.decoding.show_statistics import Readings, print_table, read_statistics, summary, to_json
from torchweld.decoding.statistics import Statistics

SPECULATIVE = Statistics(
    strategy="lookup",
    prompt_tokens=100,
    new_tokens=41,
    passes=10,
    speculative_passes=8,
    rows=60,
    drafted=50,
    accepted=30,
    accepted_lengths=(1, 0, 1, 2, 2, 2),
    given_in_passes=40,
    first_token_seconds=0.25,
    decode_seconds=0.5,
    proposal_seconds=0.1,
)
PLAIN = Statistics("plain", 5, 11, 10, 0, 10, 0, 0, (), 10, 0.05, 0.2, 0.0)


def table(readings: Readings) -> str:
    stream = io.StringIO()
    print_table(readings, Console(file=stream, width=200))
    return stream.getvalue()


def test_memory_is_that_of_the_models_passes() -> None:
    readings = Readings(SPECULATIVE, bytes_per_pass=100_000_000, read_gb_s=10.0)
    assert readings.gb_s == pytest.approx(10 * 0.1 / 0.4)  # guessing is not reading
    assert readings.share_of_read == pytest.approx(0.25)
    assert Readings(SPECULATIVE).gb_s is None and Readings(SPECULATIVE).share_of_read is None


def test_table() -> None:
    text = table(Readings(SPECULATIVE, 100_000_000, 10.0, 0.123))
    assert max(map(len, text.splitlines())) <= 80
    words = ("250.0  ms", "80.0  tokens/s", "10  4.00 tokens each", "2.5  GB/s, 25% of this machine's 10.0")
    for expected in (*words, "60% of the guesses, 3.75 per pass", "12%  from which guesses pay"):
        assert expected in text
    bars = [line for line in text.splitlines() if "█" in line]
    assert len(bars) == 5 and max(line.count("█") for line in bars) == 40


def test_precision_is_named_where_it_is_known() -> None:
    assert "int8  for products with stored weights" in table(Readings(PLAIN, precision="int8"))
    assert "precision" not in table(Readings(PLAIN))


def test_plain_decoding_has_no_guesses_to_show() -> None:
    text = table(Readings(PLAIN))
    assert "guess" not in text and "GB/s" not in text and "50.0  tokens/s" in text


def test_guesses_that_never_pay() -> None:
    assert "no rate" in table(Readings(SPECULATIVE, 1, 1.0, None))


def test_json_names_units() -> None:
    numbers = json.loads(json.dumps(to_json(Readings(SPECULATIVE, 100_000_000, 10.0, 0.123))))
    assert numbers["accepted_lengths"] == [1, 0, 1, 2, 2, 2]
    assert (numbers["tokens_per_second"], numbers["gb_s"]) == (80.0, pytest.approx(2.5))
    assert numbers["precision"] is None
    assert (numbers["break_even_acceptance"], numbers["first_token_seconds"]) == (0.123, 0.25)


def test_summary() -> None:
    assert summary(PLAIN) == "11 tokens, 50.0 tokens/s, plain"
    assert summary(SPECULATIVE).endswith("lookup (4.00 tokens per pass, 30 of 50 guesses accepted)")


def test_a_model_without_a_report() -> None:
    assert read_statistics(PLAIN, ToyModel(Markov(5))) == Readings(PLAIN)
