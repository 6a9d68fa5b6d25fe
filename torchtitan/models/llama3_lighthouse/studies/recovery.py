#!/usr/bin/env python3
"""Does a short dense stage after Lighthouse give a model as good as dense training?

    python scripts/recovery_study.py train_configs/recovery_books_32k.toml \\
        --output outputs/recovery --splits 0.625 0.6875 0.75 --seeds 0 1 --dense-steps 2100 \\
        --training.dataset_path FOLDER --validation.dataset_path FOLDER

For each seed of the model it trains dense from scratch and, for each split, Lighthouse for that
share of training.steps and dense for the rest, all on the same text in the same order. The
Lighthouse stage is trained once for each seed, up to the latest split; from its checkpoint at each
split a dense stage branches off, which equals a run that switched there. --dense-steps adds dense
controls of fewer steps whose learning rate decays to its end by then, for a comparison at equal
time. Further arguments, --section.key value, go to every run and come last. The configuration must
validate:

    --validation.enable --validation.seq_len 16384 --validation.freq 60 --validation.steps 16

The same command goes on where it was interrupted, and repeats nothing that finished.

Writes to OUTPUT: a folder for each run with its log, its checkpoints and metrics.jsonl; results.csv
(each run), summary.csv (over seeds) and results.md (both), after every run; and, unless --no-plots,
loss_over_tokens.png, loss_over_time.png and minus_dense.png, which need the extra "benchmark" (pip
install -e '.[benchmark]'). docs/recovery.md says what the columns are.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from lighthouse_commands.arguments import command_parser, run_command

from ..checkpoint import checkpoints_in
from ..checks import check_config
from ..errors import UserValueError
from ..job_config import JobConfig, LighthouseConfigManager
from ..metrics import METRICS_FILE
from ..model.flavors import flavors
from .ablation_results import HELD_OUT_LOSS
from .recovery_results import History, Track, plot, read_history, summarise, write_tables
from .sweeps import (
    Run,
    command_line,
    keys_given,
    lock_folder,
    parse_sweep,
    read_metrics,
    sweep,
    train,
    with_settings,
)

CHECKPOINTS = "checkpoint"
# Every step is logged: one of them is the first dense one, and validation cuts longer intervals.
# Every run ends in a checkpoint that another one can begin from.
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


def split_steps(splits: list[float], steps: int) -> dict[float, int]:
    """Each split to its last Lighthouse step, in order of steps.

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
    check_config(config, flavors)
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


def check_dense_steps(config: JobConfig, lengths: list[int]) -> None:
    """Check that dense controls of fewer steps can be set beside a study's runs.

    Raises:
        ValueError: they cannot; the message names the flag and the fix.
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
                f"--dense-steps {length} is for a learning rate that decays by then, and "
                f"lr_scheduler.decay_ratio = {scheduler.decay_ratio:g} gives it no step to; leave "
                "the flag out: the dense run cut off at equal time is the control"
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
    """The last checkpoint of the dense run that a shorter one of ``length`` steps equals so far.

    0 if there is none, or it is not among those kept.
    """
    checkpoint = config.checkpoint
    # A checkpoint holds the rate of the step after it, the first that may differ.
    alike = length - _decay_steps(config, length)
    step = alike // checkpoint.interval * checkpoint.interval
    later = (config.training.steps - 1) // checkpoint.interval - step // checkpoint.interval + 1
    return step if checkpoint.keep_latest_k <= 0 or later < checkpoint.keep_latest_k else 0


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` up to ``limit``, at least 1."""
    return next((d for d in range(limit, 1, -1) if number % d == 0), 1)


def plan(arguments: argparse.Namespace, extra: list[str]) -> list[Track]:
    """What the study trains: for each seed the dense control, then the splits in order.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes.
    """
    if not arguments.config.is_file():
        raise UserValueError(f"no such configuration: {arguments.config}; pass a TOML file")
    if clash := keys_given(extra) & (SETTINGS.keys() | VARIED):
        raise UserValueError(f"--{min(clash)} is set by the study; leave it out")
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        seeds = " ".join(map(str, arguments.seeds))
        raise UserValueError(f"--seeds {seeds} must be different numbers from 0 on")
    output = arguments.output.resolve()
    common = ["--job.config_file", str(arguments.config), *extra, *command_line(SETTINGS)]
    base = LighthouseConfigManager().parse_args([*common, f"--job.dump_folder={output}"])
    # A checkpoint that another run begins from must not depend on where that run ends.
    total = base.lr_scheduler.total_steps or base.training.steps
    steps = split_steps(arguments.splits, base.training.steps)
    check_base(base)
    check_dense_steps(base, arguments.dense_steps)

    def run(name: str, seed: int, switch: int, last: int, source: Run | None = None,
            start: int = 0, decayed_by: int = total) -> Run:  # fmt: skip
        settings = {"lighthouse.dense_from_step": switch, "training.steps": last,
                    "debug.seed": seed, "lr_scheduler.total_steps": decayed_by}  # fmt: skip
        if source:
            settings |= {"checkpoint.initial_load_path": str(checkpoint_of(source, start)),
                         "checkpoint.initial_load_model_only": False}  # fmt: skip
        folder = output / f"{name},seed={seed}"
        line = [*common, *command_line(settings), f"--job.dump_folder={folder}"]
        config = with_settings(base, settings)
        return Run(settings, line, folder, config, needs=source, start=start)

    tracks = []
    for seed in arguments.seeds:
        dense = run("dense", seed, switch=0, last=base.training.steps)
        tracks.append(Track(None, seed, [dense]))
        trunk: list[Run] = []
        for split, step in steps.items():
            source, start = (trunk[-1], trunk[-1].config.training.steps) if trunk else (None, 0)
            trunk.append(run(f"lighthouse_to={step}", seed, step, step, source, start))
            tail = run(f"split={split:g}", seed, step, base.training.steps, trunk[-1], step)
            tracks.append(Track(split, seed, [*trunk, tail]))
        for length in sorted(arguments.dense_steps):
            name, start = f"dense,steps={length}", branching_step(base, length)
            if start and not _began_from_scratch(output / f"{name},seed={seed}", dense, start):
                branch = run(name, seed, 0, length, dense, start, decayed_by=length)
                runs = [dense, branch]
            else:
                runs = [run(name, seed, 0, length, decayed_by=length)]
            tracks.append(Track(None, seed, runs, is_shorter=True))
    return tracks


