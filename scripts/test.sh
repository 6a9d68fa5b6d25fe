#!/usr/bin/env bash
# Set up, then lint, check types and test: ten minutes on two cores.
# Usage: scripts/test.sh [PYTEST ARGUMENTS]
#
# With arguments, set up and run pytest with them alone, for example scripts/test.sh -m gpu.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh dev
if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check
# Tests of a file share fixtures, and worksteal leaves most of a file's tests to one worker.
exec .venv/bin/python -m pytest -n 2 --dist worksteal
