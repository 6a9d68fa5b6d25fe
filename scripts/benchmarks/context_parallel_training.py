"""Parts of the context parallelism benchmark that time 270M."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from context_parallel_jobs import LARGE, Job, Mesh, Settings, Sizes, Steps

from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.studies.settings import command_line

Row = dict[str, Any]

# The only product that checkpointing keeps in the part "training". With more of them, the whole
# length does not fit one GPU of 80 GB.
KEPT_PRODUCT = "wo"
TIMED = ("tps", "mfu", "GiB")
# A log line waits for the GPU, so not each step has one.
LOG_FREQ = 2
# The first step under each attention compiles, and the next one fills the allocator's reserve. A
# dense step of the whole length can take one GPU a minute.
LIGHTHOUSE_STEPS, DENSE_STEPS = (3, 8), (11, 12)


def window_of(config: str, sizes: Sizes) -> int:
    """Positions of the window that a recipe has at these sizes; 0 if it has none."""
    line = ["--job.config_file", config, *command_line(sizes.large)]
    return LighthouseConfigManager().parse_args(line).lighthouse.window


def medians(steps: Steps, first: int, last: int) -> dict[str, float]:
    """Median speed, MFU and memory logged at the steps from ``first`` to ``last``."""
    chosen = [values for step, values in steps.items() if first <= step <= last]
    # A CPU's MFU is not known.
    known = [key for key in TIMED if all(key in values for values in chosen)]
    return {key: statistics.median(values[key] for values in chosen) for key in known}


def of_270m(sizes: Sizes, changed: Settings) -> Settings:
    """Settings of the runs of 270M, with those that a run changes."""
    return {
        **LARGE,
        "training.seq_len": sizes.per_gpu,
        "lighthouse.top_k": sizes.top_k,
        "lr_scheduler.warmup_steps": 4,
        "metrics.log_freq": LOG_FREQ,
        "activation_checkpoint.mode": "lighthouse",
        "activation_checkpoint.keep_products": [KEPT_PRODUCT],
        **sizes.large,
        **changed,
    }


def throughput(
    folder: Path, sets: list[list[int]], config: str, sizes: Sizes, changed: Settings
) -> Iterator[list[Row]]:
    """Rows for 270M: dense, and Lighthouse with the recipe's window, without, and as published.

    Args:
        sets: the GPUs of each run. All runs train at the same time, and the slowest counts.
        changed: settings beside those that all runs share.
    """
    window = window_of(config, sizes)
    lasting = {"lighthouse.dense_from_step": LIGHTHOUSE_STEPS[1]}
    settings = of_270m(sizes, lasting | changed)
    plain = "Lighthouse", *LIGHTHOUSE_STEPS
    beside_window = f"Lighthouse, window {window}", *LIGHTHOUSE_STEPS
    runs = [(f"window {window}", {}, [beside_window if window else plain, ("dense", *DENSE_STEPS)])]
    if window:
        runs.append(("no window", {"lighthouse.window": 0}, [plain]))
    runs.append(("published", sizes.published, [("Lighthouse, as published", *LIGHTHOUSE_STEPS)]))
    for name, changes, stages in runs:
        changes = changes | {"training.steps": stages[-1][-1]}
        found = trained(folder / name, sets, config, settings | changes)
        yield [
            {
                "stage": stage,
                "GPUs": len(sets[0]),
                "N": settings["training.seq_len"],
                "checkpointing": f"lighthouse: {KEPT_PRODUCT}",
                **slowest([steps and medians(steps, first, last) for steps in found]),
            }
            for stage, first, last in stages
        ]


def trained(
    folder: Path, sets: list[list[int]], config: str, settings: Settings
) -> list[Steps | None]:
    """Steps of the same run on each set of GPUs, all at the same time; None if it does not fit."""
    jobs = [Job(folder / str(number), gpus, settings, config) for number, gpus in enumerate(sets)]
    return [job.steps_if_it_fits() for job in jobs]


def slowest(measured: list[dict[str, float] | None]) -> dict[str, Any]:
    """The values of the slowest run, and the speeds of all, for a row."""
    fitting = [values for values in measured if values is not None]
    if len(fitting) < len(measured):
        return {"fits": False}
    return {
        **min(fitting, key=lambda values: values["tps"]),
        "tps of each": [values["tps"] for values in fitting],
    }


def of_all(gpus: int, sizes: Sizes) -> Settings:
    """The length of all GPUs together."""
    return {"training.seq_len": sizes.per_gpu * gpus, "lighthouse.top_k": sizes.top_k * gpus}


def training(folder: Path, gpus: list[int], config: str, sizes: Sizes) -> Iterator[list[Row]]:
    """The part "training": the length of all GPUs together, on them."""
    mesh = Mesh(context=len(gpus))
    yield from throughput(folder, [gpus], config, sizes, of_all(len(gpus), sizes) | mesh.settings())


def alone(folder: Path, gpus: list[int], config: str, sizes: Sizes) -> Iterator[list[Row]]:
    """The part "alone": the length of all GPUs together, on each of them alone."""
    sets = [[gpu] for gpu in gpus]
    yield from throughput(folder, sets, config, sizes, of_all(len(gpus), sizes))


def short(folder: Path, gpus: list[int], config: str, sizes: Sizes) -> Iterator[list[Row]]:
    """The part "short": the length of one GPU, on each alone."""
    yield from throughput(folder, [[gpu] for gpu in gpus], config, sizes, {})


def longest(
    folder: Path, gpus: list[int], config: str, lengths: list[str], steps: int, sizes: Sizes
) -> Iterator[list[Row]]:
    """The part "longest": some steps with Lighthouse at each length, until one does not fit."""
    for case in lengths:
        settings = {
            **LARGE,
            "lighthouse.stage": "lighthouse",
            "activation_checkpoint.mode": "lighthouse",
            "activation_checkpoint.keep_products": [],
            "activation_checkpoint.offload_inputs": True,
            "training.steps": steps,
            **sizes.large,
            **sizes.of_length(case, "--lengths"),
            **Mesh(context=len(gpus)).settings(),
        }
        logged = Job(folder / case, gpus, settings, config).steps_if_it_fits()
        measured = logged[steps] if logged else {}
        # The first step compiles, so its speed says nothing.
        shown = TIMED[-1:] if steps == 1 else TIMED
        yield [
            {
                "case": case,
                "stage": "Lighthouse",
                "GPUs": len(gpus),
                "N": settings["training.seq_len"],
                "fits": logged is not None,
                "checkpointing": "lighthouse, inputs offloaded",
                "steps": steps,
                **{key: measured[key] for key in shown if key in measured},
            }
        ]
        if not logged:
            break
