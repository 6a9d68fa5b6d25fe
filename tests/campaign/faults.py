"""Full, failing, read-only and slow disks, and folders that vanish under a run."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from .cases import Bad, Case, Result, check_finished, clear
from .events import fail_at, on_change, slow_by
from .kills import reached
from .references import Reference, logged
from .runs import LIMIT, STEPS, End, Launch, command, until

COUNT = 60
ERRORS = (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.EDQUOT)
ENOUGH = "64m"
# Words for the cause of a fault that has no error number.
CAUSES = {
    "gone": ("removed", "gone", "no such file", "missing"),
    "a file": ("not a directory", "not a folder", "file exists", "is a file", "not a dir"),
    "full": ("no space", "disk is full", "file too large", "bytes"),
}
VANISHED = CAUSES["gone"] + CAUSES["a file"]
Fault = Callable[[Case, Reference], tuple[str, End, tuple[str, ...]]]


def failing(case: Case, reference: Reference) -> tuple[str, End, tuple[str, ...]]:
    """One operation on files fails, or all from one on."""
    draw = case.random
    number, for_good = draw.choice(ERRORS), draw.random() < 0.6
    rank = draw.randrange(reference.processes)
    change = draw.randint(1, reference.events[rank] + 4)
    below = case.dump if draw.random() < 0.3 else case.dump / "checkpoint"

    def inside(this: int) -> None:
        if this == rank:
            on_change(below, fail_at(change, number, for_good))

    tried = f"{errno.errorcode[number]} at file operation {change} of rank {rank} in {below.name}"
    end = _train(case, reference, inside)
    return f"{tried}{', for good' if for_good else ''}", end, (os.strerror(number).lower(),)


def full(case: Case, reference: Reference) -> tuple[str, End, tuple[str, ...]]:
    """The disk has room for some checkpoints, or files must not grow beyond a size."""
    files = list(reference.checkpoint(STEPS).iterdir())
    size = sum(file.stat().st_size for file in files)
    if _mount(case.dump, "64k"):
        room = round(size * case.random.uniform(0.2, 3.5))
        _mount(case.dump, str(room), again=True)
        return f"a disk of {room} bytes", _train(case, reference), CAUSES["full"]
    most = case.random.randrange(1, max(file.stat().st_size for file in files))

    def inside(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    return f"files of at most {most} bytes", _train(case, reference, inside), CAUSES["full"]


def vanishing(case: Case, reference: Reference) -> tuple[str, End, tuple[str, ...]]:
    """The dump or checkpoint folder goes during the run, and a file may take its place."""
    draw = case.random
    folder = draw.choice((case.dump, case.dump / "checkpoint"))
    as_file, step = draw.random() < 0.5, draw.randint(1, STEPS - 2)
    launch = Launch(command(case.dump, case.world.text), case.folder, reference.processes)
    until(launch, lambda: reached(case.dump) >= step)
    aside = case.folder / "aside"
    if folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside)
    if as_file and not folder.exists():
        folder.write_text("in the way")
    end = launch.wait()
    if folder.is_file():
        folder.unlink()
    how = "made a file" if as_file else "removed"
    return f"{folder.name} {how} at step {step}", end, VANISHED


def in_the_way(case: Case, reference: Reference) -> tuple[str, End, tuple[str, ...]]:
    """A file lies where a folder has to be, from the beginning."""
    folder = case.random.choice((case.dump, case.dump / "checkpoint"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("in the way")
    end = _train(case, reference)
    if folder.is_file():
        folder.unlink()
    return f"{folder.name} is a file", end, CAUSES["a file"]


def slow(case: Case, reference: Reference) -> tuple[str, End, tuple[str, ...]]:
    """Each operation on files takes its time; nothing may fail."""
    seconds = case.random.uniform(0.01, 0.05)

    def inside(rank: int) -> None:
        on_change(case.dump, slow_by(seconds))

    return f"each file operation takes {seconds:.2f} s", _train(case, reference, inside), ()


FAULTS: tuple[tuple[Fault, int], ...] = (
    (failing, 32), (full, 12), (vanishing, 10), (in_the_way, 3), (slow, 3),
)  # fmt: skip


def break_disk(case: Case) -> Result:
    """Train on a disk with a fault; then mend it, and go on."""
    kinds = [fault for fault, weight in FAULTS for _ in range(weight)]
    reference = case.world.references[f"forked {case.random.choice((1, 1, 2))}"]
    with _unmounted(case.dump):
        tried, end, words = kinds[case.number % len(kinds)](case, reference)
        tried += f", {reference.processes} processes"
        try:
            return Result(_judge(case, reference, end, words), tried, end.message)
        except Bad as bad:
            return Result(bad.outcome, tried, bad.found)


def _judge(case: Case, reference: Reference, end: End, words: tuple[str, ...]) -> str:
    clear(end, "run")
    if end.code:
        text = end.message.lower()
        if str(case.dump) not in end.message or not any(word in text for word in words):
            raise Bad("traceback", f"the message lacks path or cause: {end.message}")
    # A run that could not save its last step has to say so, unless the folder went after that.
    elif words != VANISHED and reference.newest_whole(case.dump) != STEPS:
        raise Bad("lost", "ended well, and the last checkpoint is not whole")
    _mount(case.dump, ENOUGH, again=True)
    least, before = reference.newest_whole(case.dump), len(logged(case.dump))
    again = Launch(command(case.dump, case.world.text), case.folder, reference.processes)
    ended = clear(again.wait(LIMIT), "restart")
    if ended.code:
        raise Bad("lost", f"does not go on by itself: {ended.message or ended.code}")
    # The metrics of a folder that was removed are gone with it.
    check_finished(case, reference, before, least, STEPS + 1 if words == VANISHED else 1)
    return "refused" if end.code else "ok"


def _train(case: Case, reference: Reference, inside: Callable[[int], None] | None = None) -> End:
    mode = case.random.choice(("disabled", "disabled", "async"))
    line = command(case.dump, case.world.text, checkpoint__async_mode=mode)
    return Launch(line, case.folder, reference.processes, inside).wait()


def _mount(folder: Path, size: str, again: bool = False) -> bool:
    """Put a disk of its own at ``folder``, or change the size of the one there."""
    if again and not os.path.ismount(folder):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    options = f"{'remount,' if again else ''}size={size}"
    line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(line, capture_output=True).returncode == 0
    except OSError:
        return False


@contextmanager
def _unmounted(folder: Path) -> Generator[None]:
    """Take away the disk that a case mounted."""
    try:
        yield
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)
