#!/usr/bin/env python
"""Measure training: tokens/s, MFU and peak memory of stages, checkpointing modes and lengths.

Every case trains a few steps of CONFIG in a process of its own, one sequence batch a step, on the
same text. The first --warm-up steps are left out; the median of the others counts. A case that
does not fit is recorded as "out of memory". Stages are

    lighthouse  both stages' model with Lighthouse attention
    dense       the same model with dense attention
    upstream    torchtitan's own Llama 3 and trainer, in the same size

and modes of activation checkpointing

    none | full | selective[:OPTION] | lighthouse[:PRODUCT,...]

OPTION is activation_checkpoint.selective_ac_option (default op), PRODUCT one of keep_products.
Arguments that are not known here go to the trainer. Writes NAME.md, NAME.json and, with --plot,
NAME.png, with --profile what the GPU did in a step, NAME_profile.md.

    python scripts/benchmark_training.py train_configs/270m_98k.toml \\
        --stages lighthouse dense upstream --modes selective lighthouse:wo,w1,w3 \\
        --lengths 16384,256 32768,512 98304,1536
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

STAGES = ("lighthouse", "dense", "upstream")
MODES = ("none", "full", "selective", "lighthouse")
OUT_OF_MEMORY = "out of memory"
GIB = 2**30
LISTED_KERNELS, LISTED_GAPS = 40, 8


def mode_arguments(mode: str) -> list[str]:
    """Trainer arguments of a mode as it is written on the command line.

    Raises:
        ValueError: it is none of those above.
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


def case_arguments(options: argparse.Namespace, case: dict, folder: str) -> list[str]:
    """The trainer's whole command line for one case."""
    steps = options.warm_up + options.steps + options.profile
    line = [
        "--job.config_file", str(options.config), "--job.dump_folder", folder,
        "--training.dataset", "python_stdlib", "--training.global_batch_size", "-1",
        "--training.steps", str(steps), "--metrics.log_freq", "1",
        "--metrics.no-enable_tensorboard", "--metrics.no-enable_wandb",
        "--checkpoint.no-enable", "--validation.no-enable", *options.trainer,
        "--training.seq_len", str(case["N"]), "--lighthouse.top_k", str(case["k"]),
        *mode_arguments(case["mode"]),
    ]  # fmt: skip
    if case["stage"] != "upstream":
        line += ["--lighthouse.stage", case["stage"]]
    return line


def kernels_of(profile) -> dict:
    """What ran on the GPU in a profile: its kernels by name, the longest first, and for how long.

    "busy ms" is the time in which at least one kernel or copy ran, "gaps" the longest times in
    which none did, between which two.
    """
    from torch.autograd import DeviceType

    events = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    kernels: dict[str, list[float]] = {}
    busy, reached, before = 0.0, events[0].time_range.start if events else 0.0, ""
    gaps = []
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        kernels.setdefault(event.name, []).append((end - start) / 1e3)
        busy += max(0.0, end - max(start, reached)) / 1e3
        if start > reached:
            gaps.append({"ms": (start - reached) / 1e3, "after": before, "before": event.name})
        if end > reached:
            reached, before = end, event.name
    rows = [{"name": name, "count": len(ms), "ms": sum(ms)} for name, ms in kernels.items()]
    return {
        "busy ms": busy,
        "kernels": sorted(rows, key=lambda row: -row["ms"]),
        "gaps": sorted(gaps, key=lambda gap: -gap["ms"])[:LISTED_GAPS],
    }


