"""Checks of what a run or a command writes: its folders, and who is to take its metrics."""

import importlib.util
import os
import tempfile
from pathlib import Path

from ..console import LOG_FILE
from ..errors import UserFileError, UserValueError
from ..job_config import JobConfig
from ..metrics import METRICS_FILE
from ..processes import LOCK_FILE


def check_output_of_run(config: JobConfig) -> None:
    """Check that a run can write what it will write, and that its loggers are installed.

    Raises:
        ValueError: a package is missing.
        OSError: a folder cannot be written to.
    """
    _check_metrics(config)
    _check_folders(config)


def _check_metrics(config: JobConfig) -> None:
    """Check that what the metrics are to be sent to is installed."""
    extra = {"wandb": "trainer,wandb", "tensorboard": "trainer"}
    for package, name in extra.items():
        key = f"metrics.enable_{package}"
        if getattr(config.metrics, f"enable_{package}") and not is_installed(package):
            raise UserValueError(
                f"{key} = true needs the package {package}, which is missing; run pip install "
                f"'lighthouse-attention[{name}]', or pip install -e '.[{name}]' in a clone, or "
                f"pass --metrics.no-enable_{package}"
            )


def is_installed(module: str) -> bool:
    """Whether Python finds a module. Only its parent packages are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def _check_folders(config: JobConfig) -> None:
    """Check that each folder can be written to, or made; making it is left to the run."""
    dump = Path(config.job.dump_folder)
    _check_folder("job.dump_folder", config.job.dump_folder, dump)
    used = {"comm.save_traces_folder": config.comm.trace_buf_size > 0}
    used["checkpoint.folder"] = config.checkpoint.enable
    metrics, profiling = config.metrics, config.profiling
    used["metrics.save_tb_folder"] = metrics.enable_tensorboard or metrics.enable_wandb
    used["profiling.save_traces_folder"] = profiling.enable_profiling
    used["profiling.save_memory_snapshot_folder"] = profiling.enable_memory_snapshot
    for key in (key for key, is_used in used.items() if is_used):
        section, _, name = key.partition(".")
        folder = getattr(getattr(config, section), name)
        _check_folder(key, folder, dump / folder)
        _check_name(key, folder)
    if file := config.job.save_config_file:
        _check_name("job.save_config_file", file)
        _check_folder("job.save_config_file", file, (dump / file).parent)
        if (dump / file).is_dir():
            raise UserFileError(
                f"job.save_config_file = '{file}' is a folder; pass --job.save_config_file FILE"
            )


def _check_name(key: str, given: str) -> None:
    """Refuse a path that is, or lies below, a file that each run writes to its folder."""
    first = Path(os.path.normpath(given)).parts[:1]
    if first and first[0] in (METRICS_FILE, LOG_FILE, LOCK_FILE):
        raise UserFileError(
            f"{key} = '{given}' is in the place of {first[0]}, a file that each run writes; pass "
            f"--{key} with another name"
        )


def _check_folder(key: str, given: str, folder: Path) -> None:
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise UserFileError(
            f"{key} = '{given}' cannot be written to ({error.filename or folder}: "
            f"{error.strerror}); pass --{key} FOLDER with one that can"
        ) from None


def check_output(folder: Path) -> None:
    """Check that a command can write to its ``--output``, and make the folder if need be.

    Raises:
        OSError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserFileError(
            f"--output {folder} cannot be written to ({error.strerror}); pass --output FOLDER with "
            "one that can"
        ) from None
