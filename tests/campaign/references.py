"""Undisturbed runs, which the campaign compares all others with."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from .events import count_in, on_change
from .readings import READINGS
from .runs import FLAVOR, FORKS, STEPS, Launch, command

# A run that stopped after step DAMAGED; its checkpoint before that is of step OLDER.
OLDER, DAMAGED = 6, 8
NAMES = ("forked 1", "forked 2", "launched 1", "launched 2")


@dataclass(frozen=True)
class Reference:
    """An undisturbed run that saved every step and kept all checkpoints.

    Attributes:
        losses: each step's loss, in hexadecimal.
        events: file operations in the checkpoint folder, by rank, of a run that purges.
        seconds: how long that run took.
        digests: of the weights, by step and by the reading that read them.
    """

    folder: Path
    processes: int
    losses: dict[int, str]
    events: list[int] = field(default_factory=list)
    seconds: float = 0.0
    digests: dict[int, dict[str, str]] = field(default_factory=dict)

    def checkpoint(self, step: int) -> Path:
        return self.folder / "dump" / "checkpoint" / f"step-{step}"

    def newest_whole(self, dump: Path) -> int:
        """The last step in a dump folder of which every file is there in full; 0 without one."""
        whole = [0]
        for path in (dump / "checkpoint").glob("step-*"):
            number = path.name.removeprefix("step-")
            sizes = _sizes(path)
            if number.isdigit() and sizes and _sizes(self.checkpoint(int(number))) == sizes:
                whole.append(int(number))
        return max(whole)

    def problem(self, dump: Path, first: int = 1) -> str:
        """How a run's losses differ, or "" if all are equal and there from step ``first`` on."""
        seen = set()
        for step, loss in logged(dump):
            if loss != self.losses[step]:
                return f"loss of step {step} is {loss}, undisturbed {self.losses[step]}"
            seen.add(step)
        missing = sorted(set(range(first, STEPS + 1)) - seen)
        return f"steps {missing} were not trained" if missing else ""


def _sizes(path: Path) -> dict[str, int]:
    """Sizes of the files that hold a checkpoint's state; the metadata is only there or not."""
    if not (path / ".metadata").is_file():
        return {}
    return {file.name: file.stat().st_size for file in path.glob("*.distcp")}


def logged(dump: Path) -> list[tuple[int, str]]:
    """Step and exact loss of every line of a run's metrics, in the order of the lines."""
    file, found = dump / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            # A kill cut it off.
            continue
        if "loss_metrics/global_avg_loss" in entry:
            found.append((entry["step"], float(entry["loss_metrics/global_avg_loss"]).hex()))
    return found


def reference(name: str, text: Path, folder: Path) -> Reference:
    """Train ``name`` twice: once saving every step, once as the disturbed runs do.

    Raises:
        RuntimeError: a run fails, or the two differ.
    """
    kind, number = name.split()
    processes = int(number)
    flavor = FLAVOR if kind == "forked" else "debugmodel"
    kept = folder / "dump"
    # A signal has a run save any step.
    settings = {"checkpoint__interval": 1, "checkpoint__keep_latest_k": 0}
    line = command(kept, text, model__flavor=flavor, **settings)
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
