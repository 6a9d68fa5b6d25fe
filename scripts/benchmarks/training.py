#!/usr/bin/env python3
"""Measure training: tokens/s, MFU and peak memory of attentions, checkpointing modes and lengths.

Every case trains a few steps of CONFIG in a process of its own, one local batch a step, on the
same text. The first --warm-up steps are left out, and the median of the others counts. A step's
time is that from the end of the step before, on the GPU's own clock: all that a training run does
between log lines, the data loader included. No step is logged, validated or saved, and the script
itself waits for the GPU only after the last one. On a CPU the clock is the host's. A case that does
not fit is recorded as "out of memory". The values of --attention are

    lighthouse  Lighthouse attention
    dense       the same model with dense attention
    upstream    torchtitan's own Llama 3 and trainer, in the same size

and those of --modes, for activation checkpointing, are

    none | full | selective[:OPTION] | lighthouse[:PRODUCT,...]

OPTION is activation_checkpoint.selective_ac_option (default op), PRODUCT one of keep_products.
Further arguments at the end, --section.key value, go to the trainer.

Writes NAME.md, NAME.json and, unless --no-plots, NAME.png, which needs matplotlib
(pip install -e '.[plots]'). With --profile, NAME_profile.md says what the GPU did in one more step,
which begins and ends with an idle GPU, other than the timed ones.

    python scripts/benchmarks/training.py train_configs/270m_98k.toml \\
        --attention lighthouse dense upstream --modes selective lighthouse:wo,w1,w3 \\
        --lengths 16384,256 32768,512 98304,1536
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from arguments import benchmark_parser, run_benchmark
from gpu_profile import profile_table
from reporting import write_report
from training_case import OUT_OF_MEMORY
from training_results import plot, summarise, table

from lighthouse_commands.arguments import split_overrides
from lighthouse_commands.launch import gpus_here

ATTENTIONS = ("lighthouse", "dense", "upstream")
MODES = ("none", "full", "selective", "lighthouse")
CASE_SCRIPT = Path(__file__).with_name("training_case.py")
# Characters of a failed case's output that its record keeps.
KEPT_OUTPUT = 4000


def mode_arguments(mode: str) -> list[str]:
    """Trainer arguments of a mode as it is written on the command line.

    Raises:
        ValueError: the mode is not known.
    """
    name, _, detail = mode.partition(":")
    if name not in MODES:
        raise ValueError(f"--modes {mode} is not known; use one of {', '.join(MODES)}, see --help")
    if detail and name in ("none", "full"):
        raise ValueError(f"--modes {mode}: '{name}' takes nothing after a colon")
    line = ["--activation_checkpoint.mode", name]
    if name == "selective":
        line += ["--activation_checkpoint.selective_ac_option", detail or "op"]
    if name == "lighthouse":
        line += ["--activation_checkpoint.keep_products", *filter(None, detail.split(","))]
    return line


def case_arguments(options: argparse.Namespace, case: dict[str, Any], folder: str) -> list[str]:
    """The whole command line of the trainer for one case."""
    steps = options.warm_up + options.steps + options.profile
    line = [
        "--job.config_file", str(options.config), "--job.dump_folder", folder,
        "--training.dataset", "python_stdlib", "--training.global_batch_size", "-1",
        "--training.steps", str(steps),
        "--metrics.no-enable_tensorboard", "--metrics.no-enable_wandb",
        "--checkpoint.no-enable", "--validation.no-enable", *options.trainer,
        "--training.seq_len", str(case["N"]), "--lighthouse.top_k", str(case["k"]),
        *mode_arguments(case["mode"]),
    ]  # fmt: skip
    if case["stage"] != "upstream":
        line += ["--lighthouse.stage", case["stage"]]
    return line


def measure(options: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """Run ``case`` in a fresh process.

    Returns:
        The case with what its process measured, or with "failure" and "message".
    """
    # The import is here, so that --help does not wait for torch.
    from torch.distributed.elastic.utils.distributed import get_free_port

    with tempfile.TemporaryDirectory() as folder:
        result_file, log_file = Path(folder, "result.json"), Path(folder, "log")
        environment = {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            **os.environ,
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port())},
        }
        command = [sys.executable, str(CASE_SCRIPT), case["stage"], str(options.warm_up)]
        command += [str(int(options.profile)), str(result_file)]
        command += case_arguments(options, case, folder)
        with log_file.open("w") as log:
            try:
                subprocess.run(
                    command,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=options.timeout,
                )
                failure = "failed"
            except subprocess.TimeoutExpired:
                failure = f"over {options.timeout:.0f} s"
        if result_file.exists():
            return case | json.loads(result_file.read_text())
        text = log_file.read_text()[-KEPT_OUTPUT:]
        if OUT_OF_MEMORY in text:
            failure = OUT_OF_MEMORY
        return case | {"failure": failure, "message": text}


def describe(record: dict[str, Any]) -> str:
    """One line of progress."""
    if "tokens/s" not in record:
        last = record.get("message", "").strip().splitlines()
        return record.get("failure", "no step left to measure") + (f": {last[-1]}" if last else "")
    mfu = f"MFU {record['MFU']:.1%}, " if "MFU" in record else ""
    return f"{record['tokens/s']:,.0f} tokens/s, {mfu}{record['reserved GiB']:.1f} GiB"


def find_longest(options: argparse.Namespace, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Double the length, from that of ``case`` on, until it does not fit, then halve the gap.

    N / k stays what it is, so every length is a multiple of the length of one stratum. The search
    stops when the gap is an eighth of the length that fits.
    """
    strata = case["k"] // options.picks_per_stratum
    unit, records = case["N"] // strata, []
    fits, too_long, next_one = 0, None, strata
    while True:
        tried = case | {"N": next_one * unit, "k": next_one * options.picks_per_stratum}
        print(f"    {tried['N']:,} tokens: ", end="", flush=True)
        records.append(summarise(measure(options, tried)))
        print(describe(records[-1]), flush=True)
        failure = records[-1].get("failure")
        if failure not in (None, OUT_OF_MEMORY):
            return records
        if failure is None:
            fits = next_one
        else:
            too_long = next_one
        if too_long is None:
            next_one = 2 * fits
        elif too_long - fits <= max(1, fits // 8):
            return records
        else:
            next_one = (fits + too_long) // 2


def write(run: dict[str, Any], options: argparse.Namespace) -> None:
    """Write everything measured so far."""
    output, name = options.output, options.name
    write_report(run, output, name, table(run))
    if options.profile:
        (output / f"{name}_profile.md").write_text(profile_table(run))
    if not options.no_plots:
        plot(run, output / f"{name}.png")


def parse(line: list[str]) -> argparse.Namespace:
    """Parse the command line; arguments for the trainer become ``trainer``."""
    parser = benchmark_parser(__doc__, "training", with_plots=True)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS,
                        default=["lighthouse", "dense"],
                        help="default: lighthouse dense")  # fmt: skip
    parser.add_argument("--modes", nargs="+", default=["selective", "lighthouse"],
                        help="default: selective lighthouse")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", metavar="N,k",
                        help="seq_len and top_k; default: those of CONFIG")  # fmt: skip
    parser.add_argument("--steps", type=int, default=6, help="steps to measure; default: 6")
    parser.add_argument("--warm-up", type=int, default=5,
                        help="steps before them, at least 1; default: 5. The first compiles, and "
                        "the fourth captures a CUDA graph")  # fmt: skip
    parser.add_argument("--find-longest", action="store_true",
                        help="search for the longest length that fits, from the first one "
                        "on")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=1800.0,
                        help="seconds for one case; default: 1800")  # fmt: skip
    parser.add_argument("--profile", action="store_true",
                        help="take one more step of each case, profiled")  # fmt: skip
    parser.add_argument("--on-cpu", action="store_true",
                        help="run without a GPU, to try the script out")  # fmt: skip
    own, overrides = split_overrides(line)
    options = parser.parse_args(own)
    options.trainer = overrides
    if options.warm_up < 1:
        parser.error(f"--warm-up {options.warm_up} must be at least 1: the first step compiles")
    try:
        for mode in options.modes:
            mode_arguments(mode)
    except ValueError as error:
        parser.error(str(error))
    return options


