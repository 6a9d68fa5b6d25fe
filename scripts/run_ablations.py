#!/usr/bin/env python3
"""Train every configuration of a grid, one after the other, and set the results side by side.

    python scripts/run_ablations.py train_configs/ablations/debug.toml

A grid is a TOML file:

    config = "../270m_98k.toml"       # what all runs start from, relative to the grid's file

    [fixed]                           # any section.key, for every run
    lighthouse.levels = 3

    [grid]                            # any section.key with a list of values: all combinations run
    lighthouse.top_k = [1536, 2048]
    lighthouse.pooling_factor = [2, 4]

With several [[grid]] tables, the combinations of each run. Those that do not fit together are
skipped, with the reason. A run that finished is not repeated when the command is given again; one
that was interrupted goes on from its last checkpoint, if its configuration saves any. Further
arguments, --section.key value, go to every run.

Runs use the GPUs that CUDA_VISIBLE_DEVICES leaves visible, so sweeps on other GPUs and in other
output folders may run at the same time.

Writes to OUTPUT: a folder for each run with its log, its checkpoints and metrics.jsonl; the table
as results.csv and results.md, after every run; and, unless --no-plots, loss_curves.png and
loss_and_throughput.png, which needs the extra "benchmark" (pip install -e '.[benchmark]').
"""

import argparse
import copy
import ctypes
import fcntl
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, TextIO

from ablation_results import Run, plot, summarise, value_of, write_tables

from torchtitan.models.llama3_lighthouse import flavors
from torchtitan.models.llama3_lighthouse.checks import check_config
from torchtitan.models.llama3_lighthouse.job_config import (
    JobConfig,
    LighthouseConfigManager,
    check_toml,
)

