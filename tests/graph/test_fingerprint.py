"""The digest of the sources; what else a fingerprint holds is tested in tests/optimizer/test_warm.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from torchweld.graph.fingerprint import PACKAGE, Unjudged, digest_sources, fingerprint


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "package"
    (root / "room").mkdir(parents=True)
    (root / "room" / "pass.py").write_text("a = 1\n")
    (root / "room" / "kernel.h").write_text("int a;\n")
    return root


def test_every_source_counts(package: Path) -> None:
    digests = [digest_sources(package)]
    (package / "room" / "kernel.h").write_text("int b;\n")
    digests.append(digest_sources(package))
    (package / "room" / "pass.py").rename(package / "room" / "other.py")
    digests.append(digest_sources(package))
    (package / "room" / "new.cpp").write_text("")
    digests.append(digest_sources(package))
    assert len(set(digests)) == 4


def test_rooms_may_be_links_and_other_files_do_not_count(package: Path, tmp_path: Path) -> None:
    before = digest_sources(package)
    (package / "room" / "__pycache__").mkdir()
    (package / "room" / "__pycache__" / "pass.py").write_text("x")
    (package / "room" / "notes.md").write_text("x")
    assert digest_sources(package) == before
    (package / "room").rename(tmp_path / "elsewhere")
    (package / "room").symlink_to(tmp_path / "elsewhere")
    assert digest_sources(package) == before


def test_sources_newer_than_the_process_are_refused(package: Path) -> None:
    file = package / "room" / "pass.py"
    os.utime(file, (2e9, 2e9))
    with pytest.raises(Unjudged, match=r"pass\.py is newer"):
        digest_sources(package, 1.9e9)
    assert digest_sources(package, 2.1e9)


def test_the_package_is_found_with_all_its_rooms() -> None:
    assert {path.name for path in PACKAGE.iterdir()} >= {"graph", "passes", "codegen", "optimizer", "models"}


def test_functions_of_torch_may_be_attributes_and_others_may_not() -> None:
    model, inputs = (
        nn.TransformerEncoderLayer(8, 2, activation=torch.nn.functional.gelu),
        (torch.rand(2, 3, 8),),
    )
    other = nn.TransformerEncoderLayer(8, 2, activation=torch.nn.functional.relu)
    foreign = nn.TransformerEncoderLayer(8, 2, activation=lambda x: x)
    digests = [fingerprint(model, inputs, {}), fingerprint(other, inputs, {})]
    assert None not in digests
    assert digests[0] != digests[1]
    assert fingerprint(foreign, inputs, {}) is None


def test_facts_count() -> None:
    model, inputs = nn.Linear(3, 4), (torch.rand(2, 3),)
    assert fingerprint(model, inputs, {}, (1,)) != fingerprint(model, inputs, {}, (True,))
    assert fingerprint(model, inputs, {}, (object(),)) is None
