"""The runs of a contest: their settings, and the short runs that tell times."""

import re
from pathlib import Path
from typing import Any

from ..checks.configuration import check_config
from ..errors import UserValueError
from ..job_config import JobConfig, LighthouseConfigManager
from ..model.flavors import flavors
from ..stages import stages_of
from .contest_file import Arm, Contest
from .contest_measures import known_measures
from .recovery_plan import SETTINGS, check_base
from .settings import command_line, keys_given
from .sweeps import Run

# Steps of each stage in a run that tells times. The first few compile, and capture a graph.
TIMED_STEPS = 40
UNTIL = re.compile(r"\buntil=\S+")


class Planner:
    """Makes the runs of a contest."""

    def __init__(self, contest: Contest, output: Path, extra: list[str]) -> None:
        self.contest, self.output, self.extra = contest, output, extra
        varied = {"optimizer.lr", "job.dump_folder", "job.config_file", *contest.seed_keys}
        varied |= contest.settings.keys() | SETTINGS.keys()
        varied |= {key for arm in contest.arms.values() for key in arm.settings}
        if clash := keys_given(extra) & varied:
            raise UserValueError(f"--{min(clash)} is set by {contest.path}; leave it out")
        for arm in contest.arms.values():
            # Every arm is checked before the first run.
            run = self.run(arm, arm.rates[0], contest.seeds[0])
            check_base(run.config)
            check_measures(contest, run.config)
            self.timing_run(arm)

    def run(self, arm: Arm, rate: float, seed: int) -> Run:
        """The run of an arm at a learning rate under a seed."""
        return self._run(f"{arm.name},lr={rate:g},seed={seed}", self._settings(arm, rate, seed), [])

    def timing_run(self, arm: Arm) -> Run:
        """A few steps of each stage of an arm, which tell how long a step takes."""
        whole = self.run(arm, arm.rates[0], self.contest.seeds[0])
        stages = stages_of(whole.config)
        shorter: dict[str, Any] = {
            "training.steps": TIMED_STEPS * len(stages),
            "lr_scheduler.warmup_steps": 0,
            "validation.enable": False,
            "checkpoint.enable": False,
        }
        if any(stage.text for stage in stages):
            shorter["lighthouse.schedule"] = [
                UNTIL.sub(f"until={TIMED_STEPS * number}", stage.text)
                for number, stage in enumerate(stages, 1)
            ]
        elif len(stages) > 1:
            shorter["lighthouse.dense_from_step"] = TIMED_STEPS
        return self._run(f"{arm.name},times", whole.settings | shorter, command_line(shorter))

    def _settings(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        seeds = dict.fromkeys(self.contest.seed_keys, seed)
        return self.contest.settings | arm.settings | {"optimizer.lr": rate} | seeds

    def _run(self, name: str, settings: dict[str, Any], last: list[str]) -> Run:
        """A run of settings; the flags ``last`` come after those of the command line."""
        folder = self.output.resolve() / name
        line = ["--job.config_file", str(self.contest.config), f"--job.dump_folder={folder}"]
        line += [*command_line(SETTINGS | settings), *self.extra, *last]
        config = LighthouseConfigManager().parse_args(line)
        check_config(config, flavors)
        return Run(settings, line, folder, config)


def check_measures(contest: Contest, config: JobConfig) -> None:
    """Check that the runs will have the measures that the contest decides by.

    Raises:
        ValueError: they will not.
    """
    known = known_measures(contest, config)
    for key, name in (("tuned_by", contest.tuned_by), ("primary", contest.primary)):
        if name not in known:
            shown = ", ".join(known)
            raise UserValueError(f"{contest.path}: {key} = '{name}' is not measured; use {shown}")
