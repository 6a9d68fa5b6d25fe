"""The part "profile" of the context parallelism benchmark: where the time of a 270M step goes."""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from context_parallel_jobs import Job, Mesh, Sizes
from context_parallel_training import of_270m, of_all
from gpu_profile import SENDING
from training_case import of_rank

CASE_SCRIPT = Path(__file__).with_name("training_case.py")
# The first step compiles, the next one fills the allocator's reserve, and the last are profiled.
WARM_UP, PROFILED_STEPS, STEPS = 3, 3, 10


def profile(
    folder: Path, gpus: list[int], config: str, sizes: Sizes
) -> Iterator[list[dict[str, Any]]]:
    """A Lighthouse step of the length of all GPUs together: on them, then on one of them."""
    changed = of_all(len(gpus), sizes) | {
        "training.steps": STEPS,
        "lighthouse.dense_from_step": STEPS,
    }
    for used in (gpus, gpus[:1]):
        result = folder / f"{len(used)}.json"

        def command(processes: int, line: list[str], result: Path = result) -> list[str]:
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            case = [str(CASE_SCRIPT), "lighthouse", str(WARM_UP), str(PROFILED_STEPS), str(result)]
            return [sys.executable, *start, str(processes), *case, *line]

        settings = of_270m(sizes, changed | Mesh(context=len(used)).settings())
        job = Job(folder / str(len(used)), used, settings, config, command)
        if job.process.wait() or not result.exists():
            job.fail()
        ranks = [json.loads(of_rank(result, rank).read_text()) for rank in range(len(used))]
        if any("failure" in found for found in ranks):
            job.fail()
        yield [
            {
                "GPUs": len(used),
                "N": settings["training.seq_len"],
                "ms a step": 1e3 * statistics.median(ranks[0]["seconds"]),
                **ranks[0]["profile"],
                "ranks": [of_sending(found["profile"]) for found in ranks],
            }
        ]


def of_sending(profile: dict[str, Any]) -> dict[str, float]:
    """Figures that tell whether a rank waits for the others: the first one waits in a transfer."""
    sending = (row["ms"] for row in profile["kernels"] if row["name"].startswith(SENDING))
    return {key: profile[key] for key in ("busy ms", "sending alone ms")} | {
        "sending ms": sum(sending)
    }
