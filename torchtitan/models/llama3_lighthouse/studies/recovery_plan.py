"""The runs of a recovery study: which there are, and what each of them begins from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks.configuration import check_config
from ..checks.output import check_output
from ..command_line import keys_given
from ..errors import UserValueError
from ..job_config import NO_SCHEDULE, JobConfig, LighthouseConfigManager
from ..model.flavors import flavors
from .recovery_results import Track
from .settings import command_line, with_settings
from .sweeps import Run

CHECKPOINTS = "checkpoint"
# Every step is logged, because a table needs the first dense one and validation cuts longer
# intervals. Every run ends in a checkpoint that another one can begin from.
SETTINGS = {
    "lighthouse.stage": "auto",
    "metrics.log_freq": 1,
    "checkpoint.enable": True,
    "checkpoint.folder": CHECKPOINTS,
    "checkpoint.last_save_model_only": False,
    "checkpoint.last_save_in_hf": False,
}
VARIED = {"lighthouse.dense_from_step", "debug.seed", "job.dump_folder", "job.config_file",
          "checkpoint.initial_load_path", "checkpoint.initial_load_model_only"}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Options of a study.

    Attributes:
        config: TOML file that all runs start from.
        output: folder of the study.
        splits: shares of training.steps that Lighthouse trains.
        seeds: seeds of the model.
        dense_steps: steps of further dense controls.
    """

    config: Path
    output: Path
    splits: list[float]
    seeds: list[int]
    dense_steps: list[int]


def split_steps(splits: list[float], steps: int) -> dict[float, int]:
    """Map each split to its last Lighthouse step, in order of steps.

    Raises:
        ValueError: a split leaves one of the stages without a step, or two are the same.
    """
    found: dict[float, int] = {}
    for split in sorted(splits):
        if not 0 < split < 1:
            raise UserValueError(
                f"--splits {split:g} must lie between 0 and 1: the share of training.steps that "
                "Lighthouse trains"
            )
        step = round(split * steps)
        if not 0 < step < steps:
            raise UserValueError(
                f"--splits {split:g} of training.steps = {steps} leaves no "
                f"{'dense' if step else 'Lighthouse'} step; give another split or more steps"
            )
        if step in found.values():
            raise UserValueError(
                f"--splits {split:g} ends the Lighthouse stage at step {step} of {steps}, as "
                "another one does; remove one of them"
            )
        found[split] = step
    return found


def check_base(config: JobConfig) -> None:
    """Check that a configuration can be studied.

    Raises:
        ValueError, TypeError, OSError: it cannot; the message names the key and the fix.
    """
    steps, validation, checkpoint = config.training.steps, config.validation, config.checkpoint
    if not validation.enable:
        raise UserValueError(
            "the study compares held-out losses, but validation.enable = false; pass "
            f"--validation.enable --validation.seq_len {config.training.seq_len} "
            f"--validation.local_batch_size {config.training.local_batch_size} "
            f"--validation.freq {_divisor(steps, steps // 10)} --validation.steps 16, and "
            "--validation.dataset if the text is your own"
        )
    if validation.freq < 1 or steps % validation.freq:
        raise UserValueError(
            f"validation.freq = {validation.freq} does not divide training.steps = {steps}, so no "
            "held-out loss would be measured at the end; pass "
            f"--validation.freq {_divisor(steps, validation.freq)}"
        )
    for key, value, given in (
        ("initial_load_path", None, checkpoint.initial_load_path),
        ("load_step", -1, checkpoint.load_step),
        ("load_only", False, checkpoint.load_only),
        ("exclude_from_loading", [], checkpoint.exclude_from_loading),
    ):
        if given != value:
            raise UserValueError(
                f"checkpoint.{key} = {given!r}: the study trains from scratch and carries whole "
                f"checkpoints over; leave it at {value!r}"
            )
    check_config(config, flavors)


