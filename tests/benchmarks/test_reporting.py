"""Reports of the benchmarks: tables made from records, the crossover and plots."""

import json
from pathlib import Path

import attention
import context_parallel_plots
import context_parallel_results
import gpu_profile
import parts
import pytest
import training_results
from reporting import crossover, plot_over_length, write_report

RECORDS = Path(__file__).parents[2] / "docs" / "benchmarks"


@pytest.mark.parametrize(
    ("record", "table", "make"),
    [
        ("attention.json", "attention.md", attention.tables),
        ("parts.json", "parts.md", parts.tables),
        ("training.json", "training.md", training_results.table),
        ("training.json", "training_profile.md", gpu_profile.profile_table),
        ("context_parallel.json", "context_parallel.md", context_parallel_results.table),
    ],
)
def test_tables_in_the_docs_are_made_from_the_records(record: str, table: str, make) -> None:
    """Records of earlier revisions stay readable, and nobody edits a table by hand."""
    made = make(json.loads((RECORDS / record).read_text()))
    assert cells_of(made) == cells_of((RECORDS / table).read_text())


def cells_of(text: str) -> list[list[str]]:
    """The cells of each line, without the spaces around them."""
    return [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("faster", "sentence"),
    [
        ({}, "No length has both."),
        (
            {8192: True, 16384: True},
            "Lighthouse is faster at every length measured, from 8,192 tokens on.",
        ),
        (
            {8192: False, 16384: True},
            "Lighthouse is faster from 16,384 tokens on, dense attention at 8,192.",
        ),
        ({8192: False, 16384: False}, "Dense attention is faster at every length measured."),
        (
            {8192: True, 16384: False},
            "Dense attention is faster at 16,384 tokens, the longest measured.",
        ),
    ],
)
def test_crossover(faster: dict[int, bool], sentence: str) -> None:
    assert crossover(faster) == sentence


def test_reports_are_written_to_a_new_folder(tmp_path: Path) -> None:
    write_report({"records": []}, tmp_path / "new", "name")
    assert not (tmp_path / "new" / "name.md").exists()
    write_report({"records": [1]}, tmp_path / "new", "name", "text\n")
    assert json.loads((tmp_path / "new" / "name.json").read_text()) == {"records": [1]}
    assert (tmp_path / "new" / "name.md").read_text() == "text\n"


def test_plots_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    lines = {
        "dense": ("tab:blue", "o-", []),
        "lighthouse": ("tab:orange", "s-", [(16384.0, 2.0), (8192.0, 1.0)]),
    }
    plot_over_length(tmp_path / "some.png", "title", {"ms": lines, "GiB": lines}, "note")
    plot_over_length(tmp_path / "none.png", "title", {"ms": {}, "GiB": {}})
    assert all((tmp_path / name).stat().st_size > 0 for name in ("some.png", "none.png"))


def test_context_parallel_plot_needs_a_speed(tmp_path: Path) -> None:
    row = {"stage": "Lighthouse", "GPUs": 1, "N": 98304, "tps": 1.0}
    context_parallel_plots.plot({"GPU": "GPU", "layer": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    run = {"GPU": "GPU", "training": [row], "longest": [{**row, "N": 196608, "GPUs": 2}]}
    context_parallel_plots.plot(run, tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 0
