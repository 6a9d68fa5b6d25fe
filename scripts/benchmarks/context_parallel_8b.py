"""The part "8b" of the context parallelism benchmark: a recipe that one GPU cannot train.

Measured memory stands beside the estimate of ``lighthouse train --dry-run``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from context_parallel_jobs import LARGE, Job, Mesh, Settings, Sizes, Steps
from context_parallel_training import Row, medians
from measuring import method_of

from torchtitan.models.llama3_lighthouse.dry_run import estimated_bytes
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.studies.settings import command_line

GIB = 2**30
MEMORY = ("GiB", "active GiB")
# A step under the file's own lengths and those of one longer run. The first one compiles.
LIGHTHOUSE_STEPS, DENSE_STEPS, STEPS_OF_A_LENGTH = (2, 4), (6, 7), 3


def with_estimate(
    measured: dict[str, float] | None, config: JobConfig, gpus: int, attention: str
) -> dict[str, Any]:
    """Measured values of a run, the estimate of its memory, and their ratio, for a row.

    Args:
        measured: None if the run ran out of memory.
    """
    estimate = estimated_bytes(config, gpus)[attention] / GIB
    if measured is None:
        return {"fits": False, "estimated GiB": estimate}
    ratios = {f"{key} over estimate": measured[key] / estimate for key in MEMORY}
    return {"fits": True, **measured, "estimated GiB": estimate, **ratios}


def values_of(steps: Steps, first: int, last: int) -> dict[str, float]:
    """Median speed and MFU of the steps from ``first`` to ``last``, and their peak memory."""
    chosen = [steps[step] for step in range(first, last + 1)]
    return medians(steps, first, last) | {key: max(x[key] for x in chosen) for key in MEMORY}


def large_model(
    folder: Path, gpus: list[int], config: str, lengths: list[str], sizes: Sizes
) -> Iterator[list[Row]]:
    """The part "8b": the recipe as it stands, then longer sequences until one does not fit.

    As it stands, except for what the machine asks for: all GPUs share each sequence, a step has one
    of them, and the text and its tokenizer are those that need no network. The longer ones offload
    the inputs of layers.
    """
    mesh = Mesh(context=len(gpus))
    shared: Settings = {
        **LARGE,
        **mesh.settings(),
        "lighthouse.tokenizer": "byte",
        "lr_scheduler.warmup_steps": 2,
        **sizes.large,
    }
    own: Settings = {"lighthouse.dense_from_step": LIGHTHOUSE_STEPS[1]}
    if sizes.large:
        own |= {
            "training.seq_len": sizes.per_gpu * len(gpus),
            "lighthouse.top_k": sizes.top_k * len(gpus),
        }
    stages = [("Lighthouse", *LIGHTHOUSE_STEPS), ("dense", *DENSE_STEPS)]
    yield measured_rows(folder / "own", gpus, config, shared | own, stages)
    for case in lengths:
        n, method = method_of(case, "--8b-lengths")
        longer = {
            "lighthouse.stage": "lighthouse",
            "lighthouse.levels": method.levels,
            "lighthouse.pooling_factor": method.pooling_factor,
            "lighthouse.top_k": method.top_k,
            "training.seq_len": n,
            # A CPU has no other memory to offload to.
            "activation_checkpoint.offload_inputs": not sizes.large,
        }
        stages = [("Lighthouse", 2, STEPS_OF_A_LENGTH)]
        rows = measured_rows(folder / str(n), gpus, config, shared | longer, stages)
        yield rows
        if not rows[0]["fits"]:
            break


def measured_rows(
    folder: Path, gpus: list[int], config: str, settings: Settings, stages: list[tuple]
) -> list[Row]:
    """Rows of one run, one for each of its stages: name, first and last step that count."""
    settings = {**settings, "training.steps": stages[-1][-1]}
    line = ["--job.config_file", config, *command_line(settings)]
    parsed = LighthouseConfigManager().parse_args(line)
    steps = Job(folder, gpus, settings, config).steps_if_it_fits()
    section = parsed.activation_checkpoint
    offloaded = ", inputs offloaded" if section.offload_inputs else ""
    return [
        {
            "model": parsed.model.flavor,
            "stage": name,
            "GPUs": len(gpus),
            "N": parsed.training.seq_len,
            "checkpointing": ": ".join([section.mode, *section.keep_products]) + offloaded,
            **with_estimate(
                values_of(steps, first, last) if steps else None, parsed, len(gpus), name.lower()
            ),
        }
        for name, first, last in stages
    ]
