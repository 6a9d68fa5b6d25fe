"""The benchmark of context parallelism: its meshes, its tables, and its parts on CPU processes."""

import functools
import json
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path

import context_parallel
import context_parallel_8b
import context_parallel_plots
import context_parallel_results
import context_parallel_training
import pytest
import torch
from context_parallel_8b import with_estimate
from context_parallel_jobs import TINY, Job, Mesh, Sizes, meshes_of
from context_parallel_training import medians, slowest, window_of
from launch import CAN_FORK, FORKS, start_server

from torchtitan.models.llama3_lighthouse.checks.configuration import check_launch
from torchtitan.models.llama3_lighthouse.dry_run import dry_run, estimated_bytes
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.studies.settings import command_line

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmarks" / "context_parallel.py"
CONFIGS = ROOT / "train_configs"
CONFIG_8B = str(CONFIGS / "8b_128k.toml")


@pytest.mark.parametrize(
    ("gpus", "meshes"),
    [
        (2, [(2, 1), (1, 2)]),
        (3, [(3, 1), (1, 3)]),
        (4, [(2, 2)]),
        (8, [(2, 4), (4, 2)]),
    ],
)
def test_meshes_have_both_parallelisms_where_they_can(gpus: int, meshes: list) -> None:
    assert meshes_of(gpus) == meshes


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("sizes", [Sizes(), TINY])
def test_small_runs_fit_every_mesh(gpus: int, sizes: Sizes) -> None:
    """Each of the chunks of W GPUs has strata, and each rank a sequence."""
    for mesh in [*meshes_of(gpus), Mesh(context=gpus), Mesh(fsdp=gpus), Mesh()]:
        settings = {
            **sizes.of_small_runs(gpus),
            **mesh.settings(),
            "training.global_batch_size": gpus,
        }
        line = ["--job.config_file", str(CONFIGS / "debug_cpu.toml"), *command_line(settings)]
        config = LighthouseConfigManager().parse_args(line)
        check_launch(config, flavors, mesh.fsdp * mesh.context)


def test_window_is_the_recipes() -> None:
    recipe = str(CONFIGS / "270m_98k.toml")
    config = LighthouseConfigManager().parse_args(["--job.config_file", recipe])
    assert window_of(recipe, Sizes()) == config.lighthouse.window > 0
    assert window_of(recipe, TINY) == TINY.large["lighthouse.window"]


def test_estimate_of_8b_is_that_of_the_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["--job.config_file", CONFIG_8B, "--parallelism.context_parallel_degree", "4"]
    line += ["--lighthouse.tokenizer", "byte"]
    config = LighthouseConfigManager().parse_args(line)
    found = {name: size / 2**30 for name, size in estimated_bytes(config, 4).items()}
    said = f"{found['lighthouse']:.1f} GiB Lighthouse, {found['dense']:.1f} GiB dense"
    assert said in dry_run(config, 4)
    peak = random.uniform(1, 100)
    if CAN_FORK:
        # The process of its own takes no seconds to import the trainer.
        start_server()
        servers = {"spawn": FORKS}
        monkeypatch.setattr(multiprocessing, "get_context", servers.__getitem__)
    assert context_parallel_8b.estimates(config, 4) == pytest.approx(found)
    row = with_estimate({"GiB": 2 * peak, "active GiB": peak}, found["dense"])
    assert row["active GiB over estimate"] == pytest.approx(peak / found["dense"])
    assert row["GiB over estimate"] == pytest.approx(2 * peak / found["dense"])
    assert with_estimate(None, 48.0) == {"fits": False, "estimated GiB": 48.0}


def test_peaks_of_8b_are_those_of_steps_that_count() -> None:
    """The first step compiles, and the optimizer's moments are not there yet."""
    steps = {
        step: {"tps": float(step), "GiB": 10.0 - step, "active GiB": 5.0 - step}
        for step in range(1, 5)
    }
    found = context_parallel_8b.values_of(steps, 2, 4)
    assert found == {"tps": 3.0, "GiB": 8.0, "active GiB": 3.0}
    assert medians(steps, 2, 4) == {"tps": 3.0, "GiB": 7.0}


