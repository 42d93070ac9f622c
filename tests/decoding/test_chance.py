"""Dice: what never happens never happens, seeds repeat, frequencies are those asked for."""

import pytest
import torch

from torchweld.decoding.chance import Dice


def test_equal_seeds_give_equal_answers() -> None:
    weights = torch.rand(50, dtype=torch.float64)
    first, second = Dice(7), Dice(generator=torch.Generator().manual_seed(7))
    assert [first.draw(weights) for _ in range(20)] == [second.draw(weights) for _ in range(20)]


def test_dice_without_a_seed_differ() -> None:
    weights = torch.ones(1000, dtype=torch.float64)
    assert len({tuple(dice.draw(weights) for _ in range(8)) for dice in (Dice(), Dice(), Dice())}) == 3


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Dice().draw(torch.ones(3, dtype=torch.float64))
    assert torch.equal(before, torch.get_rng_state())


def test_certain_answers() -> None:
    dice = Dice(0)
    assert all(dice.happens(p) for p in (1.0, 1.5, float("inf")) for _ in range(50))
    assert not any(dice.happens(p) for p in (0.0, -0.5) for _ in range(50))


@pytest.mark.parametrize("place", [0, 3, 6])
def test_weights_of_zero_are_never_drawn(place: int) -> None:
    weights = torch.zeros(7, dtype=torch.float64)
    weights[place] = 1e-300
    assert {Dice(seed).draw(weights) for seed in range(200)} == {place}


def test_the_largest_uniform_number_stays_inside() -> None:
    class Edge(Dice):
        def _uniform(self) -> float:
            return 1.0

    assert Edge(0).draw(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)) == 1


def test_the_smallest_uniform_number_passes_over_weights_of_zero() -> None:
    class Edge(Dice):
        def _uniform(self) -> float:
            return 0.0

    assert Edge(0).draw(torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)) == 1


def test_frequencies() -> None:
    """Chi-square of 20,000 draws, fixed seed: 99.9 % of right dice pass with 3 degrees of freedom below 16.3."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    dice, counts = Dice(5), [0, 0, 0, 0]
    for _ in range(20_000):
        counts[dice.draw(weights)] += 1
    expected = (weights / weights.sum() * 20_000).tolist()
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True)) < 16.3
    hits = sum(dice.happens(0.3) for _ in range(20_000))
    assert abs(hits - 6000) < 4 * (20_000 * 0.3 * 0.7) ** 0.5
