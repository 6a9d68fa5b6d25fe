"""A trained run for the tests of evaluations."""

from pathlib import Path

import pytest
from launch import VALIDATED, Run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two Lighthouse steps, stopped there, and a dense one; the last two are saved."""
    folder = tmp_path_factory.mktemp("run")
    Run(folder, {**VALIDATED, "training.steps": 2}).succeed()
    Run(folder, VALIDATED).succeed()
    return folder / "dump"