STEP_LINE = re.compile(r"(?<!validate )step: *(\d+) +loss: *(\S+).*?tps: *(\S+)")
ERROR_LINE = re.compile(r" - ERROR - (.+)")
SECONDS_BETWEEN_LINES = 10.0
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def flatten(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested TOML tables as section.key to value."""
    flat = {}
    for key, value in tables.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat


def command_line(settings: dict[str, Any]) -> list[str]:
    """``settings`` as the trainer's flags."""
    line = []
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if isinstance(value, bool):
            line.append(f"--{section}.{name}" if value else f"--{section}.no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            line += [f"--{key}", *map(str, values)]
    return line


def name_of(settings: dict[str, Any]) -> str:
    """A folder's name that tells the combination."""
    parts = (f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
    return re.sub(r"[^\w.,=-]+", "_", ",".join(parts))


def read_grid(path: Path) -> tuple[Path, dict[str, Any], list[dict[str, list]]]:
    """The base configuration, the fixed settings and the grids of a file.

    Raises:
        ValueError, TypeError, OSError: the file is no grid.
    """
    with path.open("rb") as file:
        try:
            tables = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
    unknown = tables.keys() - {"config", "fixed", "grid"}
    if unknown or not isinstance(tables.get("config"), str):
        raise ValueError(
            f'{path} must hold config = "FILE", [grid] and, if needed, [fixed], nothing else; it '
            f"holds {', '.join(tables) or 'nothing'}"
        )
    base = path.parent / tables["config"]
    if not base.is_file():
        raise ValueError(f"{path}: config = '{tables['config']}' is no file ({base})")
    grids = tables.get("grid") or [{}]
    grids = grids if isinstance(grids, list) else [grids]
    if not all(isinstance(table, dict) for table in (tables.get("fixed", {}), *grids)):
        raise TypeError(f"{path}: fixed and grid must be tables; write [fixed] and [grid]")
    fixed, grids = flatten(tables.get("fixed", {})), [flatten(grid) for grid in grids]
    for grid in grids:
        if not grid:
            raise ValueError(f"{path}: [grid] is missing or empty; give it a section.key = [VALUE]")
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise TypeError(f"{path}: grid.{key} must be a list of values, got {values!r}")
    for key in fixed.keys() & set.intersection(*map(set, grids)):
        raise ValueError(f"{path}: {key} is in [fixed] and in every [grid]; remove one of them")
    bare = [key for each in (fixed, *grids) for key in each if "." not in key]
    if bare:
        raise ValueError(f"{path}: '{bare[0]}' names no section; write section.{bare[0]}")
    return base, fixed, grids


def expand(path: Path, output: Path, extra: list[str]) -> list[Run]:
    """Every combination of the grids in ``path``, in order, refused ones included.

    Raises:
        ValueError, TypeError, OSError: the file is no grid, or ``extra`` overrides it.
    """
    base, fixed, grids = read_grid(path)
    given = {word[2:].partition("=")[0].replace(".no-", ".") for word in extra if word[:2] == "--"}
    if clash := given & {key for grid in grids for key in grid}:
        raise ValueError(f"--{min(clash)} would override {path}, whose [grid] varies it")
    check_toml(JobConfig, _nested(fixed))
    common = ["--job.config_file", str(base), *command_line(fixed), *extra]
    # The sweep's folder, for checking makes it and a refused run needs none.
    common_config = LighthouseConfigManager().parse_args([*common, f"--job.dump_folder={output}"])
    runs: list[Run] = []
    for grid in grids:
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            check_toml(JobConfig, _nested(settings))
            config = copy.deepcopy(common_config)
            for key, value in settings.items():
                section, _, name = key.rpartition(".")
                setattr(value_of(config, section), name, value)
            refusal = None
            try:
                check_config(config, flavors)
            except (ValueError, TypeError) as error:
                refusal = str(error)
            folder = output / name_of(settings)
            arguments = [*common, *command_line(settings), f"--job.dump_folder={folder}"]
            runs.append(Run(settings, arguments, folder, config, refusal))
    for one, other in itertools.combinations(runs, 2):
        if one.folder == other.folder or record_of(one.config) == record_of(other.config):
            raise ValueError(
                f"{path}: {one.name} and {other.name} are the same configuration; remove one"
            )
    return runs


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        table = tables
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return tables


def record_of(config: JobConfig) -> str:
    """All of a configuration that a run depends on."""
    return json.dumps({k: v for k, v in config.to_dict().items() if k != "job"}, indent=1)


def train(run: Run, processes: int, title: str, lock: TextIO) -> int:
    """Train it through torchrun, show how far it is, and return the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(processes)]
    command += ["--local-ranks-filter", "0", "--role", "rank", "--tee", "3"]
    command += ["-m", "torchtitan.models.llama3_lighthouse.train", *run.arguments]
    command += ["--metrics.disable_color_printing"]
    shown = 0.0
    with (
        (run.folder / "log.txt").open("a", buffering=1) as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ},
            # However this process ends, the run ends with it; until then it keeps the lock.
            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            pass_fds=[lock.fileno()],
        ) as process,
    ):
        try:
            for line in process.stdout:
                log.write(line)
                match = STEP_LINE.search(line)
                if match and time.monotonic() - shown > SECONDS_BETWEEN_LINES:
                    step, loss, speed = match.groups()
                    print(f"{title}: step {step} of {run.config.training.steps}, loss {loss}, "
                          f"{speed} tokens/s", flush=True)  # fmt: skip
                    shown = time.monotonic()
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def begin(run: Run) -> bool:
    """Make its folder; whether there is anything left to do in it.

    Raises:
        ValueError: the folder holds a run of another configuration.
    """
    record, config = run.folder / "config.json", record_of(run.config)
    if record.exists() and record.read_text() != config:
        before, now = json.loads(record.read_text()), json.loads(config)
        differing = [f"{section}.{key}" for section, values in now.items() for key in values
                     if before.get(section, {}).get(key) != values[key]]  # fmt: skip
        raise ValueError(
            f"{run.folder} holds a run with another {', '.join(differing) or 'configuration'}; "
            "pass --output FOLDER with one of its own, or remove it"
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    record.write_text(config)
    return not (run.folder / "finished").exists()


def sweep(runs: list[Run], processes: int, output: Path, lock: TextIO) -> list[str]:
    """Train what has not finished, keep the tables up to date, return the names of failed runs."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    to_do = [run for run in runs if begin(run)]
    print(f"{len(runs)} runs, {len(runs) - len(to_do)} of them finished earlier", flush=True)
    failed = []
    for run in to_do:
        title = f"[{runs.index(run) + 1}/{len(runs)}] {run.name}"
        print(f"{title}: begins", flush=True)
        start = time.monotonic()
        code = train(run, processes, title, lock)
        if code:
            failed.append(run.name)
            log = run.folder / "log.txt"
            reasons = ERROR_LINE.findall(log.read_text(errors="replace"))
            reason = f": {reasons[-1]}" if reasons else ""
            print(f"{title}: failed with exit code {code}{reason}; see {log}",
                  file=sys.stderr, flush=True)  # fmt: skip
            continue
        (run.folder / "finished").touch()
        write_tables([summarise(each, keys) for each in finished(runs)], output)
        print(f"{title}: done in {time.monotonic() - start:.0f} s", flush=True)
    return failed


def finished(runs: list[Run]) -> list[Run]:
    return [run for run in runs if (run.folder / "finished").exists()]


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="TOML file of the grid")
    parser.add_argument("--output", type=Path, help="default: outputs/ablations/NAME_OF_GRID")
    parser.add_argument("--processes", type=int, default=1, help="of each run, on this machine")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--no-plots", action="store_true")
    arguments, extra = parser.parse_known_args()
    if not arguments.no_plots and not importlib.util.find_spec("matplotlib"):
        raise ValueError("plots need matplotlib: pip install -e '.[benchmark]', or pass --no-plots")
    arguments.output = arguments.output or Path("outputs/ablations", arguments.grid.stem)
    return arguments, extra


def run_grid() -> None:
    """What the command does.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    arguments, extra = parse_arguments()
    output = arguments.output
    runs = expand(arguments.grid, output, extra)
    for run in runs:
        if run.refusal:
            print(f"skipping {run.name}: {run.refusal}")
    runs = [run for run in runs if not run.refusal]
    if not runs:
        sys.exit(f"no combination of {arguments.grid} can run, for the reasons above")
    if arguments.list:
        print("\n".join(run.name for run in runs))
        return
    with (output / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{output} is in use by another sweep, or one that is just ending; wait for it, or "
                "pass --output FOLDER"
            ) from None
        failed = sweep(runs, arguments.processes, output, lock)
    done = finished(runs)
    if done:
        keys = list(dict.fromkeys(key for run in runs for key in run.settings))
        rows = [summarise(run, keys) for run in done]
        write_tables(rows, output)
        print((output / "results.md").read_text())
        if not arguments.no_plots:
            plot(done, rows, output)
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def main() -> None:
    try:
        run_grid()
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