def cases_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases to run; sets ``options.picks_per_stratum``.

    torchtitan's own model has no mode "lighthouse", so such cases are left out.
    """
    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

    line = ["--job.config_file", str(options.config), *options.trainer]
    config = LighthouseConfigManager().parse_args(line)
    options.picks_per_stratum = config.lighthouse.picks_per_stratum
    lengths = options.lengths or [f"{config.training.seq_len},{config.lighthouse.top_k}"]
    cases = []
    for attention in options.attention:
        for mode in options.modes:
            if attention == "upstream" and mode.startswith("lighthouse"):
                print(f"upstream has no mode {mode}: left out")
                continue
            for length in lengths[:1] if options.find_longest else lengths:
                n, k = map(int, length.split(","))
                # Records have named the attention "stage" since the first one.
                cases.append({"stage": attention, "mode": mode, "N": n, "k": k})
    return cases


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """The record of a run without cases."""
    from torchtitan.models.llama3_lighthouse.environment import environment

    # Ask in another process: naming the GPU takes some of its memory until that process ends.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(environment, options.revision).result()
    device = found.pop("GPU") or "CPU"
    return {
        "config": options.config.name,
        "trainer arguments": options.trainer,
        "steps": options.steps,
        "warm-up": options.warm_up,
        **found,
        "records": [],
        "device": device,
    }


def main() -> None:
    options = parse(sys.argv[1:])
    if not gpus_here() and not options.on_cpu:
        sys.exit(f"{Path(sys.argv[0]).name} needs a CUDA device and found none; --on-cpu tries it "
                 "out without one")  # fmt: skip
    from torchtitan.models.llama3_lighthouse.evaluation.figures import check_plots

    check_plots(not options.no_plots)
    cases = cases_of(options)
    run = begin(options)
    for number, case in enumerate(cases, 1):
        print(
            f"case {number} of {len(cases)}: {case['stage']}, {case['mode']}, {case['N']:,} "
            f"tokens, top_k {case['k']:,}",
            flush=True,
        )
        if options.find_longest:
            run["records"] += find_longest(options, case)
        else:
            run["records"].append(summarise(measure(options, case)))
            print(f"    {describe(run['records'][-1])}", flush=True)
        write(run, options)
    print(table(run))
    if any(r.get("failure", OUT_OF_MEMORY) != OUT_OF_MEMORY for r in run["records"]):
        sys.exit("some cases failed; their records say why")


if __name__ == "__main__":
    run_benchmark(main)
