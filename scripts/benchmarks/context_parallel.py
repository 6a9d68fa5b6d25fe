#!/usr/bin/env python3
"""Check and time context parallelism on the GPUs of this machine, through NCCL.

    python scripts/benchmark_context_parallel.py --parts layer equivalence resume training --plot

Parts, each with W = all GPUs (or --gpus) against one of them:

    layer        attention alone, bf16: errors against float64 beside those of one GPU; its time,
                 and that of the same work with nothing sent; W = 1 through the same code
    equivalence  ten steps of a small model from one seed checkpoint: losses and gradient norms
    resume       FSDP over all GPUs, then W = all, then one GPU, from checkpoint to checkpoint,
                 against a run on one that never stops
    training     tokens/s and memory of 270M: the same context length on W GPUs and on each of
                 them alone, all at the same time, of which the slowest counts
    short        the same at the length that each of W GPUs has, alone
    longest      the Lighthouse stage at growing lengths (--lengths N,L,p,k) until memory runs out;
                 with --steps 1 the memory alone, as the first step compiles

Prints and writes, after each part, a JSON record and a Markdown table to the output folder; --plot
adds tokens/s for each GPU over the length, which needs the extra "benchmark".
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from measuring import environment, relative_error

from lighthouse import ContextParallel, LighthouseAttention, LighthouseConfig, select
from lighthouse.attention import lighthouse_attention
from lighthouse.geometry import PyramidGeometry
from lighthouse.scoring import SDPA_BACKENDS
from torchtitan.models.llama3_lighthouse.studies.sweeps import (
    command_line,
    end_with_parent,
    trainer_command,
)

PER_GPU = 98304
NOTHING_SENT = ", nothing sent"
# That checkpointing keeps in the part "training"; more would not leave room in 80 GB for the whole
# length on one GPU.
KEPT_PRODUCT = "wo"
LINE = re.compile(
    r"step: *(?P<step>\d+) +loss: *(?P<loss>\S+) +grad_norm: *(?P<grad_norm>\S+) +"
    r"memory: *(?P<GiB>[\d.]+)GiB.*?tps: *(?P<tps>[\d,]+).*?mfu: *(?P<mfu>[\d.]+)%"
)
LENGTHS = ["524288,3,4,8192", "1048576,4,4,4096", "1572864,4,4,6144", "2097152,4,4,8192"]
LARGE = {"training.dataset": "python_stdlib", "training.global_batch_size": 1,
         "checkpoint.enable": False}  # fmt: skip
SMALL = {
    "model.flavor": "debugmodel", "training.seq_len": 8192, "training.local_batch_size": 1,
    "lighthouse.top_k": 256, "lighthouse.picks_per_stratum": 32, "lighthouse.dense_from_step": 6,
    "lr_scheduler.warmup_steps": 4, "checkpoint.enable": True, "checkpoint.interval": 1000,
    "training.mixed_precision_param": "bfloat16", "optimizer.lr": 2e-4,
    "activation_checkpoint.mode": "none", "compile.enable": True,
}  # fmt: skip


def time_in_turns(variants: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Each one's ms, turn by turn, the slowest rank's, in orders drawn anew but alike on ranks."""
    order, shuffle = list(variants), random.Random(0).shuffle
    durations = {name: [] for name in order}
    together = torch.zeros((), device="cuda")
    for turn in range(turns + 2):
        shuffle(order)
        for name in order:
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host gets ahead, and the GPUs then start together, whatever their clocks.
            torch.cuda._sleep(30_000_000)
            dist.all_reduce(together)
            begin.record()
            variants[name]()
            end.record()
            end.synchronize()
            if turn >= 2:
                durations[name].append(begin.elapsed_time(end))
    slowest = torch.tensor(list(durations.values()), device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return dict(zip(durations, slowest.tolist(), strict=True))


def median_of_each(durations: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in durations.items()}


def with_gradients(function: Callable, rows: list[torch.Tensor], grad: torch.Tensor) -> list:
    leaves = [x.detach().requires_grad_() for x in rows]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact_dense(q, k, v, **options) -> torch.Tensor:
    """In float64, a block of queries at a time; torch would hold all N x N scores."""
    outputs = []
    for start in range(0, q.shape[2], 1024):
        rows = q[:, :, start : start + 1024]
        reached = slice(0, start + rows.shape[2])
        scores = rows @ k[:, :, reached].mT / q.shape[-1] ** 0.5
        later = torch.arange(reached.stop, device=q.device) > torch.arange(
            start, reached.stop, device=q.device
        ).unsqueeze(-1)
        outputs.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ v[:, :, reached])
    return torch.cat(outputs, dim=2)


