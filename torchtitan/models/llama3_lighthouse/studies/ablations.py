"""Train every configuration of a grid, and set the results side by side."""

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

from ..checks.configuration import check_config
from ..checks.output import check_output
from ..command_line import keys_given
from ..errors import UserTypeError, UserValueError
from ..evaluation.progress import say, say_what_was_written
from ..evaluation.tables import Row
from ..job_config import JobConfig, LighthouseConfigManager, check_toml, flatten
from ..model.flavors import flavors
from .ablation_results import plot, summarise, write_tables
from .settings import command_line, nested, record_of, with_settings
from .sweeps import (
    Environment,
    Run,
    SweepOptions,
    finished,
    lock_folder,
    raise_if_failed,
    sweep,
    train,
)


def name_of(settings: dict[str, Any]) -> str:
    """A folder's name that says which combination it holds."""
    parts = (f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
    return re.sub(r"[^\w.,=-]+", "_", ",".join(parts))


def read_grid(path: Path) -> tuple[Path, dict[str, Any], list[dict[str, list]]]:
    """The base configuration, the fixed settings and the grids of a file.

    Raises:
        ValueError, TypeError, OSError: the file does not describe a grid.
    """
    if not path.is_file():
        raise UserValueError(f"no such grid: {path}; pass a TOML file")
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
        ValueError, TypeError, OSError: the file does not describe a grid, or ``extra`` overrides
            what it varies.
    """
    base, fixed, grids = read_grid(path)
    check_output(output)
    if clash := keys_given(extra) & {key for grid in grids for key in grid}:
        raise UserValueError(f"--{min(clash)} would override {path}, whose [grid] varies it")
    check_toml(JobConfig, nested(fixed))
    common = ["--job.config_file", str(base), *command_line(fixed), *extra]
    # The checks ask whether the sweep's folder can be written to. It holds the folders of the runs.
    common_config = LighthouseConfigManager().parse_args([*common, f"--job.dump_folder={output}"])
    runs: list[Run] = []
    for grid in grids:
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            check_toml(JobConfig, nested(settings))
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
    """Raise ``UserValueError`` if the steps that are logged do not stand for the others."""
    every, log_freq = config.lighthouse.dense_every, config.metrics.log_freq
    if every and log_freq > 1:
        raise UserValueError(
            f"metrics.log_freq = {log_freq} logs too few or too many of the dense steps that "
            f"lighthouse.dense_every = {every} makes; pass --metrics.log_freq 1"
        )


def run_grid(grid: Path, options: SweepOptions, extra: list[str]) -> None:
    """Train what has not finished of a grid, write the tables after every run, and plot.

    Args:
        grid: the TOML file.
        extra: overrides for every run.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
        RunsFailed: some runs failed; the others have finished.
    """
    slots, output = options.slots(), options.output
    runs = expand(grid, output, extra)
    for run in runs:
        if run.refusal:
            say(f"skipping {run.name}: {run.refusal}")
    runs = [run for run in runs if not run.refusal]
    if not runs:
        raise UserValueError(f"no combination of {grid} can run, for the reasons above")
    if options.only_list:
        print("\n".join(run.name for run in runs))
        return
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))

    def tabulate() -> list[Row]:
        rows = [summarise(run, keys) for run in finished(runs)]
        if rows:
            write_tables(rows, output)
        return rows

    def train_run(run: Run, title: str, environment: Environment) -> int:
        return train(run, options.processes, title, environment, lock)

    with lock_folder(output) as lock:
        failed = sweep(runs, train_run, tabulate, slots)
    if rows := tabulate():
        print((output / "results.md").read_text())
        if options.plots:
            plot(finished(runs), rows, output)
        figures = ("loss_curves.png", "loss_and_throughput.png")
        say_what_was_written(output, "results.md", "results.csv", *figures)
    raise_if_failed(failed, runs)
