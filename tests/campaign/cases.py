"""The common parts of all cases: surroundings, results, and the restart after a fault."""

import ctypes
import random
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from .references import Reference, logged
from .runs import STEPS, End, Launch

GOOD = ("ok", "harmless", "refused")
BAD = ("silent", "lost", "traceback", "hang", "executed")
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Result:
    """The end of a case.

    Attributes:
        outcome: one of ``GOOD`` or ``BAD``, or "skipped".
        tried: the fault.
        found: the reason for the outcome.
    """

    outcome: str
    tried: str
    found: str = ""


@dataclass(frozen=True)
class World:
    """Things that all cases share and only read: the text, and references by their name."""

    folder: Path
    text: Path
    references: dict[str, Reference]


@dataclass(frozen=True)
class Case:
    """One try: its number, what it draws from, and a folder of its own."""

    number: int
    seed: int
    random: random.Random
    folder: Path
    world: World

    @property
    def dump(self) -> Path:
        return self.folder / "dump"


class Bad(Exception):
    """A case ended as it must not; ``outcome`` is one of ``BAD``."""

    def __init__(self, outcome: str, found: str) -> None:
        super().__init__(outcome, found)
        self.outcome, self.found = outcome, found


def clear(end: End, doing: str, asked: bool = False) -> End:
    """``end`` itself, unless it was a hang or a crash that no message explains.

    Args:
        asked: whether a signal had asked for the end, which needs no message then.
    """
    if end.hung:
        raise Bad("hang", f"{doing}: {end.log[-600:]}")
    if crash := end.traceback or ("" if asked else end.unexplained):
        raise Bad("traceback", f"{doing}: {crash[-900:]}")
    return end


def go_on(case: Case, reference: Reference, line: list[str], least: int) -> None:
    """Start a run again, which must go on from step ``least`` or later and end as undisturbed."""
    before = len(logged(case.dump))
    end = clear(Launch(line, case.folder, reference.processes).wait(), "restart")
    if end.code:
        raise Bad("lost", f"does not go on by itself: {end.message or end.code} {end.log[-900:]}")
    check_finished(case, reference, before, least)


def check_finished(
    case: Case, reference: Reference, before: int, least: int, first: int = 1
) -> None:
    """Check a finished restart, whose metrics begin after ``before`` lines.

    Args:
        least: the step that it must have gone on from, or a later one.
        first: the first step that has to be in the metrics.
    """
    new = logged(case.dump)[before:]
    if new and new[0][0] - 1 < least:
        raise Bad("lost", f"went on from step {new[0][0] - 1}; step {least} was whole")
    if problem := reference.problem(case.dump, first):
        raise Bad("silent", problem)
    if reference.newest_whole(case.dump) != STEPS:
        raise Bad("lost", f"the checkpoint of step {STEPS} is not whole")


def adopt_orphans() -> None:
    """Become the parent of all processes below this one whose own parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[psutil.Process]:
    """Living processes below this one."""
    return [process for process in psutil.Process().children(recursive=True)
            if process.status() != psutil.STATUS_ZOMBIE]  # fmt: skip


def kill_descendants() -> None:
    for process in descendants():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


def all_gone(seconds: float) -> bool:
    """Whether all processes below this one end within ``seconds``."""
    deadline = time.monotonic() + seconds
    while descendants():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
