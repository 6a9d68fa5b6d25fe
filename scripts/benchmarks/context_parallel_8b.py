"""The part "8b" of the context parallelism benchmark: a recipe that one GPU cannot train.

Measured memory stands beside the estimate of ``lighthouse train --dry-run``.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from context_parallel_jobs import LARGE, Job, Mesh, Settings, Sizes, Steps
from context_parallel_training import Row, medians, of_all

from torchtitan.models.llama3_lighthouse.dry_run import estimated_bytes
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.studies.settings import command_line

GIB = 2**30
MEMORY = ("GiB", "active GiB")
# First and last step that count. The one before compiles, and the optimizer has no moments in it.
LIGHTHOUSE_STEPS, DENSE_STEPS, STEPS_OF_A_LENGTH = (2, 4), (6, 7), (2, 2)

Stage = tuple[str, int, int]


def with_estimate(measured: dict[str, float] | None, estimate: float) -> dict[str, Any]:
    """Measured values of a run, the estimate of its memory in GiB, and their ratio, for a row.

    Args:
        measured: None if the run ran out of memory.
    """
    if measured is None:
        return {"fits": False, "estimated GiB": estimate}
    ratios = {f"{key} over estimate": measured[key] / estimate for key in MEMORY}
    return {"fits": True, **measured, "estimated GiB": estimate, **ratios}


def values_of(steps: Steps, first: int, last: int) -> dict[str, float]:
    """Median speed and MFU of the steps from ``first`` to ``last``, and their peak memory."""
    chosen = [steps[step] for step in range(first, last + 1)]
    return medians(steps, first, last) | {key: max(x[key] for x in chosen) for key in MEMORY}


def estimates(config: JobConfig, gpus: int) -> dict[str, float]:
    """GiB of each GPU that the dry run estimates, under each attention.

    Another process finds them, because it makes a mesh, which takes memory of a GPU.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(estimated_bytes, config, gpus).result()
    return {attention: size / GIB for attention, size in found.items()}


def large_model(
    folder: Path, gpus: list[int], config: str, lengths: list[str], sizes: Sizes
) -> Iterator[list[Row]]:
    """The part "8b": the recipe as it stands, then longer sequences until one does not fit.

    As it stands, except for what the machine asks for: all GPUs share each sequence, a step has one
    of them, and the text and its tokenizer are those that need no network. A length that does not
    fit is tried once more with the inputs of layers offloaded.
    """
    shared: Settings = {
        **LARGE,
        **Mesh(context=len(gpus)).settings(),
        "lighthouse.tokenizer": "byte",
        "lr_scheduler.warmup_steps": 2,
        **sizes.large,
    }
    own: Settings = {"lighthouse.dense_from_step": LIGHTHOUSE_STEPS[1]}
    if sizes.large:
        own |= of_all(len(gpus), sizes)
    stages = [("Lighthouse", *LIGHTHOUSE_STEPS), ("dense", *DENSE_STEPS)]
    yield measured_rows(folder / "own", gpus, config, shared | own, stages)
    stages = [("Lighthouse", *STEPS_OF_A_LENGTH)]
    for case in lengths:
        settings = shared | {
            "lighthouse.stage": "lighthouse",
            **sizes.of_length(case, "--8b-lengths"),
        }
        for offload in (False, True):
            settings["activation_checkpoint.offload_inputs"] = offload
            name = f"{case}{', offloaded' if offload else ''}"
            rows = measured_rows(folder / name, gpus, config, settings, stages)
            yield rows
            if rows[0]["fits"]:
                break
        else:
            return


def measured_rows(
    folder: Path, gpus: list[int], config: str, settings: Settings, stages: list[Stage]
) -> list[Row]:
    """Rows of one run, one for each of its stages: its name, first and last step that count."""
    settings = {**settings, "training.steps": stages[-1][-1]}
    parsed = LighthouseConfigManager().parse_args(
        ["--job.config_file", config, *command_line(settings)]
    )
    estimated = estimates(parsed, len(gpus))
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
                values_of(steps, first, last) if steps else None, estimated[name.lower()]
            ),
        }
        for name, first, last in stages
    ]