def run_case(stage: str, warm_up: int, profile: bool, result_file: str, line: list[str]) -> None:
    """Train one case in this process and write what it took; ``profile`` its last step."""
    import torch

    from torchtitan.models.llama3_lighthouse import baseline, flavors
    from torchtitan.models.llama3_lighthouse import train as ours

    # isort: split
    import torchtitan.train as upstream
    from torchtitan.tools import utils

    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

    ours.init_logger()
    if stage == "upstream":
        baseline.register_baseline()
        line = [*line, "--model.name", baseline.NAME]
    config = LighthouseConfigManager().parse_args(line)
    ends, logged, peaks = [], [], []

    class Timed(upstream.Trainer if stage == "upstream" else ours.LighthouseTrainer):
        def train_step(self, data_iterator):
            log = self.metrics_processor.log

            def watched(step, average_loss, maximum_loss, grad_norm, extra_metrics=None):
                logged.append(float(average_loss))
                # Logging starts the count of the peak anew.
                memory = utils.device_module.memory_stats()
                peaks.append(
                    [memory[f"{kind}_bytes.all.peak"] / GIB for kind in ("reserved", "active")]
                )
                log(step, average_loss, maximum_loss, grad_norm, extra_metrics)

            self.metrics_processor.log = watched
            profiled = profile and self.step == config.training.steps
            with torch.profiler.profile() if profiled else nullcontext() as recorded:
                super().train_step(data_iterator)
                utils.device_module.synchronize()
            self.metrics_processor.log = log
            if profiled:
                result["profile"] = kernels_of(recorded)
            else:
                ends.append(time.perf_counter())

    result = {}
    try:
        trainer = Timed(config)
        args = flavors[config.model.flavor]
        args.update_from_config(config)
        counted = "dense" if stage == "upstream" else stage
        _, flops = args.get_nparams_and_flops(
            trainer.model_parts[0], config.training.seq_len, counted
        )
        gathered = args.gathered_length(config.training.seq_len)
        result = {
            "S": gathered if stage == "lighthouse" else config.training.seq_len,
            "tokens a step": config.training.seq_len * config.training.local_batch_size,
            "FLOPs a token": flops,
            "peak FLOP/s": trainer.metrics_processor.gpu_peak_flops,
        }
        trainer.train()
    except torch.OutOfMemoryError as error:
        result |= {"failure": OUT_OF_MEMORY, "message": str(error)}
    result |= {
        "seconds": [end - start for start, end in zip(ends, ends[1:], strict=False)][warm_up - 1 :],
        "losses": logged,
        "reserved GiB": max((peak[0] for peak in peaks), default=None),
        "active GiB": max((peak[1] for peak in peaks), default=None),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    Path(result_file).write_text(json.dumps(result))
    # Nothing is left to tidy up, and after an error the trainer's own end may wait for ever.
    sys.stdout.flush()
    os._exit(0)


def measure(options: argparse.Namespace, case: dict) -> dict:
    """Run ``case`` in a fresh process; what it gave, with ``failure`` if it gave nothing."""
    from torch.distributed.elastic.utils.distributed import get_free_port

    with tempfile.TemporaryDirectory() as folder:
        result_file, log_file = Path(folder, "result.json"), Path(folder, "log")
        environment = {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            **os.environ,
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port())},
        }
        command = [sys.executable, __file__, "--run-case", case["stage"], str(options.warm_up)]
        command += [str(int(options.profile)), str(result_file)]
        command += case_arguments(options, case, folder)
        with log_file.open("w") as log:
            try:
                subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT,
                               timeout=options.timeout)  # fmt: skip
                failure = "failed"
            except subprocess.TimeoutExpired:
                failure = f"over {options.timeout:.0f} s"
        if result_file.exists():
            return case | json.loads(result_file.read_text())
        text = log_file.read_text()
        if OUT_OF_MEMORY in text[-4000:]:
            failure = OUT_OF_MEMORY
        return case | {"failure": failure, "message": text[-4000:]}


def summarise(record: dict) -> dict:
    """Add tokens/s and MFU to a record that has none."""
    if "failure" not in record and record["seconds"]:
        seconds = statistics.median(record["seconds"])
        record["s a step"] = seconds
        record["spread"] = max(record["seconds"]) - min(record["seconds"])
        record["tokens/s"] = record["tokens a step"] / seconds
        record["MFU"] = record["tokens/s"] * record["FLOPs a token"] / record["peak FLOP/s"]
    return record


def describe(record: dict) -> str:
    """One line of progress."""
    if "tokens/s" not in record:
        last = record.get("message", "").strip().splitlines()
        return record.get("failure", "no step left to measure") + (f": {last[-1]}" if last else "")
    return (f"{record['tokens/s']:,.0f} tokens/s, MFU {record['MFU']:.1%}, "
            f"{record['reserved GiB']:.1f} GiB")  # fmt: skip


