"""The table at the end of a campaign, as Markdown and as JSON."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from .cases import BAD, GOOD, Result

OUTCOMES = (*GOOD, *BAD, "skipped")


@dataclass(frozen=True)
class Entry:
    """A case that ended, with all that repeats it."""

    kind: str
    number: int
    seed: int
    seconds: float
    result: Result

    @property
    def bad(self) -> bool:
        return self.result.outcome in BAD

    def __str__(self) -> str:
        result = self.result
        found = " ".join(result.found.split())
        return (
            f"{result.outcome}: {self.kind} {self.number}: {result.tried}\n    {found}\n"
            f"    again: --seed {self.seed} --only {self.kind} --case {self.number}"
        )


def table(entries: list[Entry]) -> str:
    """Counts of outcomes by class, in Markdown."""
    kinds = list(dict.fromkeys(entry.kind for entry in entries))
    shown = [name for name in OUTCOMES if name != "skipped"
             or any(entry.result.outcome == name for entry in entries)]  # fmt: skip
    rows = [["class", "cases", *shown], ["---", *["---:"] * (len(shown) + 1)]]
    for kind in [*kinds, None]:
        of_kind = [entry for entry in entries if kind in (None, entry.kind)]
        counts = Counter(entry.result.outcome for entry in of_kind)
        numbers = [len(of_kind), *(counts[name] for name in shown)]
        rows.append([kind or "all", *map(str, numbers)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(folder: Path, entries: list[Entry], seed: int) -> tuple[Path, Path]:
    """Write campaign.md and campaign.json into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data = folder / "campaign.md", folder / "campaign.json"
    markdown.write_text(f"Seed {seed}\n\n{table(entries)}\n")
    data.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
    return markdown, data
