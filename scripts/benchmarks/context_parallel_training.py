"""Parts of the context parallelism benchmark that train: short runs, compared step by step."""

import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from context_parallel_layer import PER_GPU
from measuring import method_of

from torchtitan.models.llama3_lighthouse.metrics import (
    GRAD_NORM,
    LOSS,
    MEMORY,
    METRICS_FILE,
    MFU,
    THROUGHPUT,
)
from torchtitan.models.llama3_lighthouse.processes import die_with_parent
from torchtitan.models.llama3_lighthouse.studies.settings import command_line
from torchtitan.models.llama3_lighthouse.studies.sweeps import read_metrics, trainer_command

Steps = dict[int, dict[str, float]]

# The only product that checkpointing keeps in the part "training". With more of them, the whole
# length does not fit one GPU of 80 GB.
KEPT_PRODUCT = "wo"
# Names of values in a record, and those of the metrics that they are.
VALUES = {"loss": LOSS, "grad_norm": GRAD_NORM, "GiB": MEMORY, "tps": THROUGHPUT, "mfu": MFU}
LARGE = {
    "training.dataset": "python_stdlib",
    "training.global_batch_size": 1,
    "checkpoint.enable": False,
}
SMALL = {
    "model.flavor": "debugmodel",
    "training.seq_len": 8192,
    "training.local_batch_size": 1,
    "lighthouse.top_k": 256,
    "lighthouse.picks_per_stratum": 32,
    "lighthouse.dense_from_step": 6,
    "lr_scheduler.warmup_steps": 4,
    "checkpoint.enable": True,
    "checkpoint.interval": 1000,
    "training.mixed_precision_param": "bfloat16",
    "optimizer.lr": 2e-4,
    "activation_checkpoint.mode": "none",
    "compile.enable": True,
}


class Job:
    """A training run on some of the GPUs, which starts at once."""

    def __init__(
        self, folder: Path, gpus: list[int], settings: dict[str, Any], config: str
    ) -> None:
        line = ["--job.config_file", config, "--job.dump_folder", str(folder)]
        line += [*command_line(settings), "--metrics.log_freq", "1"]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log_file = folder / "log.txt"
        self.process = subprocess.Popen(
            trainer_command(len(gpus), line),
            stdout=self.log_file.open("a"),
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
        )

    def steps(self) -> Steps:
        """Wait for the end of the run, and return the values that each step logged.

        Raises:
            SystemExit: the run failed.
        """
        if self.process.wait():
            raise SystemExit(f"a run failed:\n{self.log_file.read_text()[-5000:]}")
        return self.logged()

    def logged(self) -> Steps:
        """Values that each step has logged so far."""
        if not (self.folder / METRICS_FILE).exists():
            return {}
        return {
            step: {name: entry[metric] for name, metric in VALUES.items() if metric in entry}
            for step, entry in read_metrics(self.folder).items()
            if LOSS in entry
        }


def largest_difference(steps: Steps, expected: Steps, key: str) -> float:
    """Largest relative difference of a logged value over the expected steps."""
    return max(abs(steps[s][key] / expected[s][key] - 1) for s in expected)


def losses(steps: Steps) -> list[float]:
    return [steps[step]["loss"] for step in sorted(steps)]


def seed_checkpoint(folder: Path, gpus: list[int], settings: dict[str, Any], config: str) -> str:
    """Path of a checkpoint for runs on all meshes, which would each initialise differently."""
    settings = {**settings, "checkpoint.create_seed_checkpoint": True}
    Job(folder / "seed", gpus[:1], settings, config).steps()
    return str(folder / "seed/checkpoint/step-0")


def equivalence(folder: Path, gpus: list[int], config: str) -> dict[str, Any]:
    """The part "equivalence": a small model on all GPUs, and on one."""
    settings = {**SMALL, "training.steps": 10, "training.global_batch_size": 1}
    settings["checkpoint.initial_load_path"] = seed_checkpoint(folder, gpus, settings, config)
    # Two more runs show what rounding does: another GPU, where the order of sums may change, and
    # the model not compiled, which rounds the same sums elsewhere.
    variants = {"one": gpus[:1], "again": gpus[1:2], "eager": gpus[:1]}
    jobs = {
        name: Job(folder / name, used, settings | {"compile.enable": name != "eager"}, config)
        for name, used in variants.items()
    }
    expected, repeated, eager = (job.steps() for job in jobs.values())
    spread = {"parallelism.context_parallel_degree": len(gpus)}
    steps = Job(folder / "all", gpus, {**settings, **spread}, config).steps()
    return {
        "losses, one GPU": losses(expected),
        "losses, W GPUs": losses(steps),
        **{
            f"largest relative difference of {key} from one GPU": {
                "W GPUs": largest_difference(steps, expected, key),
                "one GPU, not compiled": largest_difference(eager, expected, key),
                "another GPU alone": largest_difference(repeated, expected, key),
            }
            for key in ("loss", "grad_norm")
        },
    }


