"""Figures of the docs are drawn from their records by one command."""

import importlib.util
from pathlib import Path

import attention
import pytest
from matplotlib.image import imread

from torchtitan.models.llama3_lighthouse.evaluation.figures import (
    DENSE,
    LIGHTHOUSE,
    WINDOW,
    length_axis,
    length_name,
    new_figure,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def figures():
    """scripts/figures.py as a module."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "scripts/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_is_drawn_from_its_record(figures, tmp_path: Path) -> None:
    """The command knows every figure of the docs, and the files are of its making.

    Other versions of matplotlib draw other pixels, so sizes are compared.
    """
    in_docs = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.png")}
    assert in_docs == set(figures.FIGURES)
    figures.draw_all(tmp_path)
    for name in sorted(in_docs):
        drawn, committed = imread(tmp_path / name), imread(DOCS / name)
        assert drawn.shape == committed.shape, f"{name}: run scripts/figures.py"
        assert drawn.std() > 0.05, f"{name} is empty"


@pytest.mark.parametrize(("length", "name"), [
    (100, "100"), (1500, "1,500"), (8192, "8K"), (16384, "16K"), (98304, "98K"), (131072, "131K"),
    (1048576, "1M"), (1572864, "1.5M"), (2097152, "2M"),
])  # fmt: skip
def test_lengths_are_named_as_they_are_spoken_of(length: int, name: str) -> None:
    assert length_name(length) == name


def test_lengths_are_ticked_where_they_were_measured() -> None:
    axis = new_figure().subplots()
    axis.plot([8192, 98304], [1, 2])
    length_axis(axis, [98304, 8192, 98304])
    assert list(axis.get_xticks()) == [8192, 98304] and not list(axis.get_xticks(minor=True))
    assert [label.get_text() for label in axis.get_xticklabels()] == ["8K", "98K"]


def test_missing_matplotlib_is_said_before_any_drawing(figures, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["figures.py"])
    monkeypatch.setattr(figures, "draw_all", lambda output: pytest.fail("drew"))
    with pytest.raises(SystemExit):
        figures.main()
    assert "figures need matplotlib: .venv/bin/pip install" in capsys.readouterr().err


def test_one_thing_has_one_colour_whatever_its_seed(figures, monkeypatch, tmp_path: Path) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    figures.neighbourhood(tmp_path / "seeds.png")
    (figure,) = drawn
    arms = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for axis in figure.axes:
        found = {(arms[int(line.get_ydata()[0])].split()[0], line.get_color())
                 for line in axis.lines}  # fmt: skip
        assert found == {("dense", DENSE), ("merged", LIGHTHOUSE), ("window", WINDOW)}


def test_no_line_joins_cases_of_different_levels(monkeypatch, tmp_path: Path) -> None:
    found = {}
    monkeypatch.setattr(attention, "plot_over_length",
                        lambda path, title, panels: found.update(panels))  # fmt: skip
    result = {"ms": 1.0, "GiB": 1.0}
    both = {f"{name}, both": result for name in attention.STYLES}
    cases = [("8192,3,4,128", 8192), ("16384,3,4,256", 16384), ("32768,4,4,128", 32768)]
    records = [{"case": case, "N": n, "results": both} for case, n in cases]
    attention.plot({"GPU": "GPU", "records": records}, tmp_path / "plot.png")
    lengths = {name: [n for n, _ in points]
               for name, (_, _, points) in found["forward + backward, ms"].items()}  # fmt: skip
    assert lengths["dense"] == [8192, 16384, 32768]
    assert lengths["Lighthouse, L = 3"] == [8192, 16384]
    assert lengths["Lighthouse, L = 4"] == [32768]
