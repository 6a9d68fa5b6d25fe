#!/usr/bin/env python3
"""Check and time context parallelism on the GPUs of this machine, through NCCL.

    python scripts/benchmarks/context_parallel.py --gpus 2 4 --name context_parallel_4

W is the number of GPUs. The parts layer, training, alone and profile run for each number that
--gpus gives, the others for the largest:

    layer        attention alone, bf16: errors against float64 beside those of one GPU; its time,
                 and that of the same work with nothing sent, and without the exchange of seam
                 and halo; W = 1 through the same code
    equivalence  ten steps of a small model from one seed checkpoint: losses and gradient norms
    resume       FSDP over all GPUs, then W = all, then one GPU, from checkpoint to checkpoint,
                 against a run on one that never stops
    meshes       both for each mesh of FSDP with context parallelism: 2 x 2 of four GPUs, 2 x 4 and
                 4 x 2 of eight; where there is none, for FSDP and for context parallelism
    training     tokens/s and memory of 270M on W GPUs: dense, and with Lighthouse with the recipe's
                 window, without it, and as published, with the first and last two layers dense
    alone        the same context lengths on each of W GPUs alone, all at the same time, where the
                 slowest counts
    short        the same at the length that each of W GPUs has, alone
    profile      a Lighthouse step of 270M on W GPUs, and on one: which kernels take longer than
                 one GPU's share of them, and between which kernels nothing is computed
    longest      Lighthouse attention at growing lengths (--lengths N,L,p,k) until memory runs out;
                 with --steps 1 memory alone, because the first step compiles
    8b           train_configs/8b_128k.toml on all GPUs: speed, and memory beside the dry run's
                 estimate; then growing lengths (--8b-lengths N,L,p,k) until memory runs out, even
                 with layer inputs offloaded
    killed       one rank is killed, in another run stopped: the time until all processes have
                 ended, the files of NCCL's flight recorder, and the losses of the run started again

After each part, prints a table and writes it and a JSON record to the output folder. A part that
fails does not keep the others from running. Parts that a record of the same GPUs there already has
stay in it, and so do rows of parts with several runs. At the end a plot shows tokens/s for each GPU
over the length, and the memory of the part 8b. It needs matplotlib (pip install -e '.[plots]');
--no-plots leaves it out.

With --tiny all parts but layer run at sizes of seconds, on GPUs or through gloo on CPU processes,
to try the code out. Their figures mean nothing.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from arguments import benchmark_parser, run_benchmark
from context_parallel_8b import large_model
from context_parallel_jobs import TINY, Sizes, end_jobs
from context_parallel_killed import killed
from context_parallel_meshes import equivalence, meshes, resume
from context_parallel_plots import plot
from context_parallel_profile import profile
from context_parallel_results import table
from context_parallel_training import alone, longest, short, training
from reporting import write_report

from torchtitan.models.llama3_lighthouse.environment import environment
from torchtitan.models.llama3_lighthouse.errors import UserFileError, UserValueError
from torchtitan.models.llama3_lighthouse.evaluation.figures import check_plots
from torchtitan.models.llama3_lighthouse.processes import die_with_parent

COMPARING = {"equivalence": equivalence, "resume": resume, "meshes": meshes}
TIMING = {"training": training, "alone": alone, "short": short}
OF_270M = TIMING | {"profile": profile}
PARTS = ("layer", *COMPARING, *TIMING, "profile", "longest", "8b", "killed")
# Parts that each number of GPUs has for itself.
FOR_EACH_NUMBER = ("layer", "training", "alone", "profile")
# Parts whose rows of earlier calls stay, each with its origin, by what tells the rows apart.
KEYS = dict.fromkeys((*TIMING, "longest", "8b"), ("stage", "GPUs", "N", "checkpointing"))
KEYS |= {"layer": ("W",), "profile": ("GPUs", "N")}
LENGTHS = ["524288,3,4,8192", "1048576,4,4,4096", "1572864,4,4,6144", "2097152,4,4,8192"]
LENGTHS_8B = ["262144,3,4,4096", "524288,3,4,8192", "786432,3,4,12288", "1048576,3,4,16384"]
LENGTH_FLAGS = (("--lengths", "longest", LENGTHS), ("--8b-lengths", "8b", LENGTHS_8B))
TINY_LENGTHS = ["6144,3,4,64", "7168,3,4,64"]
LAYER_SCRIPT = Path(__file__).with_name("context_parallel_layer.py")
CONFIGS = Path(__file__).parents[2] / "train_configs"
SMALL_CONFIG, LARGE_CONFIG = str(CONFIGS / "debug_cpu.toml"), str(CONFIGS / "270m_98k.toml")
CONFIG_8B = str(CONFIGS / "8b_128k.toml")


def parse(line: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "context_parallel", with_plots=True)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    parser.add_argument("--gpus", type=int, nargs="+", metavar="W",
                        help="how many to use, one number or more; default: all")  # fmt: skip
    for flag, part, default in LENGTH_FLAGS:
        parser.add_argument(flag, nargs="+", metavar="N,L,p,k", dest=f"lengths_{part}",
                            help=f"lengths of the part {part}; default: "
                            f"{' '.join(default)}")  # fmt: skip
    parser.add_argument("--steps", type=int, default=2,
                        help="steps of the part longest; default: 2")  # fmt: skip
    parser.add_argument("--tiny", action="store_true",
                        help="tiny sizes, to try the code out, without GPUs too")  # fmt: skip
    return parser.parse_args(line)


def check(arguments: argparse.Namespace) -> None:
    """Check the arguments, and set those that were not given.

    Raises:
        ValueError, OSError: an argument breaks a rule, or there are too few GPUs.
    """
    found = torch.cuda.device_count()
    arguments.gpus = sorted(set(arguments.gpus or [found or (2 if arguments.tiny else 0)]))
    on_cpus = arguments.tiny and not found
    for number in arguments.gpus:
        if number < 2 or (number > found and not on_cpus):
            raise UserValueError(
                f"the benchmark takes two or more GPUs, got {number} of the {found} that torch "
                "finds; pass --gpus from 2 to the number of GPUs, or --tiny to try it out on CPUs"
            )
    if arguments.tiny and arguments.parts is PARTS:
        arguments.parts = PARTS[1:]
    if arguments.tiny and "layer" in arguments.parts:
        raise UserValueError("--parts layer has no tiny size; leave it or --tiny out")
    arguments.sizes = TINY if arguments.tiny else Sizes()
    for flag, part, default in LENGTH_FLAGS:
        given = getattr(arguments, f"lengths_{part}")
        cases = given or (TINY_LENGTHS if arguments.tiny else default)
        for case in cases:
            arguments.sizes.of_length(case, flag)
        setattr(arguments, f"lengths_{part}", cases)
    if arguments.steps < 1:
        raise UserValueError(f"--steps {arguments.steps} trains nothing; use 1 or more")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserFileError(f"--output {arguments.output} is no folder; name one to write to")
    check_plots(not arguments.no_plots)


def layer(folder: Path, gpus: int) -> dict[str, Any]:
    """The part "layer", one process for each GPU."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(gpus), str(LAYER_SCRIPT), str(folder)]
    subprocess.run(command, check=True, preexec_fn=die_with_parent)
    return json.loads((folder / "layer.json").read_text())