def checkpoint_of(run: Run, step: int) -> Path:
    return run.folder / CHECKPOINTS / f"step-{step}"


def _began_from_scratch(folder: Path, source: Run, step: int) -> bool:
    """Whether the run in ``folder`` did, or, if there is none, will have to."""
    record = folder / "config.json"
    if record.exists():
        return not json.loads(record.read_text())["checkpoint"]["initial_load_path"]
    return source.is_finished and not (checkpoint_of(source, step) / ".metadata").exists()


def remove_cut_off(run: Run) -> None:
    """Remove what an interruption left and a resume would stumble over or pass by.

    That is a last checkpoint after which no validation was logged, though it was due, and the
    checkpoint folder of a branch without a whole checkpoint in it.
    """
    folder = run.folder / CHECKPOINTS
    whole = {step: path for step, (path, complete) in checkpoints_in(folder).items() if complete}
    if whole:
        last = max(whole)
        metrics = read_metrics(run.folder) if (run.folder / METRICS_FILE).exists() else {}
        due = last == 1 or last % run.config.validation.freq == 0
        if due and HELD_OUT_LOSS not in metrics.get(last, {}):
            shutil.rmtree(whole.pop(last))
    if run.needs and folder.is_dir() and not whole:
        shutil.rmtree(folder)


def finished_histories(tracks: list[Track]) -> dict[int, History]:
    """Index of a finished track to its history, if the dense control of its seed has finished."""
    done = {number: read_history(t) for number, t in enumerate(tracks) if t.is_finished}
    seeds = {tracks[number].seed for number in done if tracks[number].is_control}
    return {number: h for number, h in done.items() if tracks[number].seed in seeds}


def tabulate(tracks: list[Track], output: Path) -> dict[int, History]:
    """Write the tables of what has finished, and return its histories."""
    histories = finished_histories(tracks)
    finished = [(tracks[number], history) for number, history in histories.items()]
    controls = {track.seed: history for track, history in finished if track.is_control}
    shorter = {seed: [history for track, history in finished
                      if track.is_shorter and track.seed == seed] for seed in controls}  # fmt: skip
    rows = [summarise(track, history, controls[track.seed], shorter[track.seed])
            for track, history in finished]  # fmt: skip
    if rows:
        write_tables(rows, output)
    return histories


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = command_parser(__doc__)
    parser.add_argument("config", type=Path, help="TOML file that all runs start from")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--splits", type=float, nargs="+", default=[0.625, 0.6875, 0.75],
                        help="shares of training.steps that Lighthouse trains; default: the "
                        "paper's, 0.625 0.6875 0.75")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1],
                        help="of the model; default: 0 1")  # fmt: skip
    parser.add_argument("--dense-steps", type=int, nargs="+", default=[], metavar="STEPS",
                        help="of further dense controls, whose learning rate decays by then; may "
                        "be added to a finished study; default: none")  # fmt: skip
    return parse_sweep(parser)


def study() -> None:
    """What the command does.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    arguments, extra = parse_arguments()
    tracks = plan(arguments, extra)
    # Runs that several tracks share come once, before the first that needs them.
    runs = list({run.folder: run for track in tracks for run in track.runs}.values())
    steps = sum(_own_steps(run) for run in runs)
    alone = sum(track.steps for track in tracks)
    print(f"{len(tracks)} models in {len(runs)} runs: {steps:,} steps, {alone:,} if each model "
          "were trained alone", flush=True)  # fmt: skip
    if arguments.list:
        print("\n".join(f"{run.name}: {_own_steps(run):,} steps" for run in runs))
        return

    def train_run(run: Run, title: str, environment: dict[str, str]) -> int:
        remove_cut_off(run)
        return train(run, arguments.processes, title, environment, lock)

    output = arguments.output
    with lock_folder(output) as lock:
        failed = sweep(runs, train_run, lambda: tabulate(tracks, output), arguments.slots)
        histories = tabulate(tracks, output)
    if histories:
        print((output / "results.md").read_text())
        if not arguments.no_plots:
            plot([tracks[number] for number in histories], list(histories.values()), output)
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def _own_steps(run: Run) -> int:
    return run.config.training.steps - run.start


def main() -> None:
    run_command(study)


if __name__ == "__main__":
    main()
