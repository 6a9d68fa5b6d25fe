"""Kills at any time, inside saves and purges, of one rank, of all, and of the launcher; SIGTERM."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .cases import Bad, Case, Result, all_gone, check_finished, clear, go_on, kill_descendants
from .events import REMOVALS, kill_at, on_change
from .references import Reference, logged
from .runs import INTERVAL, LAUNCHER_LIMIT, STEPS, End, Launch, command, until

KILLS, TERMINATIONS = 160, 16
# One case in so many goes through torchrun, which imports the trainer again in each process.
LAUNCHER_EVERY = 20
# The third mode, async_with_pinned_mem, needs an accelerator, which forks cannot share.
MODES = ("disabled", "async")
SIGNS = ("a step's folder", "a file of weights", "the metadata", "a folder that goes")


def kill(case: Case) -> Result:
    """Kill a run, start it again, and compare it with one that nothing disturbed."""
    draw = case.random
    launched = case.number % LAUNCHER_EVERY == LAUNCHER_EVERY - 1
    processes, mode = draw.choice((1, 1, 2)), draw.choice(MODES)
    reference = case.world.references[f"{'launched' if launched else 'forked'} {processes}"]
    tried = f"{processes} processes, checkpoint.async_mode {mode}"
    if launched:
        return _through_launcher(case, reference, tried, mode, signal.SIGKILL)
    line = command(case.dump, case.world.text, checkpoint__async_mode=mode)
    victim = draw.choice((None, draw.randrange(processes)))
    tried += f", kills {'all' if victim is None else f'rank {victim}'}"
    trigger = draw.choice(("time", "step", "sign", "event", "event", "purge"))
    if trigger == "event":
        rank = victim or 0
        change = draw.randint(1, max(1, reference.events[rank]))
        tried += f" before file operation {change} of rank {rank}"
        inside = partial(_kill_inside, case.dump, rank, change, victim is None, False)
        launch = Launch(line, case.folder, processes, inside)
    elif trigger == "purge":
        change = draw.randint(1, 12)
        tried += f" before removal {change}"
        inside = partial(_kill_inside, case.dump, 0, change, victim is None, True)
        launch = Launch(line, case.folder, processes, inside)
    else:
        launch = Launch(line, case.folder, processes)
        when = _moment(case, reference, trigger)
        tried += f" {when[0]}"
        until(launch, when[1])
        time.sleep(draw.uniform(0, 0.03) if trigger != "time" else 0)
        launch.kill(victim)
    launch.wait()
    least = newest_there(case.dump, reference, mode)
    try:
        go_on(case, reference, line, least)
    except Bad as bad:
        return Result(bad.outcome, tried, bad.found)
    return Result("ok", tried, f"went on from step {least}")


def terminate(case: Case) -> Result:
    """Ask a run to end, as a scheduler does; it must save the step that it is in."""
    draw = case.random
    launched = case.number % 4 == 3
    processes, mode = case.number % 2 + 1 if not launched else case.number // 4 % 2 + 1, "disabled"
    if draw.random() < 0.4:
        mode = "async"
    number = draw.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
    reference = case.world.references[f"{'launched' if launched else 'forked'} {processes}"]
    tried = f"{number.name}, {processes} processes, checkpoint.async_mode {mode}"
    if launched:
        return _through_launcher(case, reference, tried + ", torchrun", mode, number)
    line = command(case.dump, case.world.text, checkpoint__async_mode=mode)
    launch = Launch(line, case.folder, processes)
    step = draw.randint(1, STEPS - 2)
    until(launch, lambda: reached(case.dump) >= step)
    for rank in launch.ranks:
        if rank.exitcode is None:
            os.kill(rank.pid, number)
    try:
        _check_saved(case, reference, clear(launch.wait(), number.name, asked=True))
        go_on(case, reference, line, reached(case.dump))
        _check_no_step_twice(case.dump)
    except Bad as bad:
        return Result(bad.outcome, tried, bad.found)
    return Result("ok", tried, f"no step lost after step {step}")


def _check_saved(case: Case, reference: Reference, end: End) -> None:
    """Check a run that a signal ended."""
    last = reached(case.dump)
    if last < STEPS and end.code == 0:
        raise Bad("lost", f"ended with 0 after step {last} of {STEPS}")
    if reference.newest_whole(case.dump) < last:
        raise Bad("lost", f"step {last} was trained, and "
                  f"step {reference.newest_whole(case.dump)} is the last one saved")  # fmt: skip


def _check_no_step_twice(dump: Path) -> None:
    steps = [step for step, _ in logged(dump)]
    if len(steps) != len(set(steps)):
        raise Bad("lost", f"steps were trained twice: {steps}")


def newest_there(dump: Path, reference: Reference, mode: str) -> int:
    """The step that a restart has to go on from: the newest that is whole.

    A save that must have been complete, because later steps were trained, is asked for even if its
    folder is gone.
    """
    last = reached(dump)
    saved = (last - 1) // INTERVAL * INTERVAL if last else 0
    if mode != "disabled":
        saved -= INTERVAL
    return max(saved, reference.newest_whole(dump))


def reached(dump: Path) -> int:
    """The last step in the metrics."""
    return max((step for step, _ in logged(dump)), default=0)


def _kill_inside(
    dump: Path, rank: int, change: int, everyone: bool, removals: bool, this: int
) -> None:
    if this == rank:
        events = {"events": REMOVALS} if removals else {}
        on_change(dump / "checkpoint", kill_at(change, everyone), **events)


def _moment(case: Case, reference: Reference, trigger: str) -> tuple[str, Callable[[], bool]]:
    """A moment in words, and a test for it."""
    draw, folder = case.random, case.dump / "checkpoint"
    if trigger == "time":
        seconds = draw.uniform(0, reference.seconds * 1.1)
        deadline = time.monotonic() + seconds
        return f"after {seconds:.2f} s", lambda: time.monotonic() > deadline
    step = draw.randint(1, STEPS)
    if trigger == "step":
        return f"at step {step}", lambda: reached(case.dump) >= step
    sign, saved = draw.choice(SIGNS), step + step % INTERVAL
    path = folder / f"step-{saved}"
    tests = {
        SIGNS[0]: path.exists,
        SIGNS[1]: lambda: any(path.glob("*.distcp")),
        SIGNS[2]: lambda: any(path.glob(".metadata*")),
        SIGNS[3]: lambda: path.exists() and not (folder / f"step-{saved - 3 * INTERVAL}").exists(),
    }
    return f"at the sight of {sign} of step {saved}", tests[sign]


def _through_launcher(
    case: Case, reference: Reference, tried: str, mode: str, number: signal.Signals
) -> Result:
    """Signal ``lighthouse train`` itself, and start it again."""
    line = command(case.dump, case.world.text, checkpoint__async_mode=mode,
                   model__flavor="debugmodel")  # fmt: skip
    config = case.folder / "empty.toml"
    config.write_text("")
    # The launcher's own check would import the trainer once more.
    words = ["train", str(config), "--processes", str(reference.processes), "--no-check", *line]

    def start() -> Launch:
        from lighthouse_commands.main import main

        return Launch([], case.folder, main=lambda: main(words), launcher=True)

    launch = start()
    step = case.random.randint(1, STEPS - 2)
    until(launch, lambda: reached(case.dump) >= step)
    if launch.running:
        os.kill(launch.ranks[0].pid, number)
    try:
        end = launch.wait(LAUNCHER_LIMIT)
        if not all_gone(20):
            kill_descendants()
            raise Bad("hang", "training processes outlive their launcher by 20 s")
        if number == signal.SIGKILL:
            least = newest_there(case.dump, reference, mode)
        else:
            _check_saved(case, reference, clear(end, number.name, asked=True))
            least = reached(case.dump)
        before = len(logged(case.dump))
        end = clear(start().wait(LAUNCHER_LIMIT), "restart")
        if end.code:
            raise Bad("lost", f"does not go on by itself: {end.message or end.log[-300:]}")
        check_finished(case, reference, before, least)
    except Bad as bad:
        return Result(bad.outcome, f"{tried}, at step {step}", bad.found)
    return Result("ok", f"{tried}, launcher, at step {step}", f"went on from step {least}")