def measure(part: str, folder: Path, gpus: int, arguments: argparse.Namespace) -> Iterable[Any]:
    """Run one part; yields its results, as the record keeps them, as soon as there are some."""
    sizes, used = arguments.sizes, list(range(gpus))
    if part == "layer":
        return iter([[layer(folder, gpus)]])
    if part in COMPARING:
        return iter([COMPARING[part](folder, used, SMALL_CONFIG, sizes)])
    if part in OF_270M:
        return OF_270M[part](folder, used, LARGE_CONFIG, sizes)
    if part == "killed":
        return killed(folder, used, SMALL_CONFIG, sizes)
    if part == "8b":
        return large_model(folder, used, CONFIG_8B, arguments.lengths_8b, sizes)
    lengths = arguments.lengths_longest
    return longest(folder, used, LARGE_CONFIG, lengths, arguments.steps, sizes)


def add(run: dict[str, Any], part: str, found: Any, origin: str) -> None:
    """Put a part and its origin, the revision and date, into the record."""
    if part in KEYS:
        # Rows of earlier calls stay, each with its origin: a length may need a call of its own.
        def key(row: dict[str, Any]) -> tuple:
            return tuple(row.get(name) for name in KEYS[part])

        earlier = run.get(part, [])
        # Records once had a single number of GPUs in this part.
        earlier = [earlier] if isinstance(earlier, dict) else earlier
        rows = {key(row): {"measured": run["measured"].get(part), **row} for row in earlier}
        rows |= {key(row): {**row, "measured": origin} for row in found}
        found = sorted(rows.values(), key=lambda row: row.get("N", row.get("W", 0)))
        origin = " and ".join(dict.fromkeys(row["measured"] for row in found))
    run[part] = found
    run["measured"][part] = origin


def begin(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The record to add parts to, with those it has already, and the origin of new parts.

    Raises:
        ValueError: the record there is of other GPUs.
    """
    found = environment(arguments.revision)
    origin = f"{found.pop('revision')}, {found.pop('date')}"
    path = arguments.output / f"{arguments.name}.json"
    machine = {
        "GPU": found["GPU"],
        "GPUs": torch.cuda.device_count() or max(arguments.gpus),
        **({"tiny": True} if arguments.tiny else {}),
    }
    run = json.loads(path.read_text()) if path.exists() else {}
    there = {key: run.get(key) for key in ("GPU", "GPUs", "tiny")}
    if run and there != {"tiny": None, **machine}:
        raise UserValueError(
            f"{path} is of {described(there)}, and this is {described(machine)}; pass --name for "
            "another record"
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if found["GPU"] else None
    return {"measured": {}, **run, **found, **machine, "NCCL": nccl}, origin


def described(machine: dict[str, Any]) -> str:
    tiny = ", --tiny" if machine.get("tiny") else ""
    return f"{machine['GPUs']} x {machine['GPU'] or 'CPU process'}{tiny}"


def main() -> None:
    arguments = parse()
    check(arguments)
    output, name = arguments.output, arguments.name
    run, origin = begin(arguments)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            numbers = arguments.gpus if part in FOR_EACH_NUMBER else arguments.gpus[-1:]
            for gpus in numbers:
                name_of_part = f"{part}, {gpus} GPUs"
                print(f"part {name_of_part}", flush=True)
                work = Path(folder, f"{part} {gpus}")
                try:
                    for found in measure(part, work, gpus, arguments):
                        add(run, part, found, origin)
                        write_report(run, output, name, table(run))
                # The other parts have results of their own.
                except (Exception, SystemExit):
                    traceback.print_exc()
                    failed.append(name_of_part)
                finally:
                    end_jobs()
                shutil.rmtree(work, ignore_errors=True)
            print(table(run), flush=True)
    if not arguments.no_plots:
        plot(run, output / f"{name}.png")
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}; see above")


if __name__ == "__main__":
    run_benchmark(main)
