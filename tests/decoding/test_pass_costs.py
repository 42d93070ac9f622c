"""What passes cost: measured on a simulated clock, kept in the cache folder, read back, interpolated."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from tests.decoding.toy_models import Markov, ToyModel
from torchweld.codegen.cache import Cache, JsonValue
from torchweld.decoding.pass_costs import PassCosts, costs_of, measure_costs
from torchweld.decoding.step_model import DecodingError, LogitsFor


class Timed(ToyModel):
    """Passes take 1 + rows / 10 seconds, and half a second more now and then."""

    def __init__(self, max_length: int | None = None, fingerprint: str | None = None) -> None:
        super().__init__(Markov(7), max_length)
        self.now, self.fingerprint = 0.0, fingerprint

    def step(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Tensor:
        self.now += 1.0 + ids.shape[1] / 10 + (0.5 if len(self.passes) % 5 == 0 else 0.0)
        return super().step(ids, counts=counts, parents=parents, logits_for=logits_for)


def test_the_least_time_of_each_size_counts() -> None:
    model = Timed()
    costs = measure_costs(model, rows=(1, 2, 9), clock=lambda: model.now)
    assert costs.rows == (1, 2, 9)
    assert costs.seconds == pytest.approx((1.1, 1.2, 1.9))
    assert model.lengths == (0,), "nothing is left of the text that was measured on"


def test_sizes_beyond_the_limit_are_left_out() -> None:
    model = Timed(max_length=6)
    costs = measure_costs(model, rows=(1, 2, 5, 17), clock=lambda: model.now)
    assert costs.rows == (1, 2, 5)
    with pytest.raises(DecodingError, match="holds 1 positions; measuring its passes needs at least 2"):
        measure_costs(Timed(max_length=1))


def test_more_rows_never_cost_less() -> None:
    model = Timed()
    # On this clock a pass is shorter the more rows it has.
    costs = measure_costs(model, rows=(1, 2, 3), clock=lambda: sum(3.0 - rows / 2 for rows in model.passes))
    assert costs.seconds == pytest.approx((2.5, 2.5, 2.5))


def test_ratio_is_linear_between_and_beyond() -> None:
    costs = PassCosts((1, 5, 9), (2.0, 4.0, 4.0))
    assert [costs.ratio(rows) for rows in (1, 3, 5, 7, 9, 20)] == [1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert PassCosts((1, 3), (1.0, 2.0)).ratio(7) == 4.0
    assert PassCosts((1,), (0.5,)).ratio(4) == 4.0
    assert PassCosts((1, 2, 4), (1.0, 3.0, 2.0)).ratio(8) == 3.0, (
        "beyond what was measured nothing gets cheaper"
    )


@pytest.mark.parametrize(
    ("rows", "seconds"), [((), ()), ((2,), (1.0,)), ((1, 1), (1.0, 1.0)), ((1,), (0.0,)), ((1, 2), (1.0,))]
)
def test_costs_without_meaning_are_refused(rows: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(DecodingError, match="expected rows ascending from 1"):
        PassCosts(rows, seconds)


def test_a_model_is_measured_once_per_object() -> None:
    model = Timed()
    first = costs_of(model)
    passes = len(model.passes)
    assert passes > 0
    assert costs_of(model) is first and len(model.passes) == passes


def test_a_model_that_can_be_recognized_is_measured_once_per_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first, again, other = Timed(fingerprint="ab"), Timed(fingerprint="ab"), Timed(fingerprint="cd")
    costs = costs_of(first, cache)
    assert costs_of(again, cache) == costs and again.passes == []
    costs_of(other, cache)
    assert other.passes != []


def test_damaged_costs_are_measured_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    costs_of(Timed(fingerprint="ab"), cache)
    (entry,) = [entry for entry in cache.entries() if entry.meta.get("kind") == "pass costs"]
    damaged: list[JsonValue] = [
        {"rows": [1, 2]},
        {"rows": [1, "x"], "seconds": [1.0, 2.0]},
        [],
        {"rows": [3], "seconds": [1.0]},
    ]
    for damage in damaged:
        cache.put_json(entry.key, damage)
        model = Timed(fingerprint="ab")
        costs_of(model, cache)
        assert model.passes != [], damage
