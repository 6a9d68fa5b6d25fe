"""The benchmarks' command lines: help, and mistakes that end before any measurement."""

import json
import sys
from pathlib import Path

import attention
import context_parallel
import documents
import parts
import pytest
import scorers
import torch
import training
import windows
from arguments import run_benchmark
from measuring import method_of
from reporting import write_report

NEED_CUDA = [attention, documents, parts, scorers, windows]


@pytest.mark.parametrize("script", [*NEED_CUDA, context_parallel, training])
def test_help_says_what_is_written(script, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python scripts/benchmarks/{Path(script.__file__).name}" in text
    assert all(flag in text for flag in ("--output FOLDER", "--name", "--revision"))
    assert ("--no-plots" in text) == (script in (attention, context_parallel, training))


@pytest.mark.parametrize("script", NEED_CUDA)
def test_a_missing_gpu_is_said_first(script, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script.__file__, "--output", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match=f"{Path(script.__file__).name} needs a CUDA device"):
        script.main()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("case", ["98304", "98304,3,4", "a,3,4,1536", "98304,3,4,1536,5"])
def test_cases_have_four_numbers(case: str) -> None:
    with pytest.raises(ValueError, match=f"--cases {case}: .*N,L,p,k.*98304,3,4,1536"):
        method_of(case, "--cases")


@pytest.mark.parametrize("case", ["98304", "98304,8,128", "98304,8,128,0", "98304,8,128,w"])
def test_cases_of_windows_have_four_numbers(case: str) -> None:
    with pytest.raises(ValueError, match=f"--cases {case}: .*N,H,D,W.*98304,8,128,256"):
        windows.numbers_of(case)


def test_floor_of_a_window_is_its_slower_limit() -> None:
    """W N pairs less the first rows', four FLOPs for each pair and element, or the bytes."""
    narrow, wide = (windows.floor(98304, 8, 128, window, 3000.0) for window in (16, 1024))
    assert narrow["both"] == pytest.approx(12 * 2 * 98304 * 8 * 128 / 3000e9 * 1e3)
    assert wide["both"] == pytest.approx(3.5 * 4 * 128 * 8 * 1024 * 98304 / 600e12 * 1e3, rel=0.01)


def test_cases_keep_the_rules_of_the_method() -> None:
    n, config = method_of("98304,3,4,1536", "--case", scorer="gla")
    assert (n, config.levels, config.pooling_factor, config.top_k) == (98304, 3, 4, 1536)
    assert config.scorer == "gla"
    with pytest.raises(ValueError, match="--case 98305,3,4,1536: .*multiple of"):
        method_of("98305,3,4,1536", "--case")
    with pytest.raises(ValueError, match="--case 98304,3,4,1500: .*picks_per_stratum"):
        method_of("98304,3,4,1500", "--case")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--gpus 1", "two or more GPUs, got 1 of the 2"),
        ("--gpus 2 3", "two or more GPUs, got 3 of the 2"),
        ("--8b-lengths 7", "--8b-lengths 7: "),
        ("--tiny --parts layer", "--parts layer has no tiny size"),
        ("--lengths 7", "--lengths 7: "),
        ("--steps 0", "--steps 0 "),
        ("--output {file}", "--output {file} is no folder"),
    ],
)
def test_context_parallel_refuses(line: str, message: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    file = tmp_path / "file"
    file.touch()
    words = line.format(file=file).split()
    monkeypatch.setattr(sys, "argv", ["context_parallel.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_benchmark(context_parallel.main)
    assert str(ended.value.code).startswith("Error: ")
    assert message.format(file=file) in str(ended.value.code)


def test_lengths_of_earlier_calls_stay_in_the_record() -> None:
    run = {"measured": {}}
    context_parallel.add(run, "layer", [{"W": 2}], "r1, d1")
    context_parallel.add(run, "longest", [{"case": "b", "N": 2}, {"case": "c", "N": 3}], "r1, d1")
    context_parallel.add(run, "longest", [{"case": "b", "N": 2}, {"case": "a", "N": 1}], "r2, d2")
    assert run["layer"] == [{"W": 2, "measured": "r1, d1"}]
    assert [row["case"] for row in run["longest"]] == ["a", "b", "c"]
    assert run["measured"] == {"layer": "r1, d1", "longest": "r2, d2 and r1, d1"}


def test_a_part_has_each_number_of_gpus_once() -> None:
    """A record of one W keeps it when another one is added."""
    run = {"measured": {"layer": "r0, d0"}, "layer": {"W": 2, "ms": 1.0}}
    context_parallel.add(run, "layer", [{"W": 4, "ms": 2.0}], "r1, d1")
    context_parallel.add(run, "layer", [{"W": 4, "ms": 3.0}], "r2, d2")
    assert [(found["W"], found["ms"]) for found in run["layer"]] == [(2, 1.0), (4, 3.0)]
    assert run["measured"]["layer"] == "r0, d0 and r2, d2"


def test_a_record_of_other_gpus_is_refused(monkeypatch, tmp_path: Path) -> None:
    write_report({"GPU": "another", "GPUs": 2, "measured": {}}, tmp_path, "record")
    line = ["context_parallel.py", "--tiny", "--output", str(tmp_path), "--name", "record"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit, match=r"record.json is of 2 x another, .*pass --name"):
        run_benchmark(context_parallel.main)


def test_a_part_that_fails_keeps_no_other_from_running(monkeypatch, tmp_path: Path) -> None:
    def measured(part: str, folder: Path, gpus: int, arguments) -> list:
        if part == "resume":
            raise SystemExit("a run failed")
        return [{"losses": [1.0]}]

    monkeypatch.setattr(context_parallel, "measure", measured)
    line = ["context_parallel.py", "--tiny", "--gpus", "2", "--no-plots", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*line, "--parts", "resume", "killed"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="failed: resume, 2 GPUs"):
        run_benchmark(context_parallel.main)
    record = json.loads((tmp_path / "context_parallel.json").read_text())
    assert record["killed"] == {"losses": [1.0]} and "resume" not in record


def test_interruptions_end_with_130(capsys) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_benchmark(interrupted)
    assert ended.value.code == 130
    assert "output folder" in capsys.readouterr().err
