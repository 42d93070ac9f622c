"""The six variables: every value that means something, and one clear error for every one that does not."""

import logging
from pathlib import Path

import pytest

from torchweld.optimizer.environment import (
    VARIABLES,
    Environment,
    LogChoice,
    SettingError,
    apply_logs,
    parse_logs,
    read_environment,
)
from torchweld.optimizer.suggest import UnknownNameError

PASSES = ("fuse_vertical", "fuse_horizontal", "recognize_rope")


def test_nothing_set_means_the_defaults() -> None:
    assert read_environment(PASSES, {}) == Environment()
    assert read_environment(PASSES, {variable.name: " " for variable in VARIABLES}) == Environment()


def test_every_variable_is_read(tmp_path: Path) -> None:
    found = read_environment(
        PASSES,
        {
            "TORCHWELD_LOGS": "+codegen",
            "TORCHWELD_DUMP": str(tmp_path),
            "TORCHWELD_VERIFY": "2",
            "TORCHWELD_FUEL": "17",
            "TORCHWELD_SKIP": "fuse_vertical, recognize_rope",
            "TORCHWELD_CACHE_DIR": str(tmp_path / "cache"),
            "TORCHWELD_ISA": "portable",
            "PATH": "not ours",
        },
    )
    assert found == Environment(
        logs=(LogChoice("codegen", logging.DEBUG),),
        dump=tmp_path,
        verify=2,
        fuel=17,
        skip=frozenset({"fuse_vertical", "recognize_rope"}),
        cache_dir=tmp_path / "cache",
        isa="portable",
    )


def test_no_fuel_and_zero_fuel_differ() -> None:
    assert read_environment(PASSES, {"TORCHWELD_FUEL": "0"}).fuel == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TORCHWELD_VERIFY", "3", "TORCHWELD_VERIFY=3: expected 0, 1, 2"),
        ("TORCHWELD_VERIFY", "yes", "TORCHWELD_VERIFY=yes: expected a whole number"),
        ("TORCHWELD_FUEL", "-1", "TORCHWELD_FUEL=-1: expected a whole number"),
        ("TORCHWELD_FUEL", "1.5", "expected a whole number"),
        ("TORCHWELD_DUMP", __file__, "is a file; expected a folder"),
        ("TORCHWELD_ISA", "sse9", "TORCHWELD_ISA=sse9: expected one of native, avx512, avx2, portable"),
        ("TORCHWELD_FEUL", "1", "TORCHWELD_FEUL is no variable of torchweld; the nearest is TORCHWELD_FUEL"),
    ],
)
def test_bad_values_are_named(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingError) as error:
        read_environment(PASSES, {name: value})
    assert message in str(error.value)


def test_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as error:
        read_environment(PASSES, {"TORCHWELD_SKIP": "fuse_vertical,fuse_horizontl"})
    assert "TORCHWELD_SKIP: unknown pass 'fuse_horizontl'" in str(error.value)
    assert error.value.nearest == "fuse_horizontal"


def test_logs_follow_the_grammar_of_torch_logs() -> None:
    assert parse_logs("+graph,-models, codegen.cache ,fuse_vertical,torchweld.decoding,all", PASSES) == (
        LogChoice("graph", logging.DEBUG),
        LogChoice("models", logging.ERROR),
        LogChoice("codegen.cache", logging.INFO),
        LogChoice("passes.fuse_vertical", logging.INFO),
        LogChoice("decoding", logging.INFO),
        LogChoice("", logging.INFO),
    )


def test_unknown_log_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown log 'codgen'; the nearest valid one is 'codegen'"):
        parse_logs("+codgen", PASSES)


def test_apply_logs_sets_levels_and_one_handler() -> None:
    root, room = logging.getLogger("torchweld"), logging.getLogger("torchweld.passes")
    before = (list(root.handlers), root.propagate, root.level, room.level)
    try:
        apply_logs([LogChoice("passes", logging.DEBUG)])
        apply_logs([LogChoice("", logging.ERROR)])
        assert (room.level, root.level) == (logging.DEBUG, logging.ERROR)
        assert len(root.handlers) == max(1, len(before[0]))
    finally:
        root.handlers, root.propagate = before[0], before[1]
        root.setLevel(before[2])
        room.setLevel(before[3])
