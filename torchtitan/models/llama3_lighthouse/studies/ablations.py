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
import itertools
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from lighthouse_commands.arguments import run_command

from ..checks import check_config
from ..errors import UserTypeError, UserValueError
from ..job_config import (
    JobConfig,
    LighthouseConfigManager,
    check_toml,
)
from ..model.flavors import flavors
from .ablation_results import plot, summarise, write_tables
from .sweeps import (
    Run,
    command_line,
    finished,
    keys_given,
    lock_folder,
    parse_sweep,
    record_of,
    sweep,
    train,
    with_settings,
)


def flatten(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested TOML tables as section.key to value."""
    flat = {}
    for key, value in tables.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat


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
            raise UserValueError(f"{path} is not TOML: {error}") from None
    unknown = tables.keys() - {"config", "fixed", "grid"}
    if unknown or not isinstance(tables.get("config"), str):
        raise UserValueError(
            f'{path} must hold config = "FILE", [grid] and, if needed, [fixed], nothing else; it '
            f"holds {', '.join(tables) or 'nothing'}"
        )
    base = path.parent / tables["config"]
    if not base.is_file():
        raise UserValueError(f"{path}: config = '{tables['config']}' is no file ({base})")
    grids = tables.get("grid") or [{}]
    grids = grids if isinstance(grids, list) else [grids]
    if not all(isinstance(table, dict) for table in (tables.get("fixed", {}), *grids)):
        raise UserTypeError(f"{path}: fixed and grid must be tables; write [fixed] and [grid]")
    fixed, grids = flatten(tables.get("fixed", {})), [flatten(grid) for grid in grids]
    for grid in grids:
        if not grid:
            raise UserValueError(
                f"{path}: [grid] is missing or empty; give it a section.key = [VALUE]"
            )
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UserTypeError(f"{path}: grid.{key} must be a list of values, got {values!r}")
    for key in fixed.keys() & set.intersection(*map(set, grids)):
        raise UserValueError(f"{path}: {key} is in [fixed] and in every [grid]; remove one of them")
    bare = [key for each in (fixed, *grids) for key in each if "." not in key]
    if bare:
        raise UserValueError(f"{path}: '{bare[0]}' names no section; write section.{bare[0]}")
    return base, fixed, grids


def expand(path: Path, output: Path, extra: list[str]) -> list[Run]:
    """Every combination of the grids in ``path``, in order, refused ones included.

    Raises:
        ValueError, TypeError, OSError: the file is no grid, or ``extra`` overrides it.
    """
    base, fixed, grids = read_grid(path)
    if clash := keys_given(extra) & {key for grid in grids for key in grid}:
        raise UserValueError(f"--{min(clash)} would override {path}, whose [grid] varies it")
    check_toml(JobConfig, _nested(fixed))
    common = ["--job.config_file", str(base), *command_line(fixed), *extra]
    # The sweep's folder, for checking makes it and a refused run needs none.
    common_config = LighthouseConfigManager().parse_args([*common, f"--job.dump_folder={output}"])
    runs: list[Run] = []
    for grid in grids:
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            check_toml(JobConfig, _nested(settings))
            config = with_settings(common_config, settings)
            refusal = None
            try:
                check_config(config, flavors)
                _check_logging(config)
            except (UserValueError, UserTypeError) as error:
                refusal = str(error)
            folder = output / name_of(settings)
            arguments = [*common, *command_line(settings), f"--job.dump_folder={folder}"]
            runs.append(Run(settings, arguments, folder, config, refusal))
    for one, other in itertools.combinations(runs, 2):
        if one.folder == other.folder or record_of(one.config) == record_of(other.config):
            raise UserValueError(
                f"{path}: {one.name} and {other.name} are the same configuration; remove one"
            )
    return runs


def _check_logging(config: JobConfig) -> None:
    """Raises: ValueError: the steps that are logged do not stand for the others."""
    every, log_freq = config.lighthouse.dense_every, config.metrics.log_freq
    if every and log_freq > 1:
        raise UserValueError(
            f"metrics.log_freq = {log_freq} logs steps under another mixture of attention than the "
            f"one that lighthouse.dense_every = {every} makes; pass --metrics.log_freq 1"
        )


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        table = tables
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return tables


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="TOML file of the grid")
    parser.add_argument("--output", type=Path, help="default: outputs/ablations/NAME_OF_GRID")
    arguments, extra = parse_sweep(parser)
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
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))

    def tabulate() -> list[dict[str, Any]]:
        rows = [summarise(run, keys) for run in finished(runs)]
        if rows:
            write_tables(rows, output)
        return rows

    def train_run(run: Run, title: str, environment: dict[str, str]) -> int:
        return train(run, arguments.processes, title, environment, lock)

    with lock_folder(output) as lock:
        failed = sweep(runs, train_run, tabulate, arguments.slots)
    if rows := tabulate():
        print((output / "results.md").read_text())
        if not arguments.no_plots:
            plot(finished(runs), rows, output)
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def main() -> None:
    run_command(run_grid)


if __name__ == "__main__":
    main()