def test_the_slowest_gpu_counts() -> None:
    runs = [{"tps": 3.0, "GiB": 1.0}, {"tps": 2.0, "GiB": 5.0}]
    assert slowest(runs) == {"tps": 2.0, "GiB": 5.0, "tps of each": [3.0, 2.0]}
    assert slowest([runs[0], None]) == {"fits": False}


@functools.cache
def valid_configuration(gpus: int, *line: str) -> JobConfig:
    """The configuration of a command line, once for all runs that share it."""
    config = LighthouseConfigManager().parse_args(list(line))
    check_launch(config, flavors, gpus)
    return config


@pytest.mark.parametrize("gpus", [2, pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("tiny", [False, True])
def test_configurations_of_long_runs_are_valid(gpus: int, tiny: bool, monkeypatch) -> None:
    """At every length, with and without the window and the offloading; no run starts."""
    checked = []

    class Checked:
        def __init__(self, folder: Path, used: list[int], settings: dict, config: str) -> None:
            line = ["--job.config_file", config, *command_line(settings)]
            self.config = valid_configuration(len(used), *line)
            checked.append((self.config.training.seq_len, len(used), self.config.lighthouse.window))

        def steps_if_it_fits(self) -> dict | None:
            keeps_inputs = not self.config.activation_checkpoint.offload_inputs
            if self.config.model.flavor == "8B" and keeps_inputs:
                return None
            return {step: {"tps": 1.0, "GiB": 1.0, "active GiB": 1.0} for step in range(1, 20)}

    monkeypatch.setattr(context_parallel_training, "Job", Checked)
    monkeypatch.setattr(context_parallel_8b, "Job", Checked)
    estimated = {"lighthouse": 2.0, "dense": 4.0}
    monkeypatch.setattr(context_parallel_8b, "estimates", lambda config, gpus: estimated)
    line = ["--tiny"] if tiny else []
    arguments = context_parallel.parse([*line, "--no-plots", "--gpus", str(gpus)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    context_parallel.check(arguments)

    def rows(part: str) -> list[dict]:
        found = context_parallel.measure(part, Path("nowhere"), gpus, arguments)
        return [row for some in found for row in some]

    n = arguments.sizes.per_gpu * gpus
    published = "Lighthouse, as published"
    assert [row["stage"] for row in rows("training")][1:] == ["dense", "Lighthouse", published]
    assert [row["tps"] for row in rows("alone")] == [1.0] * 4 and len(rows("short")) == 4
    window = max(window for *_, window in checked)
    assert set(checked[: 3 * gpus + 3]) == {
        (n, used, each) for used in (gpus, 1) for each in (0, window)
    }  # fmt: skip
    assert len(rows("longest")) == len(arguments.lengths_longest)
    own, dense, *longer = rows("8b")
    assert own["estimated GiB"] == 2.0 and dense["estimated GiB"] == 4.0
    assert [row["fits"] for row in longer] == ([True] * 2 if tiny else [False, True] * 4)
    assert tiny or {own["N"], dense["N"]} == {131072}


def rows_of(speeds: dict[tuple[int, str], float]) -> list[dict]:
    return [
        {"N": 1024, "GPUs": gpus, "stage": stage, "checkpointing": "", "tps": speed, "GiB": 1.0}
        for (gpus, stage), speed in speeds.items()
    ]


def test_comparisons_are_against_one_gpu_and_dense_attention() -> None:
    speeds = {(4, "Lighthouse"): 90.0, (1, "Lighthouse"): 100.0, (4, "dense"): 19.0}
    speeds[1, "dense"] = 20.0
    *_, lighthouse, dense = context_parallel_results.comparisons(rows_of(speeds))
    assert lighthouse == "| 1,024 | 4 | Lighthouse | 10.0% | 4.74x | 5.00x | 5.3% |"
    assert dense.startswith("| 1,024 | 4 | dense | 5.0% |")
    assert context_parallel_results.comparisons(rows_of({(4, "dense"): 1.0})) == []


def test_profiles_are_compared_with_the_share_of_one_gpu() -> None:
    def row(gpus: int, ms: float, **kernels: float) -> dict:
        listed = [{"name": name, "count": 1, "ms": each} for name, each in kernels.items()]
        sent = {"sending alone ms": 0.0}
        times = {"ms a step": ms, "busy ms": ms - 1, **sent}
        ranks = [{**times, "sending ms": 5.0}, {"busy ms": 28, **sent, "sending ms": 6.0}]
        wait = {"ms": 0.5, "sending ms": 0.4, "count": 1.0, "after": "attend", "sent": "nccl",
                "before": "loss"}  # fmt: skip
        more = {"kernels": listed, "ranks": ranks, "waits": [wait]}
        return {"GPUs": gpus, "N": 1024, **times, **more}

    rows = [row(1, 100, attend=80, loss=10), row(4, 30, attend=21, nccl=5, loss=2.5)]
    head, _, _, _, step, busy, _, *kernels, _, first, second, _, _, _, _, _, wait, _ = (
        context_parallel_results.profile_lines(rows)
    )
    assert head == "**profile**, Lighthouse, 1,024 tokens, ms on rank 0"
    assert step == "| step | 30.0 | 25.0 | 5.0 |" and busy == "| busy | 29.0 | 24.8 | 4.2 |"
    assert first == "- rank 0: 29.0 ms busy, 5.0 in kernels that send, 0.0 with sending alone"
    assert second == "- rank 1: 28.0 ms busy, 6.0 in kernels that send, 0.0 with sending alone"
    assert wait == "| 0.50 | 0.40 | 1 | `attend` | `nccl` | `loss` |"
    assert kernels == [
        "| `nccl` | 5.0 | 0.0 | 5.0 |",
        "| `attend` | 21.0 | 20.0 | 1.0 |",
        "| `loss` | 2.5 | 2.5 | 0.0 |",
    ]
    assert context_parallel_results.profile_lines(rows[1:]) == []


def test_a_full_record_has_tables_and_a_plot(tmp_path: Path) -> None:
    large = {
        "model": "8B", "stage": "Lighthouse", "GPUs": 4, "N": 131072, "checkpointing": "lighthouse",
        "tps": 1234.0, "mfu": 40.0, "GiB": 60.0, "active GiB": 50.0, "estimated GiB": 48.0,
        "active GiB over estimate": 50 / 48, "GiB over estimate": 60 / 48,
    }  # fmt: skip
    too_long = {**large, "N": 262144, "fits": False}
    for key in ("tps", "mfu", "GiB", "active GiB", "active GiB over estimate", "GiB over estimate"):
        del too_long[key]
    profile = {
        "busy ms": 9.5,
        "sending alone ms": 0.25,
        "kernels": [{"name": "a<b|c>", "count": 3, "ms": 1.25}],
    }
    profiles = {"Lighthouse": profile}
    run = {
        "GPU": "GPU", "GPUs": 4, "torch": "2", "NCCL": "2", "measured": {"8b": "r, d"},
        "layer": [
            {"W": 2, "measured": "r, d"},
            {"W": 4, "measured": "r, d", context_parallel_results.PROFILES: profiles},
        ],
        "training": rows_of({(4, "Lighthouse, window 256"): 80.0, (4, "dense"): 20.0}),
        "8b": [large, too_long],
        "killed": {"GPUs": 4, "SIGKILL": {"losses": [1.0], "last step before": 7}},
    }  # fmt: skip
    text = context_parallel_results.table(run)
    assert (
        "Lighthouse, on rank 0: 9.50 ms busy, 0.25 of them with sending alone" in text
        and "| `a<b/c>` | 3 | 1.250 |" in text
    )
    assert "- W: 2" in text and "- W: 4" in text and "    - last step before: 7" in text
    assert "| 1,234 | 40.0% | 60.0 | 50.0 | 48.0 | 1.04 | 1.25 |" in text
    assert "| does not fit |  | 48.0 |  |  |" in text
    context_parallel_plots.plot(run, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_out_of_memory_is_told_from_other_failures(tmp_path: Path) -> None:
    job = Job.__new__(Job)
    job.folder, job.log_file = tmp_path, tmp_path / "log.txt"
    job.process = subprocess.Popen(["false"])
    job.log_file.write_text("a shape does not fit")
    with pytest.raises(SystemExit, match="a shape does not fit"):
        job.steps_if_it_fits()
    for words in ("CUDA out of memory. Tried to allocate", "Signal 9 (SIGKILL) received by PID 7"):
        job.log_file.write_text(words)
        assert job.steps_if_it_fits() is None


def run_tiny(folder: Path, *line: str) -> dict:
    """Run parts of the benchmark at tiny sizes on two processes, and return the record."""
    command = [sys.executable, str(SCRIPT), "--tiny", "--gpus", "2", "--output", str(folder)]
    subprocess.run([*command, "--name", "tiny", *line], check=True, cwd=ROOT, timeout=580)
    assert (folder / "tiny.md").exists()
    return json.loads((folder / "tiny.json").read_text())


@pytest.mark.slow
def test_meshes_agree(tmp_path: Path) -> None:
    found = run_tiny(tmp_path, "--parts", "meshes", "--no-plots")["meshes"]
    assert found["sequences a step"] == 2 and len(found["losses, FSDP 2"]) == 10
    for key, bound in (("loss", 1e-4), ("grad_norm", 1e-2)):
        spread = found[f"largest relative difference of {key} from one GPU"]
        assert max(spread["FSDP 2"], spread["context 2"]) < bound
    assert found["resumed"]["largest relative difference of loss"] < 1e-4
    assert len(found["resumed"]["losses, changing"]) == 9


@pytest.mark.slow
def test_a_run_that_loses_a_rank_ends_and_goes_on(tmp_path: Path) -> None:
    found = run_tiny(tmp_path, "--parts", "killed", "--no-plots")["killed"]
    limit = found["timeout of a collective, s"]
    limit += found["time that torchrun gives the other processes, s"]
    for name, seconds in (("SIGKILL", limit), ("SIGSTOP", limit + 20)):
        case = found[name]
        assert case["exit code of the launcher"] != 0
        assert case["seconds until all processes had ended"] < seconds
        assert case["first step after"] % 4 == 1 and case["first step after"] > 4
        assert case["first step after"] <= case["last step before"] + 1
        assert case["largest relative difference of loss"] == 0
        assert case["losses"] == found["losses, undisturbed"]
        if torch.cuda.is_available():
            assert len(case["collectives in the recorder's files"]) >= 1


@pytest.mark.slow
def test_timed_parts_have_a_row_for_each_attention(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "--parts", "training", "alone")
    stages = [(row["stage"], row["GPUs"], row["N"]) for row in run["training"] + run["alone"]]
    window = f"Lighthouse, window {TINY.large['lighthouse.window']}"
    assert stages == [
        (stage, gpus, 2 * TINY.per_gpu)
        for gpus in (2, 1)
        for stage in (window, "dense", "Lighthouse", "Lighthouse, as published")
    ]  # fmt: skip
    assert all(len(row["tps of each"]) == 2 for row in run["alone"])
    assert (tmp_path / "tiny.png").exists()


@pytest.mark.slow
def test_a_step_is_profiled_on_all_gpus_and_on_one(tmp_path: Path) -> None:
    rows = run_tiny(tmp_path, "--parts", "profile", "--no-plots")["profile"]
    assert [(row["GPUs"], row["N"]) for row in rows] == [
        (gpus, 2 * TINY.per_gpu) for gpus in (2, 1)
    ]
    assert all(row["ms a step"] > 0 and len(row["ranks"]) == row["GPUs"] for row in rows)
    # A CPU has no kernels.
    assert all(bool(row["kernels"]) == torch.cuda.is_available() for row in rows)


@pytest.mark.slow
def test_growing_lengths_are_measured_beside_the_estimate(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "--parts", "8b", "longest")
    own, dense, *longer = run["8b"]
    assert (own["stage"], dense["stage"], own["N"]) == ("Lighthouse", "dense", 2 * TINY.per_gpu)
    assert [row["N"] for row in longer] == [row["N"] for row in run["longest"]] == [6144, 7168]
    for row in run["8b"]:
        ratio = row["active GiB"] / row["estimated GiB"]
        assert row["active GiB over estimate"] == pytest.approx(ratio)
    assert (tmp_path / "tiny.png").exists()