def random_rows(n: int, seed: int) -> list[torch.Tensor]:
    """q, k, v and a gradient, alike on all ranks; views of [B, N, H, D] as a model's are."""
    torch.manual_seed(seed)
    return [
        torch.randn(1, n, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(4)
    ]


def layer(output: Path) -> None:
    """The part "layer", on one of the ranks that torchrun started."""
    from torchtitan.models.attention import ScaledDotProductAttentionWrapper

    from torchtitan.models.llama3_lighthouse.infra.context_parallel import apply_context_parallel
    from torchtitan.models.llama3_lighthouse.infra.ring_attention import _Ring
    from torchtitan.models.llama3_lighthouse.job_config import Parallelism

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = int(os.environ["WORLD_SIZE"])
    mesh = dist.init_device_mesh("cuda", (world,))
    own_group = [dist.new_group([rank]) for rank in range(world)][dist.get_rank()]

    def module(config: LighthouseConfig) -> LighthouseAttention:
        sdpa = ScaledDotProductAttentionWrapper()
        sdpa.sdpa_backends = SDPA_BACKENDS
        return LighthouseAttention(config, sdpa)

    def spread(config: LighthouseConfig) -> LighthouseAttention:
        attention = module(config)
        apply_context_parallel([attention], mesh, Parallelism())
        return attention

    record = {"W": world}
    n = 8192 * world
    config = LighthouseConfig(3, 4, 128 * world, picks_per_stratum=32)
    *rows, grad = random_rows(n, 1)
    selection = select(*rows, config)
    whole = with_gradients(module(config), rows, grad)
    attention = spread(config)
    layout = attention.context_parallel
    parts = with_gradients(attention, [layout.take(x, 2) for x in rows], layout.take(grad, 2))
    exact = with_gradients(
        lambda *x: lighthouse_attention(
            *x, config, selection=selection, impl="torch", sdpa=exact_dense
        ),
        [x.double() for x in rows],
        grad.double(),
    )
    record["error: W GPUs, one GPU"] = {
        name: (relative_error(part, layout.take(want, 2)),
               relative_error(layout.take(one, 2), layout.take(want, 2)))
        for name, part, one, want in zip(("out", "dq", "dk", "dv"), parts, whole, exact,
                                         strict=True)
    }  # fmt: skip

    config = LighthouseConfig(3, 4, 1536)
    *rows, grad = random_rows(PER_GPU, 2)
    plain, through = module(config), module(config)
    through.context_parallel = ContextParallel(own_group, 0, 1)
    torch.use_deterministic_algorithms(True)
    record["W = 1 gives the same bits"] = all(
        torch.equal(a, b)
        for a, b in zip(with_gradients(plain, rows, grad), with_gradients(through, rows, grad),
                        strict=True)
    )  # fmt: skip
    torch.use_deterministic_algorithms(False)
    variants = {
        "no context parallelism": lambda: with_gradients(plain, rows, grad),
        "no context parallelism, again": lambda: with_gradients(plain, rows, grad),
        "W = 1": lambda: with_gradients(through, rows, grad),
    }
    record["one GPU, ms"] = median_of_each(time_in_turns(variants, 30))

    config = LighthouseConfig(3, 4, 1536 * world)
    *rows, grad = (layout.take(x, 2).clone() for x in random_rows(PER_GPU * world, 3))
    attention = spread(config)

    def silent(function: Callable) -> Callable:
        def run():
            with (
                patch.object(_Ring, "pass_on", lambda self, tensors: lambda: tensors),
                patch.object(ContextParallel, "exchange", lambda self, rows: rows),
            ):
                return function()

        return run

    def stage(enabled: bool) -> Callable:
        def run():
            attention.enabled = enabled
            return with_gradients(attention, rows, grad)

        return run

    variants = {}
    for name, enabled in (("Lighthouse", True), ("dense", False)):
        variants[name] = stage(enabled)
        variants[f"{name}{NOTHING_SENT}"] = silent(stage(enabled))
    durations = time_in_turns(variants, 30)
    record[f"W GPUs, {PER_GPU:,} tokens each, ms"] = median_of_each(durations)
    # Of the two in the same turn, which have the GPU at the same temperature and clock.
    record["time with sending over without, quartiles"] = {
        name: statistics.quantiles(
            a / b for a, b in zip(times, durations[f"{name}{NOTHING_SENT}"], strict=True)
        )
        for name, times in durations.items()
        if not name.endswith(NOTHING_SENT)
    }
    if dist.get_rank() == 0:
        (output / "layer.json").write_text(json.dumps(record))
    dist.destroy_process_group()


class Job:
    """A training run on some of the GPUs, or a refusal of memory."""

    def __init__(self, folder: Path, gpus: list[int], settings: dict, config: str) -> None:
        line = ["--job.config_file", config, "--job.dump_folder", str(folder)]
        line += [*command_line(settings), "--metrics.log_freq", "1"]
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / "log.txt"
        self.process = subprocess.Popen(
            trainer_command(len(gpus), line),
            stdout=self.log_file.open("a"), stderr=subprocess.STDOUT, preexec_fn=end_with_parent,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
                 "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        )  # fmt: skip

    def steps(self) -> dict[int, dict[str, float]]:
        """What each step logged.

        Raises:
            SystemExit: the run failed.
        """
        if self.process.wait():
            raise SystemExit(f"a run failed:\n{self.log_file.read_text()[-5000:]}")
        return self.logged()

    def logged(self) -> dict[int, dict[str, float]]:
        found = {}
        for match in LINE.finditer(self.log_file.read_text()):
            values = {key: float(text.replace(",", "")) for key, text in match.groupdict().items()}
            found[int(values.pop("step"))] = values
        return found


def largest_difference(steps: dict, expected: dict, key: str) -> float:
    return max(abs(steps[s][key] / expected[s][key] - 1) for s in expected)


def seed_checkpoint(folder: Path, gpus: list[int], settings: dict, small: str) -> str:
    """Weights for all meshes, which initialise differently."""
    settings = {**settings, "checkpoint.create_seed_checkpoint": True}
    Job(folder / "seed", gpus[:1], settings, small).steps()
    return str(folder / "seed/checkpoint/step-0")


def equivalence(folder: Path, gpus: list[int], small: str) -> dict:
    settings = {**SMALL, "training.steps": 10, "training.global_batch_size": 1}
    settings["checkpoint.initial_load_path"] = seed_checkpoint(folder, gpus, settings, small)
    # Beside one GPU's losses, those of another, for what rounding does where order may change; and
    # those of the model not compiled, which rounds the same sums elsewhere.
    variants = {"one": gpus[:1], "again": gpus[1:2], "eager": gpus[:1]}
    jobs = {
        name: Job(folder / name, used, settings | {"compile.enable": name != "eager"}, small)
        for name, used in variants.items()
    }
    expected, repeated, otherwise = (job.steps() for job in jobs.values())
    spread = {"parallelism.context_parallel_degree": len(gpus)}
    steps = Job(folder / "all", gpus, {**settings, **spread}, small).steps()
    return {
        "losses, one GPU": [expected[s]["loss"] for s in sorted(expected)],
        "losses, W GPUs": [steps[s]["loss"] for s in sorted(steps)],
        **{
            f"largest relative difference of {key} from one GPU": {
                "W GPUs": largest_difference(steps, expected, key),
                "one GPU, not compiled": largest_difference(otherwise, expected, key),
                "another GPU alone": largest_difference(repeated, expected, key),
            }
            for key in ("loss", "grad_norm")
        },
    }


def resume(folder: Path, gpus: list[int], small: str) -> dict:
    settings = {**SMALL, "training.global_batch_size": len(gpus), "lr_scheduler.total_steps": 9,
                "compile.enable": False}  # fmt: skip
    settings["checkpoint.initial_load_path"] = seed_checkpoint(folder, gpus, settings, small)
    one = Job(folder / "one", gpus[:1], {**settings, "training.steps": 9}, small)
    changing = folder / "changing"
    for last, used, degree in ((3, gpus, 1), (6, gpus, len(gpus)), (9, gpus[:1], 1)):
        spread = {"training.steps": last, "parallelism.context_parallel_degree": degree}
        steps = Job(changing, used, {**settings, **spread}, small).steps()
    one = one.steps()
    return {
        "meshes": f"steps 1-3: FSDP {len(gpus)}; 4-6: context {len(gpus)}; 7-9: one GPU",
        "losses, one GPU throughout": [one[s]["loss"] for s in sorted(one)],
        "losses, changing": [steps[s]["loss"] for s in sorted(steps)],
        "largest relative difference of loss": largest_difference(steps, one, "loss"),
    }


def medians(steps: dict, first: int, last: int) -> dict[str, float]:
    chosen = [values for step, values in steps.items() if first <= step <= last]
    return {key: statistics.median(v[key] for v in chosen) for key in ("tps", "mfu", "GiB")}


def training(folder: Path, gpus: list[int], large: str, short: bool = False) -> list[dict]:
    """270M at 98,304 tokens a GPU: one length on W GPUs and on each; ``short``: on each its own."""
    w = len(gpus)
    long = {"training.seq_len": PER_GPU * w, "lighthouse.top_k": 1536 * w}
    spread = {**long, "parallelism.context_parallel_degree": w}
    shared = {**LARGE, "training.steps": 11, "lighthouse.dense_from_step": 8,
              "lr_scheduler.warmup_steps": 4, "activation_checkpoint.mode": "lighthouse",
              "activation_checkpoint.keep_products": [KEPT_PRODUCT]}  # fmt: skip
    rows = []
    # Alone, every GPU takes the work at the same time: they differ, and together they wait for the
    # slowest.
    alone = [[gpu] for gpu in gpus]
    cases = [("together", [gpus], spread), ("alone", alone, long)]
    for name, sets, changed in [("short", alone, {})] if short else cases:
        jobs = [
            Job(folder / f"{name}{number}", used, {**shared, **changed}, large)
            for number, used in enumerate(sets)
        ]
        steps_of_jobs = [job.steps() for job in jobs]
        for stage, first, last in (("Lighthouse", 4, 8), ("dense", 10, 11)):
            measured = [medians(steps, first, last) for steps in steps_of_jobs]
            slowest = min(measured, key=lambda values: values["tps"])
            rows.append({"stage": stage, "GPUs": len(sets[0]), **slowest,
                         "N": changed.get("training.seq_len", PER_GPU),
                         "checkpointing": f"lighthouse: {KEPT_PRODUCT}",
                         "tps of each": [values["tps"] for values in measured]})  # fmt: skip
    return rows


def length_and_method(case: str) -> tuple[int, LighthouseConfig]:
    """Of N,L,p,k.

    Raises:
        ValueError: these are not four numbers, or those of the method break a rule.
    """
    if not re.fullmatch(r"\d+(,\d+){3}", case):
        raise ValueError(f"not N,L,p,k, four numbers such as {LENGTHS[0]}")
    n, *method = map(int, case.split(","))
    return n, LighthouseConfig(*method)


def longest(
    folder: Path, gpus: list[int], large: str, lengths: list[str], steps: int
) -> list[dict]:
    """Some steps of the Lighthouse stage at each length, until one does not fit."""
    rows = []
    for case in lengths:
        n, method = length_and_method(case)
        settings = {
            **LARGE, "lighthouse.stage": "lighthouse", "lighthouse.levels": method.levels,
            "lighthouse.pooling_factor": method.pooling_factor, "lighthouse.top_k": method.top_k,
            "training.seq_len": n, "training.steps": steps,
            "activation_checkpoint.mode": "lighthouse",
            "activation_checkpoint.keep_products": [],
            "activation_checkpoint.offload_inputs": True,
            "parallelism.context_parallel_degree": len(gpus),
        }  # fmt: skip
        job = Job(folder / f"{n}", gpus, settings, large)
        failed, logged = job.process.wait(), job.logged()
        if failed and "out of memory" not in job.log_file.read_text():
            raise SystemExit(job.log_file.read_text()[-5000:])
        fits = not failed and steps in logged
        measured = logged[steps] if fits else {}
        if steps == 1:
            measured = {key: measured[key] for key in measured if key not in ("tps", "mfu")}
        rows.append({"case": case, "stage": "Lighthouse", "GPUs": len(gpus), "N": n, "fits": fits,
                     "checkpointing": "lighthouse, inputs offloaded", "steps": steps,
                     **measured})  # fmt: skip
        print(rows[-1], flush=True)
        if not fits:
            break
    return rows


def table(run: dict) -> str:
    lines = [f"{run['GPUs']} x {run['GPU']}, torch {run['torch']}, NCCL {run['NCCL']}. bf16.", ""]
    parts = (f"{part}: {origin}" for part, origin in run["measured"].items())
    lines += [f"Measured at revision ({'; '.join(parts)}).", ""]
    for part in ("layer", "equivalence", "resume"):
        if part in run:
            lines += [f"**{part}**", ""]
            lines += [f"- {key}: {json.dumps(value)}" for key, value in run[part].items()]
            lines.append("")
    rows = [row for part in ("training", "short", "longest") for row in run.get(part, [])]
    if rows:
        lines += ["| stage | GPUs | N | checkpointing | tokens/s and GPU | MFU | GiB a GPU |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        speed = f"{row['tps']:,.0f} | {row['mfu']:.1f}%" if "tps" in row else " | "
        measured = f"{speed} | " + (f"{row['GiB']:.1f}" if "GiB" in row else "does not fit")
        lines.append(f"| {row['stage']} | {row['GPUs']} | {row['N']:,} | {row['checkpointing']} | "
                     f"{measured} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(run: dict, path: Path) -> None:
    """Tokens/s for each GPU over the context length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    figure, axis = plt.subplots(figsize=(8, 5))
    rows = run.get("training", []) + run.get("short", [])
    longest = [row for row in run.get("longest", []) if "tps" in row]
    for stage, colour in (("Lighthouse", "tab:blue"), ("dense", "tab:orange")):
        for gpus in sorted({row["GPUs"] for row in rows}):
            points = sorted(
                (r["N"], r["tps"]) for r in rows if (r["stage"], r["GPUs"]) == (stage, gpus)
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-" if gpus == 1 else "s--", color=colour,
                          label=f"{stage}, {gpus} GPU{'s' * (gpus > 1)}")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="context length N, tokens",
             ylabel="tokens/s for each GPU", title=f"Training 270M on {run['GPU']}")  # fmt: skip
    if longest:
        axis.plot(*zip(*((row["N"], row["tps"]) for row in longest), strict=True), "*",
                  color="tab:blue", markersize=12, label=f"Lighthouse, {longest[0]['GPUs']} GPUs, "
                  "other levels and checkpointing")  # fmt: skip
    ticks = sorted({row["N"] for row in rows + longest})
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=25, ha="right")
    axis.set_xticks([], minor=True)
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = ("layer", "equivalence", "resume", "training", "short", "longest")
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--gpus", type=int, help="default: all")
    parser.add_argument("--lengths", nargs="+", metavar="N,L,p,k", default=LENGTHS)
    parser.add_argument("--steps", type=int, default=2, help="of the part longest")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--name", default="context_parallel", help="stem of the files written")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--revision", help="git revision to record; default: as git says")
    parser.add_argument("--layer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layer:
        return layer(arguments.output)
    count = torch.cuda.device_count() if arguments.gpus is None else arguments.gpus
    if not 2 <= count <= torch.cuda.device_count():
        sys.exit(f"needs two or more GPUs, {count} to be used of {torch.cuda.device_count()} here")
    for case in arguments.lengths:
        try:
            n, method = length_and_method(case)
            PyramidGeometry(method, n)
        except ValueError as error:
            sys.exit(f"--lengths {case}: {error}")
    if arguments.steps < 1:
        sys.exit(f"--steps {arguments.steps} trains nothing; use 1 or more")
    if arguments.output.exists() and not arguments.output.is_dir():
        sys.exit(f"--output {arguments.output} is no folder; name one to write to")
    if arguments.plot and find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib; install the extra 'benchmark'")
    gpus = list(range(count))
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{arguments.name}.json"
    found = environment(arguments.revision)
    origin = f"{found.pop('revision')}, {found.pop('date')}"
    run = {
        "measured": {},
        **(json.loads(path.read_text()) if path.exists() else {}),
        **found,
        "GPUs": count,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }
    configs = Path(__file__).parents[2] / "train_configs"
    small, large = str(configs / "debug_cpu.toml"), str(configs / "270m_98k.toml")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for part in arguments.parts:
            print(f"part {part}", flush=True)
            measured = origin
            if part == "layer":
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command += ["--nproc-per-node", str(count), __file__, "--layer"]
                command += ["--output", str(folder)]
                subprocess.run(command, check=True, preexec_fn=end_with_parent)
                run[part] = json.loads((folder / "layer.json").read_text())
            elif part == "equivalence":
                run[part] = equivalence(folder / part, gpus, small)
            elif part == "resume":
                run[part] = resume(folder / part, gpus, small)
            elif part in ("training", "short"):
                run[part] = training(folder / part, gpus, large, short=part == "short")
            else:
                tried = longest(folder / part, gpus, large, arguments.lengths, arguments.steps)
                # Other cases stay, each with its origin: it may need a call of its own.
                rows = {row["case"]: row for row in run.get(part, [])}
                rows |= {row["case"]: {**row, "measured": origin} for row in tried}
                run[part] = sorted(rows.values(), key=lambda row: row["N"])
                measured = " and ".join(dict.fromkeys(row["measured"] for row in run[part]))
            run["measured"][part] = measured
            shutil.rmtree(folder / part, ignore_errors=True)
            path.write_text(json.dumps(run, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(run))
            print(table(run), flush=True)
    if arguments.plot:
        plot(run, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