def find_longest(options: argparse.Namespace, case: dict) -> list[dict]:
    """Double the length from ``case``'s on until it does not fit, then halve the gap.

    N / k stays what it is, so lengths are multiples of what one stratum has. Stops when the gap
    is an eighth of the length that fits.
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


def best(records: list[dict], stage: str, n: int) -> dict | None:
    """The fastest record of ``stage`` at length ``n``."""
    found = [r for r in records if r["stage"] == stage and r["N"] == n and "tokens/s" in r]
    return max(found, key=lambda record: record["tokens/s"], default=None)


def crossover(records: list[dict]) -> str:
    """From which measured length on Lighthouse is faster, each stage in its best mode."""
    wins = {}
    for n in sorted({record["N"] for record in records}):
        pair = best(records, "lighthouse", n), best(records, "dense", n)
        if all(pair):
            wins[n] = pair[0]["tokens/s"] > pair[1]["tokens/s"]
    if not wins:
        return "No length has both stages."
    slower = [n for n, faster in wins.items() if not faster]
    first = min((n for n in wins if n > max(slower, default=0)), default=None)
    if first is None:
        return "Dense attention is faster at every length measured."
    if not slower:
        return f"Lighthouse is faster at every length measured, from {first:,} tokens on."
    return f"Lighthouse is faster from {first:,} tokens on, dense attention at {max(slower):,}."


def table(run: dict) -> str:
    """The run as Markdown."""
    records = run["records"]
    lines = [
        f"{run['config']} {' '.join(run['trainer arguments'])}, {run['device']}, torch "
        f"{run['torch']}, triton {run['triton']}, revision {run['revision']}, {run['date']}. "
        f"{run['steps']} steps after {run['warm-up']} of warm-up.",
        "",
        "| stage | checkpointing | N, k | S | tokens/s | s a step | MFU | GiB | over dense | "
        "over upstream |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        head = f"| {record['stage']} | {record['mode']} | {record['N']:,}, {record['k']:,} "
        if "tokens/s" not in record:
            lines.append(head + f"| | {record.get('failure', 'nothing measured')} | | | | | |")
            continue
        ratios = []
        for stage in ("dense", "upstream"):
            other = best(records, stage, record["N"])
            ratios.append(f"{record['tokens/s'] / other['tokens/s']:.2f}x" if other else "")
        lines.append(
            f"{head}| {record['S']:,} | {record['tokens/s']:,.0f} | {record['s a step']:.3f} ± "
            f"{record['spread']:.1g} | {record['MFU']:.1%} | {record['reserved GiB']:.1f} | "
            f"{' | '.join(ratios)} |"
        )
    lines += [
        "",
        f"{crossover(records)} Ratios are to the fastest mode at that length. GiB: peak reserved. "
        "MFU counts causal attention once and S in Lighthouse layers, no recomputation.",
    ]
    return "\n".join(lines) + "\n"


def profile_table(run: dict) -> str:
    """What the GPU did in one step of every case that was profiled."""
    lines = [f"One step each on one {run['device']}, {run['date']}, revision {run['revision']}."]
    for record in run["records"]:
        if "profile" not in record:
            continue
        profile, step = record["profile"], record["s a step"] * 1e3
        lines += [
            "",
            f"## {record['stage']}, {record['mode']}, {record['N']:,} tokens",
            "",
            f"{profile['busy ms']:.0f} ms busy, of {step:.0f} ms that a step takes unprofiled.",
            "",
            "| kernel | launches | ms | share of the step |",
            "|---|---|---|---|",
        ]
        for row in profile["kernels"][:LISTED_KERNELS]:
            name = row["name"].replace("|", "/")[:120]
            lines.append(
                f"| `{name}` | {row['count']} | {row['ms']:.1f} | {row['ms'] / step:.1%} |"
            )
        lines += ["", "Longest gaps:", ""]
        for gap in profile["gaps"]:
            names = (gap[key].replace("|", "/")[:60] for key in ("after", "before"))
            lines.append("- {:.1f} ms between `{}` and `{}`".format(gap["ms"], *names))
    return "\n".join(lines) + "\n"


def plot(run: dict, path: Path) -> None:
    """Tokens/s and memory over the length, one line for each stage and mode."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    lines = dict.fromkeys((r["stage"], r["mode"]) for r in run["records"])
    markers = {"lighthouse": "s-", "dense": "o--", "upstream": "^:"}
    for axis, key in zip(axes, ("tokens/s", "reserved GiB"), strict=True):
        for stage, mode in lines:
            points = sorted(
                (r["N"], r[key])
                for r in run["records"]
                if (r["stage"], r["mode"]) == (stage, mode) and "tokens/s" in r
            )
            if points:
                axis.plot(*zip(*points, strict=True), markers[stage], label=f"{stage}, {mode}")
        axis.set(xscale="log", yscale="log", xlabel="sequence length N", ylabel=key)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"Training, {run['config']}, {run['device']}. {crossover(run['records'])}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(run: dict, options: argparse.Namespace) -> None:
    stem = options.output / options.name
    stem.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(run))
    if options.profile:
        stem.with_name(f"{options.name}_profile.md").write_text(profile_table(run))
    if options.plot:
        plot(run, stem.with_suffix(".png"))


