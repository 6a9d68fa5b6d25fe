"""The examples train through both stages, in steps that their command line sets."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lighthouse.transformers

EXAMPLES = Path(__file__).parents[1] / "examples"
each_length = pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no settings behind, and find none of a launcher that another test was."""
    monkeypatch.setattr(lighthouse.transformers, "_registered", None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def loaded(name: str, monkeypatch: pytest.MonkeyPatch, *line: object) -> ModuleType:
    """An example as a module, with a command line."""
    file = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", [str(file), *map(str, line)])
    return example


@each_length
def test_own_model(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = loaded("own_model", monkeypatch, "--steps", steps).main()
    assert len(losses) == 2 * steps
    assert losses[-1] < losses[steps - 1] < losses[0]


@each_length
def test_transformers_trainer(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("--steps", steps, "--output", tmp_path)
    first, second = loaded("transformers_trainer", monkeypatch, *line).main()
    assert len(first) == len(second) == steps
    assert second[-1] < first[-1] < first[0]
    assert (tmp_path / "model.safetensors").is_file()
