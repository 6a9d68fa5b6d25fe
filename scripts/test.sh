#!/usr/bin/env bash
# Set up, then lint and test. Further arguments go to pytest, for example: scripts/test.sh -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
