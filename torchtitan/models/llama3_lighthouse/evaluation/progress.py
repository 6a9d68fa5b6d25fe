"""Progress of a measurement or a sweep, on a terminal or in a log file."""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {percentage:.0f}% done, {remaining} left{postfix}"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit}, {elapsed} passed{postfix}"


class Progress(tqdm):
    """A bar on a terminal; elsewhere a line every ten seconds and one at the end.

    Args:
        title: what is under way.
        total: units of the whole, None if it is not known.
        unit: what is counted, in the plural.
        scaled: whether counts are written with a prefix such as k or M.
    """

    def __init__(self, title: str, total: int | None, unit: str, scaled: bool = False) -> None:
        self.on_terminal = sys.stdout.isatty()
        # The count in the last line. It begins at 0, so that no line comes before any work.
        self.shown: float = 0
        if self.on_terminal:
            options: dict[str, Any] = {"unit": f" {unit}", "dynamic_ncols": True}
        else:
            line = LINE if total else LINE_WITHOUT_TOTAL
            options = {"unit": unit, "bar_format": line, "mininterval": SECONDS_BETWEEN_LINES}
            # The last line is printed on closing.
            options["leave"] = False
        # One update may take long, so the time is looked at after each of them.
        super().__init__(
            desc=title, total=total, unit_scale=scaled, miniters=1, file=sys.stdout, **options
        )

    def advance(self, count: float, detail: str) -> None:
        """Count what was done; ``detail`` says what came out."""
        self.set_postfix_str(detail, refresh=False)
        self.update(count)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm when it is time to show something."""
        if self.on_terminal:
            super().display(msg, pos)
        # tqdm clears a bar by an empty message.
        elif msg is None and self.n != self.shown:
            self.shown = self.n
            print(self, flush=True)

    def close(self) -> None:
        """Show the last state."""
        if not self.on_terminal and not self.disable:
            self.display()
        super().close()


def say(text: str, error: bool = False) -> None:
    """Print a line without breaking the bars of a terminal."""
    stream = sys.stderr if error else sys.stdout
    if stream.isatty():
        Progress.write(text, file=stream)
    else:
        print(text, file=stream, flush=True)


def say_what_was_written(folder: Path, *names: str) -> None:
    """The last line of a command: its output folder, and those of ``names`` that are in it."""
    there = [name for name in names if (folder / name).exists()]
    say(f"wrote {folder}: {', '.join(there)}")
