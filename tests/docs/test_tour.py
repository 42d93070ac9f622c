"""docs/tour.md is what the code does today."""

from __future__ import annotations

from scripts.make_tour import PAGE, make_page


def test_tour_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run: python -m scripts.make_tour"
