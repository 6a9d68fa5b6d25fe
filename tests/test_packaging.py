"""The built wheel trains by itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import SMALL, arguments

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_trains_in_a_clean_environment(tmp_path: Path) -> None:
    def call(*command) -> str:
        result = subprocess.run(
            list(map(str, command)), cwd=tmp_path, text=True, capture_output=True
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout + result.stderr

    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    call(sys.executable, "-m", "venv", "clean")
    python = tmp_path / "clean/bin/python"
    # The same build of torch, or a machine without a GPU would get gigabytes of CUDA.
    call(python, "-m", "pip", "install", f"torch=={torch.__version__}", wheel)
    settings = {**SMALL, "training.steps": 4, "lighthouse.dense_from_step": 2}
    log = call(
        python, "-m", "torch.distributed.run", "--nproc-per-node", 1,
        "-m", "torchtitan.models.llama3_lighthouse.train",
        *arguments({**settings, "job.dump_folder": tmp_path / "dump"}),
    )  # fmt: skip
    assert "Stage 'dense' begins at step 3 after lighthouse" in log
    assert (tmp_path / "dump/checkpoint/step-4/.metadata").is_file()
