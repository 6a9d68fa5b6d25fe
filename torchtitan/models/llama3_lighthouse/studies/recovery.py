"""Does a short dense stage after Lighthouse give a model as good as dense training?

For each seed, one model trains dense from scratch. Others train with Lighthouse for a share of the
steps and dense for the rest. Their Lighthouse stages are one run, from which the dense ones branch
off.
"""

import shutil
from pathlib import Path

from ..checkpoints.folders import complete_checkpoints
from ..evaluation.progress import say, say_what_was_written
from ..metrics import HELD_OUT_LOSS, METRICS_FILE
from .recovery_plan import CHECKPOINTS, Study, plan
from .recovery_plots import plot
from .recovery_results import History, Track, read_history, summarise, write_tables
from .sweeps import (
    Environment,
    Run,
    SweepOptions,
    lock_folder,
    raise_if_failed,
    read_metrics,
    sweep,
    train,
)


def remove_cut_off(run: Run) -> None:
    """Remove what an interruption left behind and a resume cannot use.

    A last checkpoint goes if the validation that was due at its step was not logged. The checkpoint
    folder of a branch goes if it holds no whole checkpoint.
    """
    folder = run.folder / CHECKPOINTS
    whole = complete_checkpoints(folder)
    if whole:
        last = max(whole)
        metrics = read_metrics(run.folder) if (run.folder / METRICS_FILE).exists() else {}
        due = last == 1 or last % run.config.validation.freq == 0
        if due and HELD_OUT_LOSS not in metrics.get(last, {}):
            shutil.rmtree(whole.pop(last))
    if run.needs and folder.is_dir() and not whole:
        shutil.rmtree(folder)


def finished_histories(tracks: list[Track]) -> dict[int, History]:
    """Histories of finished tracks by their number, for seeds whose dense control has finished."""
    done = {number: read_history(t) for number, t in enumerate(tracks) if t.is_finished}
    seeds = {tracks[number].seed for number in done if tracks[number].is_control}
    return {number: h for number, h in done.items() if tracks[number].seed in seeds}


def tabulate(tracks: list[Track], output: Path) -> dict[int, History]:
    """Write the tables of the tracks that have finished, and return their histories."""
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


def run_study(study: Study, options: SweepOptions, extra: list[str]) -> None:
    """Train what has not finished of a study, write the tables after every run, and plot.

    Args:
        extra: overrides for every run.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
        RunsFailed: some runs failed; the others have finished.
    """
    slots, output = options.slots(), options.output
    tracks = plan(study, extra)
    # Runs that several tracks share come once, before the first that needs them.
    runs = list({run.folder: run for track in tracks for run in track.runs}.values())
    steps = sum(_own_steps(run) for run in runs)
    alone = sum(track.steps for track in tracks)
    say(f"{len(tracks)} models in {len(runs)} runs: {steps:,} steps, {alone:,} if each model were "
        "trained alone")  # fmt: skip
    if options.only_list:
        print("\n".join(f"{run.name}: {_own_steps(run):,} steps" for run in runs))
        return

    def train_run(run: Run, title: str, environment: Environment) -> int:
        remove_cut_off(run)
        return train(run, options.processes, title, environment, lock)

    with lock_folder(output) as lock:
        failed = sweep(runs, train_run, lambda: tabulate(tracks, output), slots)
        histories = tabulate(tracks, output)
    if histories:
        print((output / "results.md").read_text())
        if options.plots:
            plot([tracks[number] for number in histories], list(histories.values()), output)
        figures = ("loss_over_tokens.png", "loss_over_time.png", "minus_dense.png")
        say_what_was_written(output, "results.md", "results.csv", "summary.csv", *figures)
    raise_if_failed(failed, runs)


def _own_steps(run: Run) -> int:
    return run.config.training.steps - run.start
