#!/usr/bin/env bash
# Set up, then lint and test, on two cores.
# Usage: scripts/test.sh [PYTEST ARGUMENTS]    for example scripts/test.sh -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Worksteal leaves most of a file to one worker, whose tests share fixtures.
(($#)) || set -- -n 2 --dist worksteal
exec .venv/bin/python -m pytest "$@"
