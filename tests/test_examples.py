"""The examples train through both stages, in steps that their command line sets."""

import importlib.util
import re
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

import lighthouse.transformers

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "selection.ipynb"
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
    # Each step has other text, so single steps do not compare.
    first, second = (fmean(stage[steps // 2 :]) for stage in (losses[:steps], losses[steps:]))
    assert second < first < losses[0]


@each_length
def test_transformers_trainer(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("--steps", steps, "--output", tmp_path)
    first, second = loaded("transformers_trainer", monkeypatch, *line).main()
    assert len(first) == len(second) == steps
    assert second[-1] < first[-1] < first[0]
    assert (tmp_path / "model.safetensors").is_file()


def pictures(notebook: nbformat.NotebookNode) -> list[bool]:
    """Whether each cell of code has drawn a picture."""
    return [
        any("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def printed(notebook: nbformat.NotebookNode) -> str:
    """What a notebook has printed."""
    return "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )


# Half a minute by itself, and minutes where other tests take its cores.
@pytest.mark.slow
def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows what its stored outputs show; the numbers of a trained model differ by machine."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    stored = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
    place = {"metadata": {"path": str(EXAMPLES)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    assert pictures(notebook) == pictures(stored) and sum(pictures(stored)) >= 6
    number = re.compile(r"[\d.]+")
    assert number.sub("#", printed(notebook)) == number.sub("#", printed(stored))
    # These follow from the settings, whatever was learned.
    sizes = re.compile(r"(level \d|attention runs).*")
    found = [match[0] for match in sizes.finditer(printed(notebook))]
    assert found == [match[0] for match in sizes.finditer(printed(stored))] and len(found) == 4


def test_notebook_is_stored_small_and_without_traces_of_a_machine() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/|site-packages|Traceback", text)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run all cells in order, then save"
