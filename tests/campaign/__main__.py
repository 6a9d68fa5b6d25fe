"""Disturb training in every way that the campaign knows, and count how it ends.

    python -m tests.campaign --seed 0 --jobs 16
    python -m tests.campaign --only kills --case 17

It ends with 1 if a case was silently wrong, lost work, ended in a traceback, hung, or ran code out
of a file. Then it shows each of these, and how to repeat it alone.
"""

import argparse
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from . import corruptions, faults, kills, malicious, non_finite, settings, texts
from .cases import Bad, Case, Result, World, adopt_orphans, kill_descendants
from .references import NAMES, reference
from .report import Entry, table, write
from .runs import FORKS, warm_up, write_text

# Seconds for a case with all its launches, and between lines of progress.
CASE_LIMIT, PROGRESS = 700.0, 5.0
CLASSES: dict[str, tuple[int, Callable[[Case], Result]]] = {
    "kills": (kills.KILLS, kills.kill),
    "corruptions": (corruptions.COUNT, corruptions.corrupt),
    "faults": (faults.COUNT, faults.break_disk),
    "texts": (texts.BROKEN, texts.break_text),
    "changed-texts": (texts.CHANGED, texts.change_text),
    "malicious": (malicious.COUNT, malicious.attack),
    "numbers": (non_finite.COUNT, non_finite.poison),
    "configurations": (settings.COUNT, settings.configure),
    "signals": (kills.TERMINATIONS, kills.terminate),
}
# Classes some of whose cases go through the launcher, which knows the ordinary models alone.
LAUNCHED = {"kills", "signals"}
# Classes that compare with no undisturbed run.
ALONE = {"configurations"}


@dataclass(frozen=True)
class Task:
    """Work for a fork, which pickles what ``work`` returns into a file in ``folder``."""

    name: tuple[str, int]
    folder: Path
    work: Callable[[], Any]


def in_forks(tasks: Iterable[Task], jobs: int, limit: float) -> Iterable[tuple[Task, Any, float]]:
    """Run tasks in ``jobs`` forks at a time; yields each result, an exception among them."""
    waiting, running = list(tasks), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop(0)
            task.folder.mkdir(parents=True, exist_ok=True)
            process = FORKS.Process(target=_work, args=(task,))
            process.start()
            running[process.sentinel] = task, process, time.monotonic()
        wait(list(running), 0.5)
        for sentinel, (task, process, start) in list(running.items()):
            seconds = time.monotonic() - start
            if process.is_alive() and seconds < limit:
                continue
            late = process.is_alive()
            if late:
                process.terminate()
            process.join()
            del running[sentinel]
            file = task.folder / "result.pickle"
            if file.exists():
                result = pickle.loads(file.read_bytes())
            else:
                result = Result("hang", f"the case took more than {limit:.0f} s") if late else (
                    RuntimeError(f"{task.name} ended with {process.exitcode}"))  # fmt: skip
            yield task, result, seconds


def _work(task: Task) -> None:
    def stop(number: int, frame: object) -> None:
        kill_descendants()
        os._exit(1)

    adopt_orphans()
    signal.signal(signal.SIGTERM, stop)
    # The campaign itself ends all of its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result: Any = task.work()
    except Bad as bad:
        result = Result(bad.outcome, "", bad.found)
    except Exception:
        result = RuntimeError(traceback.format_exc())
    finally:
        kill_descendants()
    file = task.folder / "result.pickle"
    part = file.with_suffix(".part")
    part.write_bytes(pickle.dumps(result))
    part.replace(file)


