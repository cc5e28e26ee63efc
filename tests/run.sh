#!/usr/bin/env bash
# bash tests/run.sh [full] [pytest arguments ...]
#
# Sets up the environment like examples/quickstart.sh, checks style and types, and runs the fast tests; with `full`, all.
# Needs no GPU and no display; everything that it downloads comes from your package index.
set -uo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/examples/setup.sh"
prepare_environment "$root" tests || exit 1
cd "$root" || exit 1

full=false
if [ "${1:-}" = full ]; then
    full=true
    shift
fi
# The tests run several processes on few cores.
export OMP_NUM_THREADS=1

failed=0
"$PYTHON" -m ruff check . || failed=1
"$PYTHON" -m ruff format --check --quiet . || { failed=1; echo "ruff format would change files: run it."; }
"$PYTHON" -m mypy || failed=1
# Two files of tests at a time: most wait for processes, or have one.
"$PYTHON" -m pytest -m "not slow" -n 2 --dist loadfile "$@" || failed=1
if $full; then
    # In the order of the folders, so that the longest file, the quickstart, is not left to the end.
    "$PYTHON" -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --durations=25 "$@" || failed=1
fi
exit $failed