def resume(folder: Path, gpus: list[int], config: str) -> dict[str, Any]:
    """The part "resume": a run whose mesh changes twice, and one that never stops."""
    settings = {
        **SMALL,
        "training.global_batch_size": len(gpus),
        "lr_scheduler.total_steps": 9,
        "compile.enable": False,
    }
    settings["checkpoint.initial_load_path"] = seed_checkpoint(folder, gpus, settings, config)
    one = Job(folder / "one", gpus[:1], {**settings, "training.steps": 9}, config)
    changing = folder / "changing"
    for last, used, degree in ((3, gpus, 1), (6, gpus, len(gpus)), (9, gpus[:1], 1)):
        spread = {"training.steps": last, "parallelism.context_parallel_degree": degree}
        steps = Job(changing, used, {**settings, **spread}, config).steps()
    expected = one.steps()
    return {
        "meshes": f"steps 1-3: FSDP {len(gpus)}; 4-6: context {len(gpus)}; 7-9: one GPU",
        "losses, one GPU throughout": losses(expected),
        "losses, changing": losses(steps),
        "largest relative difference of loss": largest_difference(steps, expected, "loss"),
    }


def medians(steps: Steps, first: int, last: int) -> dict[str, float]:
    """Median speed, MFU and memory of the steps from ``first`` to ``last``."""
    chosen = [values for step, values in steps.items() if first <= step <= last]
    return {key: statistics.median(v[key] for v in chosen) for key in ("tps", "mfu", "GiB")}


def throughput(
    folder: Path, sets: list[list[int]], config: str, changed: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows for 270M with Lighthouse and with dense attention.

    Args:
        sets: the GPUs of each run. All runs train at the same time, and the slowest counts.
        changed: settings beside those that all runs share.
    """
    settings = {
        **LARGE,
        "training.steps": 11,
        "lighthouse.dense_from_step": 8,
        "lr_scheduler.warmup_steps": 4,
        "activation_checkpoint.mode": "lighthouse",
        "activation_checkpoint.keep_products": [KEPT_PRODUCT],
        **changed,
    }
    jobs = [Job(folder / str(number), gpus, settings, config) for number, gpus in enumerate(sets)]
    steps_of_jobs = [job.steps() for job in jobs]
    rows = []
    for attention, first, last in (("Lighthouse", 4, 8), ("dense", 10, 11)):
        measured = [medians(steps, first, last) for steps in steps_of_jobs]
        rows.append(
            {
                "stage": attention,
                "GPUs": len(sets[0]),
                **min(measured, key=lambda values: values["tps"]),
                "N": changed.get("training.seq_len", PER_GPU),
                "checkpointing": f"lighthouse: {KEPT_PRODUCT}",
                "tps of each": [values["tps"] for values in measured],
            }
        )
    return rows


def training(folder: Path, gpus: list[int], config: str) -> list[dict[str, Any]]:
    """The part "training": the length of all GPUs together, on them and on each alone."""
    w = len(gpus)
    whole = {"training.seq_len": PER_GPU * w, "lighthouse.top_k": 1536 * w}
    spread = {**whole, "parallelism.context_parallel_degree": w}
    return [
        *throughput(folder / "together", [gpus], config, spread),
        *throughput(folder / "alone", [[gpu] for gpu in gpus], config, whole),
    ]


def short(folder: Path, gpus: list[int], config: str) -> list[dict[str, Any]]:
    """The part "short": the length of one GPU, on each alone."""
    return throughput(folder, [[gpu] for gpu in gpus], config, {})


def longest(
    folder: Path, gpus: list[int], config: str, lengths: list[str], steps: int
) -> list[dict[str, Any]]:
    """The part "longest": some steps with Lighthouse at each length, until one does not fit.

    Raises:
        SystemExit: a run failed for another reason than memory.
    """
    rows = []
    for case in lengths:
        n, method = method_of(case, "--lengths")
        settings = {
            **LARGE,
            "lighthouse.stage": "lighthouse",
            "lighthouse.levels": method.levels,
            "lighthouse.pooling_factor": method.pooling_factor,
            "lighthouse.top_k": method.top_k,
            "training.seq_len": n,
            "training.steps": steps,
            "activation_checkpoint.mode": "lighthouse",
            "activation_checkpoint.keep_products": [],
            "activation_checkpoint.offload_inputs": True,
            "parallelism.context_parallel_degree": len(gpus),
        }
        job = Job(folder / str(n), gpus, settings, config)
        failed, logged = job.process.wait(), job.logged()
        if failed and "out of memory" not in job.log_file.read_text():
            raise SystemExit(job.log_file.read_text()[-5000:])
        fits = not failed and steps in logged
        measured = logged[steps] if fits else {}
        # The first step compiles, so its speed says nothing.
        hidden = ("tps", "mfu") if steps == 1 else ()
        rows.append(
            {
                "case": case,
                "stage": "Lighthouse",
                "GPUs": len(gpus),
                "N": n,
                "fits": fits,
                "checkpointing": "lighthouse, inputs offloaded",
                "steps": steps,
                **{key: value for key, value in measured.items() if key not in hidden},
            }
        )
        print(rows[-1], flush=True)
        if not fits:
            break
    return rows