def parse(line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the cases; default: 0")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="cases at a time; default: the cores"
    )
    parser.add_argument("--only", choices=CLASSES, action="append", help="one class; repeatable")
    parser.add_argument("--case", type=int, action="append", help="one case of it; repeatable")
    parser.add_argument("--share", type=float, default=1.0, help="run this part; default: 1.0")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/campaign"), help="takes campaign.md and .json"
    )
    parser.add_argument(
        "--scratch", type=Path, help="takes what the runs write; default: a temporary folder"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the folders of bad cases, for a look"
    )
    options = parser.parse_args(line)
    if options.jobs < 1 or not 0 < options.share <= 1:
        parser.error("--jobs must be at least 1, and --share above 0 and at most 1")
    return options


def chosen(options: argparse.Namespace) -> list[tuple[str, int]]:
    """The cases to run, in an order that spreads the classes."""
    found = []
    for kind, (count, _) in CLASSES.items():
        if options.only and kind not in options.only:
            continue
        numbers = list(range(count))
        if options.case is not None:
            numbers = options.case
        elif options.share < 1:
            drawn = random.Random(f"{options.seed} share {kind}")
            numbers = drawn.sample(numbers, max(1, round(count * options.share)))
        found += [(kind, number) for number in numbers]
    random.Random(options.seed).shuffle(found)
    return found


def main(line: list[str] | None = None) -> int:
    """Run the campaign; returns the exit code."""
    options = parse(line)
    scratch = Path(tempfile.mkdtemp(prefix="campaign-", dir=options.scratch))
    print(f"importing the trainer; runs write to {scratch}", flush=True)
    # Forks cannot share a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warm_up()
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _campaign(options, scratch)
    except KeyboardInterrupt:
        return 130
    finally:
        kill_descendants()
        if not options.keep:
            shutil.rmtree(scratch, ignore_errors=True)


def _campaign(options: argparse.Namespace, scratch: Path) -> int:
    start = time.monotonic()
    print("training without faults, to compare with", flush=True)
    classes = set(options.only or CLASSES)
    text, references = write_text(scratch / "text"), {}
    tasks = [
        Task((name, 0), folder := scratch / "references" / name.replace(" ", "-"),
             lambda name=name, folder=folder: reference(name, text, folder))
        for name in NAMES
        if classes & (LAUNCHED if name.startswith("launched") else CLASSES.keys() - ALONE)
    ]  # fmt: skip
    for task, result, _ in in_forks(tasks, options.jobs, CASE_LIMIT):
        if isinstance(result, Exception | Result):
            print(f"no campaign without undisturbed runs: {result}")
            return 2
        references[task.name[0]] = result
    world = World(scratch, text, references)

    tasks = []
    for kind, number in chosen(options):
        folder = scratch / kind / str(number)
        draw = random.Random(f"{options.seed} {kind} {number}")
        case = Case(number, options.seed, draw, folder, world)
        work = CLASSES[kind][1]
        tasks.append(Task((kind, number), folder, lambda work=work, case=case: work(case)))
    entries: list[Entry] = []
    shown = time.monotonic()
    broken = 0
    for task, result, seconds in in_forks(tasks, options.jobs, CASE_LIMIT):
        kind, number = task.name
        if isinstance(result, Exception):
            print(f"the campaign itself failed at {kind} {number}: {result}", flush=True)
            broken += 1
            continue
        entry = Entry(kind, number, options.seed, round(seconds, 2), result)
        entries.append(entry)
        if entry.bad:
            print(entry, flush=True)
        if not (entry.bad and options.keep):
            shutil.rmtree(task.folder, ignore_errors=True)
        if time.monotonic() - shown > PROGRESS or len(entries) == len(tasks):
            shown = time.monotonic()
            bad = sum(entry.bad for entry in entries)
            print(f"{len(entries)} of {len(tasks)} cases, {bad} bad, {shown - start:.0f} s",
                  flush=True)  # fmt: skip
    order = list(CLASSES)
    entries.sort(key=lambda entry: (order.index(entry.kind), entry.number))
    print(f"\n{table(entries)}\n")
    for entry in entries:
        if entry.bad:
            print(entry)
    print("written to", *write(options.output, entries, options.seed))
    return 2 if broken else int(any(entry.bad for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