def parse(line: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["lighthouse", "dense"])
    parser.add_argument("--modes", nargs="+", default=["selective", "lighthouse"])
    parser.add_argument("--lengths", nargs="+", metavar="N,k",
                        help="seq_len and top_k; default: CONFIG's")  # fmt: skip
    parser.add_argument("--steps", type=int, default=6, help="steps to measure")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them, at least 1")
    parser.add_argument("--find-longest", action="store_true",
                        help="from the first length on, seek the longest that fits")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one case")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--name", default="training", help="stem of the files written")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--profile", action="store_true",
                        help="take one more step of each case, profiled")  # fmt: skip
    parser.add_argument("--revision", help="git revision to record; default: as git says")
    options, options.trainer = parser.parse_known_args(line)
    if options.warm_up < 1:
        parser.error("--warm-up must be at least 1: the first step compiles")
    try:
        for mode in options.modes:
            mode_arguments(mode)
    except ValueError as error:
        parser.error(str(error))
    return options


def cases_of(options: argparse.Namespace) -> list[dict]:
    """What to run; upstream knows no mode "lighthouse"."""
    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

    line = ["--job.config_file", str(options.config), *options.trainer]
    config = LighthouseConfigManager().parse_args(line)
    options.picks_per_stratum = config.lighthouse.picks_per_stratum
    lengths = options.lengths or [f"{config.training.seq_len},{config.lighthouse.top_k}"]
    cases = []
    for stage in options.stages:
        for mode in options.modes:
            if stage == "upstream" and mode.startswith("lighthouse"):
                print(f"upstream has no mode {mode}: left out")
                continue
            for length in lengths[:1] if options.find_longest else lengths:
                n, k = map(int, length.split(","))
                cases.append({"stage": stage, "mode": mode, "N": n, "k": k})
    return cases


def main() -> None:
    if sys.argv[1:2] == ["--run-case"]:
        stage, warm_up, profile, result_file, *line = sys.argv[2:]
        run_case(stage, int(warm_up), bool(int(profile)), result_file, line)
    options = parse(sys.argv[1:])
    import torch
    import triton

    git = ["git", "rev-parse", "--short", "HEAD"]
    run = {
        "config": options.config.name,
        "trainer arguments": options.trainer,
        "steps": options.steps,
        "warm-up": options.warm_up,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "revision": options.revision or subprocess.check_output(git, text=True).strip(),
        "date": date.today().isoformat(),
        "records": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    cases = cases_of(options)
    for number, case in enumerate(cases, 1):
        print(f"case {number} of {len(cases)}: {case['stage']}, {case['mode']}, {case['N']:,} "
              f"tokens, top_k {case['k']:,}", flush=True)  # fmt: skip
        if options.find_longest:
            run["records"] += find_longest(options, case)
        else:
            run["records"].append(summarise(measure(options, case)))
            print(f"    {describe(run['records'][-1])}", flush=True)
        devices = [record["device"] for record in run["records"] if "device" in record]
        run["device"] = devices[0] if devices else "unknown device"
        write(run, options)
    print(table(run))
    if any(r.get("failure", OUT_OF_MEMORY) != OUT_OF_MEMORY for r in run["records"]):
        sys.exit("some cases failed; their records say why")


if __name__ == "__main__":
    main()
