"""What `import torchweld` and its public names load: the heavy parts wait until something needs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NEVER = ("hypothesis", "networkx", "jinja2", "onnx", "transformers", "triton", "typer", "rich", "pytest")
NOT_WARM = ("torchweld.passes.order", "torchweld.passes.rewrite_kv_cache", "torch._dynamo", "torch._inductor")


@pytest.mark.parametrize(
    "names", ["optimize", "CachedModel, Options, capture, generate, load_model, optimize"]
)
def test_public_names_load_nothing_that_a_warm_start_does_not_need(names: str) -> None:
    code = (
        f"import sys, torch; before = set(sys.modules); from torchweld import {names}; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True, text=True
    )
    loaded = set(done.stdout.split())
    assert "torchweld.optimizer.api" in loaded
    heavy = {module for module in loaded if module.startswith(tuple(f"{name}." for name in NEVER + NOT_WARM))}
    assert not heavy | (loaded & {*NEVER, *NOT_WARM})


def test_the_passes_are_found_when_somebody_asks() -> None:
    code = (
        "import torchweld.passes as passes, sys; assert 'torchweld.passes.order' not in sys.modules; "
        "assert passes.CANONICALIZE and passes.RECOGNIZE and passes.FUSE\n"
        "try: passes.ELSE\nexcept AttributeError as error: assert 'ELSE' in str(error)\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
