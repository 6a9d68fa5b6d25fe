"""``run_train.sh``: which command its environment variables make."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIABLES = ("CONFIG_FILE", "NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "LOG_RANK")


@pytest.fixture
def call(tmp_path: Path):
    """Run a copy of the script whose set-up does nothing and whose ``lighthouse`` prints."""
    shutil.copy(ROOT / "run_train.sh", tmp_path)
    programs = {"scripts/setup.sh": "", ".venv/bin/lighthouse": 'echo "$*"'}
    for name, body in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    for name in ("debug_cpu", "other"):
        (tmp_path / "train_configs").mkdir(exist_ok=True)
        (tmp_path / f"train_configs/{name}.toml").touch()

    def run(*line: str, **variables: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        return subprocess.run(
            [tmp_path / "run_train.sh", *line],
            env={**kept, **variables}, text=True, capture_output=True,
        )  # fmt: skip

    return run


DEBUG = "train_configs/debug_cpu.toml"


@pytest.mark.parametrize(("line", "variables", "command"), [
    (["--training.steps", "5"], {},
     f"train {DEBUG} --nodes 1 --log-rank 0 --training.steps 5"),
    ([], {"NGPU": "3", "LOG_RANK": "0,1", "CONFIG_FILE": "train_configs/other.toml"},
     "train train_configs/other.toml --nodes 1 --processes 3 --log-rank 0,1"),
    ([], {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0"},
     f"train {DEBUG} --nodes 2 --node-rank 1 --master-address host0 --master-port 29500 "
     "--log-rank 0"),
    ([], {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "7"},
     f"train {DEBUG} --nodes 2 --node-rank 1 --master-address host0 --master-port 7 --log-rank 0"),
    (["--dry-run", "--training.steps", "5"], {"NGPU": "8", "NNODES": "4"},
     f"train {DEBUG} --nodes 4 --processes 8 --log-rank 0 --dry-run --training.steps 5"),
    (["--training.steps", "5", "--dry-run"], {"NNODES": "4"},
     f"train {DEBUG} --nodes 4 --log-rank 0 --training.steps 5 --dry-run"),
    (["--list-keys"], {"CONFIG_FILE": "train_configs/other.toml"},
     "train train_configs/other.toml --nodes 1 --log-rank 0 --list-keys"),
])  # fmt: skip
def test_command(call, line: list[str], variables: dict[str, str], command: str) -> None:
    done = call(*line, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{command}\n"


def test_help_names_the_variables_and_where_the_keys_are(call) -> None:
    done = call("--training.steps", "5", "--help", CONFIG_FILE="none.toml")
    assert done.returncode == 0 and len(done.stdout.splitlines()) < 20
    for word in (*VARIABLES, "--dry-run", "--list-keys"):
        assert re.search(rf"^{word} ", done.stdout, re.MULTILINE), word


@pytest.mark.parametrize(("variables", "message"), [
    ({"CONFIG_FILE": "none.toml"}, "CONFIG_FILE=none.toml: no such file; see train_configs/."),
    ({"NNODES": "abc"}, "NNODES=abc must be a number of at least 1."),
    ({"NGPU": "0"}, "NGPU=0 must be a number of at least 1."),
    ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR, the address of the machine"),
    ({"NNODES": "2", "MASTER_ADDR": "h"}, "NNODES=2 needs NODE_RANK, from 0 to 1"),
])  # fmt: skip
def test_mistakes(call, variables: dict[str, str], message: str) -> None:
    done = call(**variables)
    assert done.returncode == 1 and message in done.stderr
    assert not done.stdout
