"""Run the self-checks of dumped kernels: `python -m torchweld.codegen.check_worker FILE...`, one JSON line per file.

Many files share one process, because loading torch and Triton takes longer than most checks.  Without a GPU the
files' kernels run in Triton's interpreter, so this process must not have loaded Triton before.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path


def check_file(path: Path, number: int) -> float:
    """Load one dumped file and run its `check`; returns the error over the tolerance, raises what the check raises."""
    spec = importlib.util.spec_from_file_location(f"dumped_{number}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return float(module.check())


def main() -> int:
    """Check every file of the command line; exit code 1 if one failed."""
    failed = False
    for number, name in enumerate(sys.argv[1:]):
        try:
            result: dict[str, object] = {
                "file": name,
                "error": check_file(Path(name), number),
                "problem": None,
            }
        except Exception as error:
            failed = True
            last = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} (line {last.lineno} of {Path(last.filename).name})"
            result = {"file": name, "error": None, "problem": problem}
        print(json.dumps(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
