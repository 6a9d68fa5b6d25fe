"""Undisturbed runs, which the campaign compares all others with."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .events import count_in, on_change
from .readings import READINGS
from .runs import FLAVOR, FORKS, STEPS, Launch, Reference, command, logged

# A run that stopped after step DAMAGED; its checkpoint before that is of step OLDER.
OLDER, DAMAGED = 6, 8
NAMES = ("forked 1", "forked 2", "launched 1", "launched 2")


def reference(name: str, text: Path, folder: Path) -> Reference:
    """Train ``name`` twice: once keeping all checkpoints, once as the disturbed runs do.

    Raises:
        RuntimeError: a run fails, or the two differ.
    """
    kind, number = name.split()
    processes = int(number)
    flavor = FLAVOR if kind == "forked" else "debugmodel"
    kept = folder / "dump"
    line = command(kept, text, model__flavor=flavor, checkpoint__keep_latest_k=0)
    losses = dict(logged(kept)) if _train(line, folder, processes) else {}
    found = Reference(folder, processes, losses)
    if sorted(losses) != list(range(1, STEPS + 1)):
        raise RuntimeError(f"{name}: the undisturbed run has steps {sorted(losses)}")

    purging = folder / "purging"
    counters = [FORKS.Value("i") for _ in range(processes)]
    seconds = _train(
        command(purging, text, model__flavor=flavor),
        folder,
        processes,
        lambda rank: on_change(purging / "checkpoint", count_in(counters[rank])),
    )
    if problem := found.problem(purging):
        raise RuntimeError(f"{name}: undisturbed runs differ: {problem}")
    events = [counter.value for counter in counters]
    digests = {step: _digests(found.checkpoint(step), folder) for step in (OLDER, DAMAGED)}
    return replace(found, events=events, seconds=seconds, digests=digests)


def _digests(checkpoint: Path, folder: Path) -> dict[str, str]:
    """Digests of a sound checkpoint's weights, by the name of the reading."""
    found = {}
    for reading in READINGS:
        end, digest = reading(checkpoint, folder)
        if not digest:
            raise RuntimeError(f"{checkpoint} cannot be read: {end.message or end.log}")
        found[reading.__name__] = digest
    return found


def _train(
    line: list[str], folder: Path, processes: int, inside: Callable[[int], None] | None = None
) -> float:
    """Seconds that a run took, which must succeed."""
    start = time.monotonic()
    end = Launch(line, folder, processes, inside).wait()
    if end.code or end.hung:
        raise RuntimeError(f"the undisturbed run in {folder} failed: {end.message or end.log}")
    return time.monotonic() - start
