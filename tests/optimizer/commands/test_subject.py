"""Steps of a command are timed, also those inside of others."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from torchweld.models.load import LoadedModel
from torchweld.optimizer.commands.subject import Subject


def test_a_step_inside_of_a_step_is_timed_and_not_shown() -> None:
    subject = Subject(LoadedModel(nn.Identity(), None, (), "m", "none", Path("m"), "other"), ())
    with subject.phase("outer"):
        assert subject.is_busy
        with subject.phase("inner"):
            assert subject.is_busy
        assert subject.is_busy
    assert not subject.is_busy
    assert [phase.name for phase in subject.phases] == ["inner", "outer"]
    assert subject.phases[0].seconds <= subject.phases[1].seconds


def test_a_step_that_fails_is_over() -> None:
    subject = Subject(LoadedModel(nn.Identity(), None, (), "m", "none", Path("m"), "other"), ())
    with pytest.raises(ValueError, match="no"), subject.phase("outer"):
        raise ValueError("no")
    assert not subject.is_busy
