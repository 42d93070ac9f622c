"""Repeat the tests marked `fuzz` with fresh seeds until the time is up or one fails.

Run as `make fuzz SECONDS=60`. Each round is a pytest run with a seed of its own, printed first, so that a
failure is repeated by the command in its last line. Hypothesis also keeps the failing example.
"""

import argparse
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence

NO_TESTS_COLLECTED = 5


def round_command(seed: int, more: Sequence[str]) -> list[str]:
    """Return the pytest command of one round."""
    options = ["-m", "fuzz", "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}", "--timeout=900"]
    return [sys.executable, "-m", "pytest", "-x", "-q", *options, *more]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rounds until `--seconds` have passed (the last one to its end); pytest's exit code of the last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0, help="start no new round after this long")
    options, more = parser.parse_known_args(arguments)
    start, rounds = time.monotonic(), 0
    while rounds == 0 or time.monotonic() - start < options.seconds:
        rounds += 1
        command = round_command(secrets.randbelow(2**32), more)
        print(f"round {rounds}: {' '.join(command[1:])}", flush=True)
        code = subprocess.run(command, check=False).returncode
        if code == NO_TESTS_COLLECTED:
            print("fuzz: no test is marked 'fuzz' (or the given options leave none)", file=sys.stderr)
            return code
        if code != 0:
            print(f"fuzz: round {rounds} failed; repeat it with: {' '.join(command)}", file=sys.stderr)
            return code
    print(f"fuzz: {rounds} rounds in {time.monotonic() - start:.0f} s, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