def check_dense_steps(config: JobConfig, lengths: list[int]) -> None:
    """Check that dense controls of fewer steps can be set beside a study's runs.

    Raises:
        ValueError: one of them cannot; the message names the flag and the fix.
    """
    steps, freq, scheduler = config.training.steps, config.validation.freq, config.lr_scheduler
    for length in lengths:
        first, last = scheduler.warmup_steps + 1, steps - freq
        if not first <= length <= last or length % freq:
            down = min(length, last) // freq * freq
            nearest = down if down >= first else -(-first // freq) * freq
            advice = f"pass --dense-steps {nearest}" if nearest <= last else "leave it out"
            raise UserValueError(
                f"--dense-steps {length} must be a multiple of validation.freq = {freq} above "
                f"lr_scheduler.warmup_steps = {scheduler.warmup_steps} and below training.steps = "
                f"{steps}, so that its end is validated; {advice}"
            )
        if not _decay_steps(config, length):
            raise UserValueError(
                f"--dense-steps {length} needs a learning rate that decays by then, and "
                f"lr_scheduler.decay_ratio = {scheduler.decay_ratio:g} leaves no step to decay in; "
                "leave the flag out: without decay, the dense run at equal time is the control"
            )
    if len(set(lengths)) < len(lengths):
        raise UserValueError(
            f"--dense-steps {' '.join(map(str, lengths))} names one twice; give each once"
        )
    if lengths and scheduler.total_steps is not None:
        raise UserValueError(
            f"lr_scheduler.total_steps = {scheduler.total_steps}, but with --dense-steps each run "
            "decays by its own last step; leave it out"
        )


def _decay_steps(config: JobConfig, length: int) -> int:
    """Steps over which the learning rate of a run of ``length`` steps decays."""
    ratio, most = config.lr_scheduler.decay_ratio, length - config.lr_scheduler.warmup_steps
    return most if ratio is None else min(round(length * ratio), most)


def branching_step(config: JobConfig, length: int) -> int:
    """The last checkpoint up to which a dense run of ``length`` steps equals the full one.

    Returns:
        The step, or 0 if there is no such checkpoint or the full run does not keep it.
    """
    checkpoint = config.checkpoint
    # A checkpoint holds the learning rate of the step after it, which is the first to differ.
    alike = length - _decay_steps(config, length)
    step = alike // checkpoint.interval * checkpoint.interval
    later = (config.training.steps - 1) // checkpoint.interval - step // checkpoint.interval + 1
    return step if checkpoint.keep_latest_k <= 0 or later < checkpoint.keep_latest_k else 0


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` up to ``limit``, at least 1."""
    return next((d for d in range(limit, 1, -1) if number % d == 0), 1)


def plan(study: Study, extra: list[str]) -> list[Track]:
    """The models that a study trains: for each seed the dense control, then the splits in order.

    Args:
        extra: overrides for every run.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes.
    """
    if not study.config.is_file():
        raise UserValueError(f"no such configuration: {study.config}; pass a TOML file")
    if clash := keys_given(extra) & (SETTINGS.keys() | VARIED):
        raise UserValueError(f"--{min(clash)} is set by the study; leave it out")
    if len(set(study.seeds)) < len(study.seeds) or min(study.seeds) < 0:
        seeds = " ".join(map(str, study.seeds))
        raise UserValueError(f"--seeds {seeds} must be different numbers from 0 on")
    check_output(study.output)
    output = study.output.resolve()
    common = ["--job.config_file", str(study.config), *extra, *command_line(SETTINGS)]
    base = LighthouseConfigManager().parse_args([*common, f"--job.dump_folder={output}"])
    steps = split_steps(study.splits, base.training.steps)
    if base.lighthouse.schedule:
        raise UserValueError(
            f"lighthouse.schedule = {base.lighthouse.schedule}: the study's splits name the stages "
            f"of its runs; pass --lighthouse.schedule {NO_SCHEDULE}, or compare schedules by "
            "lighthouse contest"
        )
    check_base(base)
    check_dense_steps(base, study.dense_steps)
    planner = _Planner(output, common, base)
    tracks = []
    for seed in study.seeds:
        dense = planner.run("dense", seed, switch=0, last=base.training.steps)
        tracks.append(Track(None, seed, [dense]))
        tracks += planner.splits(seed, steps)
        tracks += [planner.shorter(seed, length, dense) for length in sorted(study.dense_steps)]
    return tracks


@dataclass(frozen=True)
class _Planner:
    """Makes the runs of a study.

    Attributes:
        output: the study's folder.
        common: command line of every run.
        base: the configuration that ``common`` makes.
    """

    output: Path
    common: list[str]
    base: JobConfig

    def run(
        self,
        name: str,
        seed: int,
        switch: int,
        last: int,
        source: Run | None = None,
        start: int = 0,
        decayed_by: int | None = None,
    ) -> Run:
        """A run that ends with step ``last``, dense after ``switch``, from ``source`` at ``start``.

        Args:
            decayed_by: the step by which the learning rate has decayed; default: the study's last.
        """
        # A checkpoint that another run begins from must not depend on where that run ends.
        total = self.base.lr_scheduler.total_steps or self.base.training.steps
        settings: dict[str, Any] = {
            "lighthouse.dense_from_step": switch,
            "training.steps": last,
            "debug.seed": seed,
            "lr_scheduler.total_steps": decayed_by or total,
        }
        if source:
            settings["checkpoint.initial_load_path"] = str(checkpoint_of(source, start))
            settings["checkpoint.initial_load_model_only"] = False
        folder = self.output / f"{name},seed={seed}"
        line = [*self.common, *command_line(settings), f"--job.dump_folder={folder}"]
        config = with_settings(self.base, settings)
        return Run(settings, line, folder, config, needs=source, start=start)

    def splits(self, seed: int, steps: dict[float, int]) -> list[Track]:
        """One Lighthouse stage, which grows from split to split, and a dense stage from each."""
        tracks: list[Track] = []
        trunk: list[Run] = []
        for split, step in steps.items():
            source, start = (trunk[-1], trunk[-1].config.training.steps) if trunk else (None, 0)
            trunk.append(self.run(f"lighthouse_to={step}", seed, step, step, source, start))
            last = self.base.training.steps
            tail = self.run(f"split={split:g}", seed, step, last, trunk[-1], step)
            tracks.append(Track(split, seed, [*trunk, tail]))
        return tracks

    def shorter(self, seed: int, length: int, dense: Run) -> Track:
        """A dense control of ``length`` steps; it branches off the dense run if it can."""
        name, start = f"dense,steps={length}", branching_step(self.base, length)
        if start and not _began_from_scratch(self.output / f"{name},seed={seed}", dense, start):
            branch = self.run(name, seed, 0, length, dense, start, decayed_by=length)
            runs = [dense, branch]
        else:
            runs = [self.run(name, seed, 0, length, decayed_by=length)]
        return Track(None, seed, runs, is_shorter=True)


def checkpoint_of(run: Run, step: int) -> Path:
    """The folder of a run's checkpoint."""
    return run.folder / CHECKPOINTS / f"step-{step}"


def _began_from_scratch(folder: Path, source: Run, step: int) -> bool:
    """Whether the run in ``folder`` began from scratch; without a run, whether it will have to.

    It will have to if ``source`` has finished and its checkpoint of ``step`` is gone.
    """
    record = folder / "config.json"
    if record.exists():
        return not json.loads(record.read_text())["checkpoint"]["initial_load_path"]
    return source.is_finished and not (checkpoint_of(source, step) / ".metadata").exists()
