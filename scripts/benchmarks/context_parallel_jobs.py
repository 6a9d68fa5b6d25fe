"""Training runs of the context parallelism benchmark: their sizes, their meshes and their steps."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from context_parallel_layer import PER_GPU
from measuring import PAPERS, method_of

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
Settings = dict[str, Any]

# The second is how torchrun says that the kernel ended a process when the host ran out of memory.
OUT_OF_MEMORY = ("out of memory", "Signal 9 (SIGKILL)")
# Values in which runs are compared.
COMPARED = ("loss", "grad_norm")
# Names of values in a record, and those of the metrics that they are.
VALUES = {
    "loss": LOSS,
    "grad_norm": GRAD_NORM,
    "GiB": MEMORY,
    "active GiB": "memory/max_active(GiB)",
    "tps": THROUGHPUT,
    "mfu": MFU,
}
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
    "lighthouse.dense_from_step": 6,
    "lr_scheduler.warmup_steps": 4,
    "checkpoint.enable": True,
    "checkpoint.interval": 1000,
    "training.mixed_precision_param": "bfloat16",
    "optimizer.lr": 2e-4,
    "activation_checkpoint.mode": "none",
    "compile.enable": True,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the runs.

    Attributes:
        per_gpu: tokens of each GPU in the parts that train 270M.
        top_k: ``lighthouse.top_k`` for so many tokens.
        dense_layers: layers of 270M that are dense in the method as it was published.
        small: settings of the parts that compare losses, in place of those in ``SMALL``.
        large: settings of the other parts, in place of those of their recipes.
    """

    per_gpu: int = PER_GPU
    top_k: int = 1536
    dense_layers: tuple[int, ...] = (0, 1, 28, 29)
    small: Settings = field(default_factory=dict)
    large: Settings = field(default_factory=dict)

    @property
    def published(self) -> Settings:
        """Settings of the method as it was published."""
        settings = PAPERS | {"window": 0, "dense_layers": list(self.dense_layers)}
        return {f"lighthouse.{key}": value for key, value in settings.items()}

    def of_small_runs(self, gpus: int) -> Settings:
        """Settings of the runs whose losses are compared, on as many as ``gpus`` GPUs."""
        found = {**SMALL, **self.small}
        # Each of 2 W chunks needs one stratum of picks or more.
        strata = max(8, 2 * gpus)
        return {**found, "lighthouse.picks_per_stratum": found["lighthouse.top_k"] // strata}

    def of_length(self, case: str, flag: str) -> Settings:
        """Settings of a run of the length and the method that "N,L,p,k", a value of ``flag``, says.

        Raises:
            ValueError: ``case`` is not four numbers, or a rule of the method forbids them.
        """
        picks = self.large.get("lighthouse.picks_per_stratum")
        n, method = method_of(case, flag, **({"picks_per_stratum": picks} if picks else {}))
        return {
            "training.seq_len": n,
            "lighthouse.levels": method.levels,
            "lighthouse.pooling_factor": method.pooling_factor,
            "lighthouse.top_k": method.top_k,
        }


# Everything at a size that two CPU cores train in seconds. Float32, because CPUs do bf16 slowly.
TINY = Sizes(
    per_gpu=512,
    top_k=32,
    dense_layers=(0, 5),
    small={
        "training.seq_len": 512,
        "training.mixed_precision_param": "float32",
        "lighthouse.top_k": 32,
        "compile.enable": False,
    },
    large={
        "model.flavor": "debugmodel",
        "training.mixed_precision_param": "float32",
        # Few picks, because each of 2 W chunks needs a stratum.
        "lighthouse.picks_per_stratum": 4,
        "lighthouse.dense_layers": [],
        "lighthouse.window": 32,
        "activation_checkpoint.offload_inputs": False,
        "compile.enable": False,
    },
)
# Jobs that were started, so that a part that fails leaves none of its own behind.
started: list["Job"] = []


class Mesh(NamedTuple):
    """GPUs of a mesh: ``fsdp`` read different text, each of them ``context`` GPUs together."""

    fsdp: int = 1
    context: int = 1

    def __str__(self) -> str:
        degrees = {"FSDP": self.fsdp, "context": self.context}
        return " x ".join(f"{name} {n}" for name, n in degrees.items() if n > 1) or "one GPU"

    def settings(self) -> Settings:
        return {
            "parallelism.data_parallel_shard_degree": self.fsdp,
            "parallelism.context_parallel_degree": self.context,
        }


def meshes_of(gpus: int) -> list[Mesh]:
    """Meshes of all GPUs with FSDP and context parallelism; where none has both, each alone."""
    both = [Mesh(n, gpus // n) for n in range(2, gpus) if gpus % n == 0]
    return both or [Mesh(fsdp=gpus), Mesh(context=gpus)]


class Job:
    """A training run on some of the GPUs, which starts at once. Without GPUs, their number counts.

    Args:
        command: the process that trains, by its number of GPUs and the trainer's arguments.

    Raises:
        SystemExit: from its methods, if the run failed.
    """

    def __init__(
        self,
        folder: Path,
        gpus: list[int],
        settings: Settings,
        config: str,
        command: Callable[[int, list[str]], list[str]] = trainer_command,
    ) -> None:
        line = ["--job.config_file", config, "--job.dump_folder", str(folder)]
        line += command_line({"metrics.log_freq": 1} | settings)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log_file = folder / "log.txt"
        self.process = subprocess.Popen(
            command(len(gpus), line),
            stdout=self.log_file.open("a"),
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
        )
        started.append(self)

    def steps(self) -> Steps:
        """Wait for the end of the run, and return the values that each step logged."""
        if self.process.wait():
            self.fail()
        return self.logged()

    def steps_if_it_fits(self) -> Steps | None:
        """As ``steps``, but None if the run ran out of memory, on a GPU or on the host."""
        if self.process.wait():
            log = self.log_file.read_text()
            if any(words in log for words in OUT_OF_MEMORY):
                return None
        return self.steps()

    def fail(self) -> None:
        raise SystemExit(f"a run failed:\n{self.log_file.read_text()[-5000:]}")

    def logged(self) -> Steps:
        """Values that each step has logged so far."""
        if not (self.folder / METRICS_FILE).exists():
            return {}
        return {
            step: {name: entry[metric] for name, metric in VALUES.items() if metric in entry}
            for step, entry in read_metrics(self.folder).items()
            if LOSS in entry
        }


def end_jobs() -> None:
    """End the jobs that still run; their training processes end with them."""
    for job in started:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()
    started.clear()


def largest_difference(steps: Steps, expected: Steps, key: str) -> float:
    """Largest relative difference of a logged value over the expected steps."""
    return max(abs(steps[s][key] / expected[s][key] - 1) for s in expected)


def losses(steps: Steps) -> list[float]:
    return [steps[step]["loss"] for step in sorted(steps)]
