#!/usr/bin/env bash
# One line when there is no C++ compiler; silence and success otherwise. Never fatal: graphs then run eagerly.
set -euo pipefail
python="${1:-python3}"
for candidate in ${CXX:+"$CXX"} g++ c++ clang++; do
    # $CXX may carry arguments ("ccache g++"): the first word decides.
    if command -v "${candidate%% *}" >/dev/null 2>&1; then exit 0; fi
done
if "$python" -c 'import ziglang' >/dev/null 2>&1; then exit 0; fi
echo "note: no C++ compiler found, so graphs run eagerly; install g++ or clang++, or the extra 'torchweld[zig]'." >&2
