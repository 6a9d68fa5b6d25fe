#!/usr/bin/env python3
"""Check and time context parallelism on the GPUs of this machine, through NCCL.

    python scripts/benchmarks/context_parallel.py --parts layer equivalence resume training

Every part compares W GPUs, all or as many as --gpus says, with one of them:

    layer        attention alone, bf16: errors against float64 beside those of one GPU; its time,
                 and that of the same work with nothing sent, and without the exchange of seam
                 and halo; W = 1 through the same code
    equivalence  ten steps of a small model from one seed checkpoint: losses and gradient norms
    resume       FSDP over all GPUs, then W = all, then one GPU, from checkpoint to checkpoint,
                 against a run on one that never stops
    training     tokens/s and memory of 270M: the same context length on W GPUs and on each of
                 them alone, all at the same time, where the slowest counts
    short        the same at the length that each of W GPUs has, alone
    longest      Lighthouse attention at growing lengths (--lengths N,L,p,k) until memory runs out;
                 with --steps 1 memory alone, because the first step compiles

After each part, prints a table and writes it and a JSON record to the output folder. Parts that a
record there already has stay in it. At the end a plot shows tokens/s for each GPU over the length.
It needs matplotlib (pip install -e '.[plots]'); --no-plots leaves it out.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from arguments import benchmark_parser, run_benchmark
from context_parallel_results import plot, table
from context_parallel_training import equivalence, longest, resume, short, training
from measuring import method_of
from reporting import write_report

from torchtitan.models.llama3_lighthouse.environment import environment
from torchtitan.models.llama3_lighthouse.errors import UserFileError, UserValueError
from torchtitan.models.llama3_lighthouse.evaluation.figures import check_plots
from torchtitan.models.llama3_lighthouse.processes import die_with_parent

PARTS = ("layer", "equivalence", "resume", "training", "short", "longest")
LENGTHS = ["524288,3,4,8192", "1048576,4,4,4096", "1572864,4,4,6144", "2097152,4,4,8192"]
LAYER_SCRIPT = Path(__file__).with_name("context_parallel_layer.py")
CONFIGS = Path(__file__).parents[2] / "train_configs"
SMALL_CONFIG, LARGE_CONFIG = str(CONFIGS / "debug_cpu.toml"), str(CONFIGS / "270m_98k.toml")


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "context_parallel", with_plots=True)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    parser.add_argument("--gpus", type=int, help="how many to use; default: all")
    parser.add_argument("--lengths", nargs="+", metavar="N,L,p,k", default=LENGTHS,
                        help="lengths of the part longest; default: "
                        f"{' '.join(LENGTHS)}")  # fmt: skip
    parser.add_argument("--steps", type=int, default=2,
                        help="steps of the part longest; default: 2")  # fmt: skip
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Check the arguments; sets ``arguments.gpus`` if it was not given.

    Raises:
        ValueError, OSError: an argument breaks a rule, or there are too few GPUs.
    """
    found = torch.cuda.device_count()
    arguments.gpus = found if arguments.gpus is None else arguments.gpus
    if not 2 <= arguments.gpus <= found:
        raise UserValueError(
            f"the benchmark takes two or more GPUs, got {arguments.gpus} of the {found} that torch "
            "finds; pass --gpus from 2 to the number of GPUs"
        )
    for case in arguments.lengths:
        method_of(case, "--lengths")
    if arguments.steps < 1:
        raise UserValueError(f"--steps {arguments.steps} trains nothing; use 1 or more")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserFileError(f"--output {arguments.output} is no folder; name one to write to")
    check_plots(not arguments.no_plots)


def layer(folder: Path, gpus: int) -> dict[str, Any]:
    """The part "layer", one process for each GPU."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(gpus), str(LAYER_SCRIPT), str(folder)]
    subprocess.run(command, check=True, preexec_fn=die_with_parent)
    return json.loads((folder / "layer.json").read_text())


def measure(part: str, folder: Path, arguments: argparse.Namespace) -> Any:
    """Run one part and return its results, as the record keeps them."""
    gpus = list(range(arguments.gpus))
    if part == "layer":
        return layer(folder, arguments.gpus)
    if part == "equivalence":
        return equivalence(folder, gpus, SMALL_CONFIG)
    if part == "resume":
        return resume(folder, gpus, SMALL_CONFIG)
    if part == "training":
        return training(folder, gpus, LARGE_CONFIG)
    if part == "short":
        return short(folder, gpus, LARGE_CONFIG)
    return longest(folder, gpus, LARGE_CONFIG, arguments.lengths, arguments.steps)


def add(run: dict[str, Any], part: str, found: Any, origin: str) -> None:
    """Put a part and its origin, the revision and date, into the record."""
    if part == "longest":
        # Lengths of earlier calls stay, each with its origin: a length may need a call of its own.
        rows = {row["case"]: row for row in run.get(part, [])}
        rows |= {row["case"]: {**row, "measured": origin} for row in found}
        found = sorted(rows.values(), key=lambda row: row["N"])
        origin = " and ".join(dict.fromkeys(row["measured"] for row in found))
    run[part] = found
    run["measured"][part] = origin


def begin(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The record to add parts to, with those it has already, and the origin of new parts."""
    found = environment(arguments.revision)
    origin = f"{found.pop('revision')}, {found.pop('date')}"
    path = arguments.output / f"{arguments.name}.json"
    run = {
        "measured": {},
        **(json.loads(path.read_text()) if path.exists() else {}),
        **found,
        "GPUs": arguments.gpus,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }
    return run, origin


def main() -> None:
    arguments = parse()
    check(arguments)
    output, name = arguments.output, arguments.name
    run, origin = begin(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            print(f"part {part}", flush=True)
            work = Path(folder, part)
            add(run, part, measure(part, work, arguments), origin)
            shutil.rmtree(work, ignore_errors=True)
            write_report(run, output, name, table(run))
            print(table(run), flush=True)
    if not arguments.no_plots:
        plot(run, output / f"{name}.png")


if __name__ == "__main__":
    run_benchmark(main)
