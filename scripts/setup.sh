#!/usr/bin/env bash
# Make .venv at the repository root and install Lighthouse with its trainer into it.
# It does nothing if it has done so since pyproject.toml last changed.
# Usage: scripts/setup.sh [EXTRAS]    more extras of pyproject.toml, for example dev or plots,export
#
# PYTHON       interpreter to make the environment with (default: python3)
# TORCH_INDEX  package index for torch on a machine without an accelerator
set -euo pipefail
cd "$(dirname "$0")/.."

extras="trainer${1:+,$1}"
torch_range='torch>=2.11,<2.14'
torch_index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
stamp=".venv/.installed-$extras"
[[ -f "$stamp" && ! pyproject.toml -nt "$stamp" ]] && exit 0

if [[ "$(uname -s)" != Linux ]]; then
    echo "Lighthouse trains on Linux: torchtitan 0.2.2 needs triton, and triton has no package for" \
        "$(uname -s); use WSL or a Linux container." >&2
    exit 1
fi
python="${PYTHON:-python3}"
if [[ ! -x .venv/bin/python ]]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Lighthouse needs Python 3.11 or later, $("$python" --version) found;" \
            "set PYTHON to a newer interpreter." >&2
        exit 1
    }
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
# Pip's warnings are about its own configuration, so only its errors are shown.
# Pip compiles with one core, and half of the time would go into that.
pip=(.venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check)

# The default build of torch brings gigabytes of CUDA, which are useless without an accelerator.
has_accelerator() { [[ -e /dev/nvidiactl || -e /dev/kfd ]] || nvidia-smi -L >/dev/null 2>&1; }
has_torch() { .venv/bin/python -c 'import torch' 2>/dev/null; }
if ! has_accelerator && ! has_torch; then
    echo "No accelerator found: installing the CPU build of torch"
    "${pip[@]}" 'torch==2.13.0+cpu' 2>/dev/null \
        || "${pip[@]}" --index-url "$torch_index" "$torch_range" \
        || {
            echo "No CPU build of torch at the configured package index or at $torch_index;" \
                "set TORCH_INDEX, or install '$torch_range' into .venv yourself." >&2
            exit 1
        }
fi
echo "Installing Lighthouse with the extras $extras into .venv, which takes minutes"
"${pip[@]}" --editable ".[$extras]"
# Some packages hold files that are not Python of this version, which pip passes over too.
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
touch "$stamp" .venv/.installed-trainer
