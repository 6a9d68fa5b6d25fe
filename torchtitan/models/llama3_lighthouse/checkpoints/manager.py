"""Checkpoints: upstream's manager, made to refuse whatever would lose work."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import (
    MODEL,
    OPTIMIZER,
    TRAIN_STATE,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.tools.logging import logger

from ..errors import NonFiniteError, UserFileError, UserValueError
from ..model.rope_scaling import parse_scaling
from . import folders
from .checksums import write_checksums
from .contents import check_contents, give_up_or_set_aside, undamaged_record
from .failed_saves import cause, not_written
from .folders import METADATA_FILE, SEALED_FILES, Condition, checkpoints_in, complete_checkpoints
from .model_folder import check_same_model, differing_entries, write_files
from .ranks import agreed, gathered, on_rank_0
from .record import CheckpointRecord, read_record, write_record
from .resume import check_settings, scaled_at
from .storage import DamagedCheckpointError, load_state
from .tensors import first_not_finite, named_tensors

# A run that ends by an error waits at most this long for an asynchronous save.
SECONDS_FOR_A_SAVE = 600


class LighthouseCheckpointManager(CheckpointManager):
    """Refuses to overwrite a checkpoint, load one that does not fit, or lose the data's position.

    Every checkpoint gets a ``CheckpointRecord``. The trainer sets ``config`` for it and keeps
    ``last_lighthouse_step`` up to date. It also sets ``model``, the run's ``architecture``, and
    ``model_files``, which every checkpoint keeps a copy of. The manager calls ``on_saved`` with the
    seconds for which each save held up training.
    """

    on_saved: Callable[[float], None] | None = None
    config: dict[str, Any]
    model: Mapping[str, Any] = MappingProxyType({})
    model_files: Mapping[str, str] = MappingProxyType({})
    last_lighthouse_step: int | None = 0
    save_future: Future[Any] | None
    # The folder that an asynchronous save is writing.
    _in_flight: Path | None = None
    # The step of ``save_now``, which upstream's loop saves again if it is due.
    _saved_now: int | None = None
    # The save's own thread and the thread that waits for it may come to its end together.
    _finishing = threading.Lock()

    # Loading

    def load(self, step: int = -1) -> bool:
        """Load what the run goes on from; returns whether there is anything.

        Raises:
            UserError: on every rank, if there is something that cannot or must not be loaded.
        """
        if not self.enable:
            return super().load(step)
        on_rank_0(self._clear)
        while True:
            try:
                path = agreed(partial(self._check_before_load, step))
                return agreed(partial(self._load, path))
            except DamagedCheckpointError as error:
                damaged = error
            on_rank_0(partial(self._give_up_or_set_aside, damaged, step))

    def _clear(self) -> None:
        """Remove half-written and half-deleted folders of earlier runs."""
        if self.load_only:
            return
        folder = Path(self.folder)
        removed = folders.remove_cut_off(folder)
        for path in removed:
            logger.warning(f"{path} is removed: its save was cut off")
        for path in folders.taken_out(folder):
            shutil.rmtree(path, ignore_errors=True)
        # torch reads checkpoint.initial_load_path only where there is no folder.
        if removed and self.initial_load_path and not any(folder.iterdir()):
            folder.rmdir()

    def _load(self, path: Path | None) -> bool:
        from_here = path is not None and path.parent == Path(self.folder)
        number = int(path.name.removeprefix("step-")) if path and from_here else -1
        loaded = super().load(number)
        if not loaded:
            logger.info(f"Begins from scratch: no checkpoint in {self.folder}")
            return False
        path = path or Path(self.initial_load_path or "weights in Hugging Face's format")
        if name := first_not_finite(self._tensors()):
            raise DamagedCheckpointError(path, f"'{name}' holds values that are not finite")
        step = self.states[TRAIN_STATE].step
        if from_here and step != number:
            raise UserValueError(
                f"{path} holds step {step}; give the folder the name step-{step} again"
            )
        logger.info(f"Goes on from {path}")
        if step > 0:
            record = read_record(path)
            self.last_lighthouse_step = record.last_lighthouse_step if record else None
        return True

    def _give_up_or_set_aside(self, error: DamagedCheckpointError, step: int) -> None:
        asked = self.config["checkpoint"]["set_damaged_aside"] and not self.load_only
        give_up_or_set_aside(error, Path(self.folder), is_newest=step == -1, asked=asked)

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """As upstream's, with a reader that checks every byte and runs nothing."""
        if from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        load_state(state_dict, checkpoint_id)
        self.states[MODEL].load_state_dict(state_dict)

    def _find_load_step(self, folder: str = "") -> int:
        return max(complete_checkpoints(folder or self.folder), default=-1)

    def _check_before_load(self, step: int) -> Path | None:
        """The checkpoint that ``load`` will read; None if there is none or it is in HF's format.

        Raises:
            ValueError: the checkpoint is missing, of another model or data, or older than others
                that training on would overwrite.
            DamagedCheckpointError: it cannot be read.
        """
        newest = self._find_load_step()
        for found in checkpoints_in(self.folder).values():
            if found.condition is not Condition.WITHOUT_METADATA:
                continue
            if found.step > newest and step == -1:
                raise DamagedCheckpointError(
                    found.path, f"it has no file {METADATA_FILE}, which copies by 'step-N/*' lack"
                )
            logger.warning(
                f"{found.path} has no file {METADATA_FILE} and is not used; copy all of it again"
            )
        path = folders.checkpoint_to_load(self.folder, step, self.load_only, self.initial_load_path)
        if path is None:
            return None
        if path.parent != Path(self.folder):
            if self.initial_load_in_hf:
                return None
            self._check_contents(path, self.initial_load_model_only)
            self._check_settings(path, elsewhere=True, weights_only=self.initial_load_model_only)
            return path
        if TRAIN_STATE in self.exclude_from_loading and not self.load_only:
            raise UserValueError(
                f"checkpoint.exclude_from_loading = {self.exclude_from_loading} would train from "
                f"step 1 on in {self.folder}, which has later ones; begin in another place with "
                f"--checkpoint.folder NEW --checkpoint.initial_load_path {path}"
            )
        # It names an entry of the architecture, and the shapes of tensors do not.
        if record := undamaged_record(path):
            check_same_model(path, record, self.config, self.model)
        is_seed = path.name == "step-0"
        self._check_contents(path, model_only=is_seed)
        self._check_settings(path, elsewhere=False, weights_only=is_seed)
        return path

    def _check_contents(self, path: Path, model_only: bool) -> None:
        check_contents(path, self.states, self.exclude_from_loading, model_only)

    def _check_settings(self, path: Path, elsewhere: bool, weights_only: bool) -> None:
        if record := undamaged_record(path):
            present, model = self.config, self.model
            if elsewhere:
                # Another run may have no such stages, and the weights are those of the last step.
                next_step = 1 if weights_only else record.step + 1
                present = scaled_at(present, next_step)
                if present is not self.config:
                    scaling = parse_scaling(present["model"]["rope_scaling"], 0)
                    model = {**model, "rope_scaling": scaling}
                goes_on = scaled_at(record.config, next_step)
                if weights_only or goes_on["model"] != present["model"]:
                    goes_on = scaled_at(record.config, record.step)
                # The same schedule, in a folder of its own, scales the model here too.
                record = replace(record, config=goes_on)
            apart = differing_entries(path, record, present, model)
            check_settings(path, record, present, elsewhere, weights_only, apart)

    # Saving

    def is_due(self, step: int, last_step: bool) -> bool:
        """Whether ``save`` saves ``step``."""
        return step != self._saved_now and self._should_save(step, last_step)

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save a checkpoint if one is due.

        Raises:
            NonFiniteError: weights or optimizer state are not finite; nothing is saved.
            UserFileError: the checkpoint, or the one before it, could not be written.
        """
        if not self.is_due(curr_step, last_step):
            return
        start = time.monotonic()
        self.wait()
        self._check_finite(curr_step)
        path = Path(self._create_checkpoint_id(curr_step))
        on_rank_0(partial(self._begin, path, curr_step))
        try:
            super().save(curr_step, last_step)
        except (CheckpointException, OSError) as error:
            raise self._not_written(path, error) from error
        if last_step:
            # Upstream keeps one more after the last save.
            self._purge_stale_checkpoints()
        if self.save_future is None:
            self._finish(path)
        else:
            self._in_flight = path
            self.save_future.add_done_callback(partial(self._finish_if_saved, path))
        seconds = time.monotonic() - start
        if self._in_flight is None:
            logger.info(f"Checkpoint {path} saved in {seconds:.1f} s")
        else:
            logger.info(
                f"Checkpoint {path} is being saved; this held training up for {seconds:.1f} s"
            )
        if self.on_saved:
            self.on_saved(seconds)

    def save_now(self, step: int) -> Path | None:
        """Save a full checkpoint of ``step`` at once, unless there is one, and return its folder.

        None if this run saves none.
        """
        if not self.enable or self.load_only:
            return None
        self.wait()
        path = Path(self._create_checkpoint_id(step))
        if any(gathered(step in complete_checkpoints(self.folder))):
            return path
        mode, interval = self.async_mode, self.interval
        self.async_mode, self.interval = AsyncMode.DISABLED, 1
        try:
            self.save(step)
        finally:
            self.async_mode, self.interval = mode, interval
        self._saved_now = step
        return path

    def wait(self, timeout: float | None = None) -> None:
        """Wait for an asynchronous save.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.

        Raises:
            UserFileError: it could not be written.
        """
        if self._in_flight is None or self.save_future is None:
            return
        path, future = self._in_flight, self.save_future
        self._in_flight = self.save_future = None
        try:
            future.result(timeout)
        except StillRunning:
            raise UserFileError(
                f"checkpoint {path} is not saved after {timeout} s and may be incomplete"
            ) from None
        except (CheckpointException, Exception) as error:
            raise self._not_written(path, error) from error
        # The result may be there before the save's own thread gets to this.
        self._finish(path)

    def close(self) -> None:
        try:
            self.wait(SECONDS_FOR_A_SAVE)
        except UserFileError as error:
            logger.error(str(error))
        super().close()

    def last_good(self) -> Path | None:
        """The newest complete checkpoint, after an asynchronous save in flight has ended."""
        if not self.enable:
            return None
        try:
            self.wait(SECONDS_FOR_A_SAVE)
        except UserFileError as error:
            logger.error(str(error))
        return self._kept()

    def _begin(self, path: Path, step: int) -> None:
        """Make the folder of a save with its record, so that every complete one has a record."""
        dump_folder = Path(self.config["job"]["dump_folder"])
        if not dump_folder.exists():
            logger.warning(
                f"job.dump_folder {dump_folder} is gone, removed while the run was going; it is "
                "made again for the next checkpoints, and what it held is lost"
            )
        found = checkpoints_in(self.folder).get(step)
        if found and found.condition is not Condition.CUT_OFF:
            raise UserFileError(
                f"{path} already holds a checkpoint and is not overwritten; "
                "pass --checkpoint.folder NAME to save elsewhere, or move that folder away"
            )
        try:
            folders.begin(path)
            write_record(path, CheckpointRecord(step, self.last_lighthouse_step, self.config))
            write_files(path, self.model_files)
        except OSError as error:
            raise self._not_written(path, error) from None

    def _finish(self, path: Path) -> None:
        """Seal the folder of a save that is complete."""
        with self._finishing:
            if dist.get_rank() != 0 or not folders.is_unfinished(path):
                return
            try:
                write_checksums(path, SEALED_FILES)
                folders.finish(path)
            except OSError as error:
                logger.warning(
                    f"{path} is complete, but its checksums could not be written ({cause(error)})"
                )

    def _finish_if_saved(self, path: Path, save: Any) -> None:
        if not save.exception():
            self._finish(path)

    def _not_written(self, path: Path, error: BaseException) -> UserFileError:
        needed = sum(x.numel() * x.element_size() for _, x in self._tensors())
        return not_written(path, error, needed, self._kept())

    def _kept(self) -> Path | None:
        """The newest complete checkpoint of the run's folder."""
        return next(reversed(complete_checkpoints(self.folder).values()), None)

    def _purge_stale_checkpoints(self) -> None:
        """Keep the last ``keep_latest_k`` complete checkpoints; upstream counts all folders."""
        if self.keep_latest_k <= 0 or dist.get_rank() != 0:
            return
        for path in [*complete_checkpoints(self.folder).values()][: -self.keep_latest_k]:
            try:
                self.purge_queue.put(str(folders.take_out(path)))
            except OSError as error:
                logger.warning(f"{path} cannot be deleted ({cause(error)})")

    # Checks of the saved tensors

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return named_tensors(self.states[MODEL].model, list(self.states[OPTIMIZER]))

    def _check_finite(self, step: int) -> None:
        """Raise a NonFiniteError on every rank if what is to be saved is not finite on any."""
        found = gathered(first_not_finite(self._tensors()))
        if name := next((each for each in found if each), None):
            raise NonFiniteError(
                f"step {step}: '{name}' is not finite after the optimizer's step, and nothing was "
                f"saved; the last good checkpoint is {self._kept() or 'none: there is no other'}. "
                "Lower optimizer.lr, lengthen the warmup or check the data."
            )
