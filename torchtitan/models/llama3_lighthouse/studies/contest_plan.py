"""The runs of a contest: their settings, and the short runs that tell times."""

import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checks.configuration import check_launch
from ..command_line import keys_given
from ..errors import UserValueError, in_place
from ..job_config import JobConfig, LighthouseConfigManager
from ..model.flavors import flavors
from ..stages import stages_of
from .contest_data import Times, steps_by_kind
from .contest_file import INITIAL_KEYS, Arm, Contest, read_record, write_record
from .recovery_plan import SETTINGS, check_base, checkpoint_of
from .settings import command_line, with_settings
from .sweeps import Run

UNTIL, SHARE = re.compile(r"\buntil=\S+"), re.compile(r"\buntil=([\d.]+)%")
# Steps of the arms, where gpu_seconds decides them.
STEPS_FILE = "steps.json"
# This is added to an arm's seed for the run that it begins from.
START_SEEDS = 1000


def in_table(contest: Contest, name: str) -> AbstractContextManager[None]:
    """Name the file and its table in errors about the settings there."""
    return in_place(f"{contest.path}, {name}")


def last_checkpoint(run: Run) -> Path:
    """The folder of a run's last checkpoint."""
    return checkpoint_of(run, run.config.training.steps)


class Planner:
    """Makes the runs of a contest.

    Args:
        extra: overrides for every run.
        processes: training processes of each run.

    Raises:
        ValueError: an override sets what the contest sets.
    """

    def __init__(
        self, contest: Contest, output: Path, extra: list[str], processes: int = 1
    ) -> None:
        self.contest, self.output, self.extra = contest, output, extra
        self.processes = processes
        path = output / STEPS_FILE
        self.steps: dict[str, int] = read_record(path) if path.exists() else {}
        self._starts: dict[int, Run] = {}
        varied = {"optimizer.lr", "job.dump_folder", "job.config_file", *contest.seed_keys}
        varied |= contest.settings.keys() | SETTINGS.keys()
        varied |= {key for arm in contest.arms.values() for key in arm.settings}
        varied |= {"training.steps"} if contest.gpu_seconds else set()
        if contest.start:
            varied |= contest.start.settings.keys() | INITIAL_KEYS
            varied |= {"checkpoint.interval", "validation.freq"}
        if clash := keys_given(extra) & varied:
            raise UserValueError(f"--{min(clash)} is set by {contest.path}; leave it out")

    @property
    def overrides(self) -> list[str]:
        """The overrides that results depend on, without the folders of the text."""
        found, skip = [], False
        for word in self.extra:
            is_path = word.partition("=")[0].endswith(".dataset_path")
            if not skip and not is_path:
                found.append(word)
            skip = is_path and "=" not in word
        return found

    def run(self, arm: Arm, rate: float, seed: int) -> Run:
        """The run of an arm at a learning rate under a seed."""
        source = self.start_run(seed) if self.contest.start else None
        name = f"{arm.name},lr={rate:g},seed={seed}"
        return self._run(name, self._settings(arm, rate, seed), source)

    def start_run(self, seed: int) -> Run:
        """The run that all arms begin from under a seed. It reads the text in another order."""
        if seed in self._starts:
            return self._starts[seed]
        start = self.contest.start
        assert start is not None
        seeds = dict.fromkeys(self.contest.seed_keys, seed + START_SEEDS)
        settings = self.contest.settings | start.settings | seeds | {"optimizer.lr": start.rate}
        steps = settings["training.steps"]
        # The arms need its last checkpoint alone.
        settings |= dict.fromkeys(("checkpoint.interval", "validation.freq"), steps)
        self._starts[seed] = self._run(f"start,seed={seed}", settings)
        return self._starts[seed]

    def timing_run(self, arm: Arm) -> Run:
        """A few steps of each stage of an arm, which tell how long a step takes."""
        whole = self.run(arm, arm.rates[0], self.contest.seeds[0])
        stages, steps = stages_of(whole.config), self.contest.timed_steps
        shorter: dict[str, Any] = {
            "training.steps": steps * len(stages),
            "lr_scheduler.warmup_steps": 0,
            "validation.enable": False,
            "checkpoint.enable": False,
        }
        if any(stage.text for stage in stages):
            shorter["lighthouse.schedule"] = [
                UNTIL.sub(f"until={steps * number}", stage.text)
                for number, stage in enumerate(stages, 1)
            ]
        elif len(stages) > 1:
            shorter["lighthouse.dense_from_step"] = steps
        return self._run(f"{arm.name},times", whole.settings | shorter)

    def set_steps(self, times: Times, arms: Iterable[str]) -> None:
        """Give arms the steps that take the GPU seconds of the contest, once and for all.

        The number is a multiple of validation.freq, so that runs are validated at their end.

        Raises:
            ValueError: the time is too short for an arm.
        """
        asked = [self.contest.arms[name] for name in arms]
        for arm in asked:
            config = self.run(arm, arm.rates[0], self.contest.seeds[0]).config
            counts, freq = steps_by_kind(config), config.validation.freq
            a_step = sum(count * times[arm.name][kind] for kind, count in counts.items())
            a_step /= config.training.steps
            steps = math.floor(self.contest.gpu_seconds / a_step / freq) * freq
            if steps <= config.lr_scheduler.warmup_steps:
                raise UserValueError(
                    f"{self.contest.path}: gpu_seconds = {self.contest.gpu_seconds:g} leaves "
                    f"arms.{arm.name} {steps} steps of {a_step:.3f} s, a multiple of "
                    f"validation.freq = {freq}, and {config.lr_scheduler.warmup_steps} warm up; "
                    "raise it, or lower validation.freq"
                )
            self.steps[arm.name] = steps
        write_record(self.output / STEPS_FILE, self.steps)
        for arm in asked:
            # Other steps may not fit the rest of the settings.
            with in_table(self.contest, f"arms.{arm.name}"):
                check_base(self.run(arm, arm.rates[0], self.contest.seeds[0]).config)

    def _settings(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        seeds = dict.fromkeys(self.contest.seed_keys, seed)
        settings: dict[str, Any] = self.contest.settings | arm.settings | seeds
        settings["optimizer.lr"] = rate
        if self.contest.gpu_seconds:
            # Before it is known, the base has some number.
            settings["training.steps"] = self.steps.get(arm.name, self._base_steps)
        steps = settings.get("training.steps", self._base_steps)
        if schedule := settings.get("lighthouse.schedule"):
            settings["lighthouse.schedule"] = [
                SHARE.sub(lambda found: f"until={round(float(found[1]) / 100 * steps)}", stage)
                for stage in schedule
            ]
        return settings

    @cached_property
    def _base_steps(self) -> int:
        """The steps of the base, or, where they only stand for others, as many as validate well."""
        steps = self._base.training.steps
        freq = self.contest.settings.get("validation.freq", self._base.validation.freq)
        return -(-steps // freq) * freq if self.contest.gpu_seconds and freq > 0 else steps

    @cached_property
    def _base(self) -> JobConfig:
        line = ["--job.config_file", str(self.contest.config), *self.extra]
        return LighthouseConfigManager().parse_args(line)

    def _run(self, name: str, settings: dict[str, Any], source: Run | None = None) -> Run:
        """A run of settings, which the overrides of the command line do not touch.

        Args:
            source: the run whose last weights it begins from.

        Raises:
            ValueError, TypeError, OSError: the trainer would refuse it.
        """
        folder = self.output.resolve() / name
        settings = SETTINGS | settings
        line = ["--job.config_file", str(self.contest.config), f"--job.dump_folder={folder}"]
        line += [*command_line(settings), *self.extra]
        if source:
            # The configuration holds no path, so that finished runs may lie elsewhere later.
            line.append(f"--checkpoint.initial_load_path={last_checkpoint(source)}")
            line.append("--checkpoint.initial_load_model_only")
        # To parse each line would take a quarter of a second.
        config = with_settings(self._base, settings | {"job.dump_folder": str(folder)})
        check_launch(config, flavors, self.processes)
        return Run(settings, line, folder, config, needs=source)
