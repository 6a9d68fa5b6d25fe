"""Checkpoints: upstream's manager, made to refuse whatever would lose work."""

import re
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpoint import (
    DATALOADER,
    MODEL,
    TRAIN_STATE,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.tools.logging import logger

from ..data.packing import check_dataloader_state
from ..errors import UserFileError, UserValueError
from .record import CheckpointRecord, read_record, write_record
from .resume import check_settings


def checkpoints_in(folder: str | Path) -> dict[int, tuple[Path, bool]]:
    """Every checkpoint below ``folder``, in order: step -> (path, whether it is complete).

    A save writes the metadata last, so a folder without metadata was cut off.
    """
    found = {}
    for path in Path(folder).glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            markers = (".metadata", "model.safetensors.index.json", "model.safetensors")
            complete = any((path / marker).is_file() for marker in markers)
            found[int(match.group(1))] = (path, complete)
    return dict(sorted(found.items()))


@contextmanager
def in_one_process() -> Generator[None]:
    """Read or write a checkpoint in a single process without torch's warning about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def check_shapes(path: Path, model_state: dict[str, torch.Tensor]) -> None:
    """Check that a checkpoint holds every tensor of a model's state dict, in its shape.

    Raises:
        ValueError: the checkpoint belongs to another model.
    """
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    for name, tensor in model_state.items():
        entry = stored.get(name)
        shape = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if shape != tuple(tensor.shape):
            held = f"has shape {shape}" if shape else "is missing"
            raise UserValueError(
                f"checkpoint {path} is of another model: its '{name}' {held}, this run's has "
                f"shape {tuple(tensor.shape)}; set model.flavor to that of the checkpoint, or "
                "pass another checkpoint folder"
            )


class LighthouseCheckpointManager(CheckpointManager):
    """Refuses to overwrite a checkpoint, load one that does not fit, or lose the data's position.

    Every checkpoint gets a ``CheckpointRecord``. The trainer sets ``config`` for it and keeps
    ``last_lighthouse_step`` up to date. The manager calls ``on_saved`` with the seconds for which
    each save held up training.
    """

    on_saved: Callable[[float], None] | None = None
    config: dict[str, Any]
    last_lighthouse_step: int | None = 0

    def load(self, step: int = -1) -> bool:
        path = self._check_before_load(step) if self.enable else None
        loaded = super().load(step)
        if loaded:
            logger.info(f"Goes on from {path or self.initial_load_path or self.folder}")
        elif self.enable:
            logger.info(f"Begins from scratch: no checkpoint in {self.folder}")
        if path is not None and loaded and self.states[TRAIN_STATE].step > 0:
            record = read_record(path)
            self.last_lighthouse_step = record.last_lighthouse_step if record else None
        return loaded

    def save(self, curr_step: int, last_step: bool = False) -> None:
        if not self._should_save(curr_step, last_step):
            return
        start = time.monotonic()
        path, complete = checkpoints_in(self.folder).get(curr_step, (None, False))
        if complete:
            raise UserFileError(
                f"{path} already holds a complete checkpoint and is not overwritten; "
                "pass --checkpoint.folder NAME for a new one, or move the old one away"
            )
        if dist.get_rank() == 0:
            # The record comes first, so that every complete checkpoint has one.
            self._write_record(curr_step)
        super().save(curr_step, last_step)
        seconds = time.monotonic() - start
        name = f"Checkpoint {self._create_checkpoint_id(curr_step)}"
        if self.async_mode == AsyncMode.DISABLED:
            logger.info(f"{name} saved in {seconds:.1f} s")
        else:
            logger.info(f"{name} is being saved; this held training up for {seconds:.1f} s")
        if self.on_saved:
            self.on_saved(seconds)

    def save_now(self, step: int) -> None:
        """Save a full checkpoint of ``step``, whatever the interval, and wait until it is written.

        A checkpoint of this step that is complete stays as it is.
        """
        self._async_wait()
        if self.load_only or checkpoints_in(self.folder).get(step, (None, False))[1]:
            return
        mode, interval = self.async_mode, self.interval
        self.async_mode, self.interval = AsyncMode.DISABLED, 1
        try:
            self.save(step)
        finally:
            self.async_mode, self.interval = mode, interval

    def _write_record(self, step: int) -> None:
        record = CheckpointRecord(step, self.last_lighthouse_step, self.config)
        write_record(self._create_checkpoint_id(step), record)

    def _check_before_load(self, step: int) -> Path | None:
        """The checkpoint that ``load`` will read; None if there is none or it is in HF's format.

        Raises:
            ValueError: the checkpoint is missing, incomplete, of another model or data, or older
                than others that training on would overwrite.
        """
        existing = checkpoints_in(self.folder)
        complete = [number for number, (_, whole) in existing.items() if whole]
        for path in (path for path, whole in existing.values() if not whole):
            logger.warning(f"{path} is incomplete (its save was cut off) and is left out.")

        if not Path(self.folder).exists():
            if not self.initial_load_path or self.initial_load_in_hf:
                return None
            path = Path(self.initial_load_path)
            self._check_fits(path, self.initial_load_model_only)
            self._check_settings(path, elsewhere=True, weights_only=self.initial_load_model_only)
            return path
        if not complete:
            if self.initial_load_path:
                raise UserValueError(
                    f"checkpoint.folder {self.folder} exists but holds no complete checkpoint, and "
                    "checkpoint.initial_load_path is only read when there is no such folder; "
                    f"remove {self.folder} to start from {self.initial_load_path}"
                )
            return None
        if step == -1:
            step = complete[-1]
        if step not in complete:
            raise UserValueError(
                f"checkpoint.load_step = {step} is not a complete checkpoint of {self.folder}; "
                f"it has steps {', '.join(map(str, complete))}"
            )
        if step < complete[-1] and not self.load_only:
            raise UserValueError(
                f"checkpoint.load_step = {step} but {self.folder} goes up to step {complete[-1]}, "
                "which training on would overwrite; continue in another place with "
                f"--checkpoint.folder NEW --checkpoint.initial_load_path {existing[step][0]} "
                "--checkpoint.no-initial_load_model_only"
            )
        path = existing[step][0]
        self._check_fits(path, model_only=step == 0)
        self._check_settings(path, elsewhere=False, weights_only=step == 0)
        return path

    def _check_fits(self, path: Path, model_only: bool) -> None:
        """Check that a checkpoint fits the model and, unless ``model_only``, the data loader."""
        if not (path / ".metadata").is_file():
            raise UserValueError(
                f"{path} is not a complete checkpoint (it has no .metadata file); "
                "pass the path of a step-N folder"
            )
        check_shapes(path, self.states[MODEL].state_dict())
        if not model_only and DATALOADER not in self.exclude_from_loading:
            check_dataloader_state(path, self.states[DATALOADER].stream_count)

    def _check_settings(self, path: Path, elsewhere: bool, weights_only: bool) -> None:
        record = read_record(path)
        if record is not None:
            check_settings(path, record, self.config, elsewhere, weights_only)

    def _purge_stale_checkpoints(self) -> None:
        """Keep the last ``keep_latest_k`` complete checkpoints; upstream counts all folders."""
        if self.keep_latest_k <= 0 or dist.get_rank() != 0:
            return
        existing = checkpoints_in(self.folder)
        complete = [step for step, (_, whole) in existing.items() if whole]
        kept = complete[-self.keep_latest_k :]
        for step, (path, _) in existing.items():
            if kept and step < kept[-1] and step not in kept:
                self.purge_queue.put(str(path))
