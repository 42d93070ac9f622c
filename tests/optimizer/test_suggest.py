"""The nearest valid name."""

import pytest

from torchweld.optimizer.suggest import UnknownNameError, check_name, nearest, unknown_name


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("expalin", "explain"), ("EXPLAIN", "explain"), ("cash", "cache"), ("rope", "fuse_rope")],
)
def test_nearest(typed: str, expected: str) -> None:
    assert nearest(typed, ["explain", "cache", "fuse_rope"]) == expected


def test_nearest_ignores_case_and_dashes() -> None:
    assert nearest("Fuse-Vertical", ["fuse_horizontal", "fuse_vertical"]) == "fuse_vertical"


def test_far_away_still_names_one() -> None:
    assert nearest("zzz", ["explain", "cache"]) in ("explain", "cache")
    assert nearest("x", []) is None


def test_check_name() -> None:
    assert check_name("pass", "a", ["a", "b"]) == "a"
    with pytest.raises(UnknownNameError) as error:
        check_name("pass", "fuse_vertica", ["fuse_vertical", "fuse_input"], "--skip")
    assert str(error.value) == "--skip: unknown pass 'fuse_vertica'; the nearest valid one is 'fuse_vertical'"


def test_no_valid_name() -> None:
    assert unknown_name("kernel", "x", []) == "unknown kernel 'x'; there is no valid kernel here"
