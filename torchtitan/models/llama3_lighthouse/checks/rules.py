"""Rules that the value of one key keeps, each with the words of its message."""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

# torch and the files of a checkpoint hold integers of 64 bits.
MOST = 2**63 - 1
# File systems take names of so many bytes; paths end well below their own limit, for what is added.
LONGEST_NAME, LONGEST_PATH = 255, 3000
NO_NUL = "must not hold the character NUL"
MODULE = re.compile(r"tok_embeddings|layers\.(0|[1-9]\d{0,4})|norm|output", re.ASCII)
# torch turns seconds into nanoseconds of 64 bits; ten years are far below that.
MOST_SECONDS = 10 * 365 * 24 * 3600


class Rule:
    """A rule of one key. This one takes every value of the key's type."""

    def fault(self, value: Any, default: Any) -> str | None:
        """The end of the message, such as "must be at least 1", or None if ``value`` keeps it.

        Args:
            value: of the key's type, and not None.
            default: the key's default.
        """
        return None

    def fix(self, key: str) -> str:
        """The part of the message that says what to do."""
        return f"pass --{key} with another value"


@dataclass(frozen=True)
class Between(Rule):
    """A finite number from ``least`` to ``most``, or one of ``besides``.

    Attributes:
        above: whether ``least`` itself is left out.
        below: whether ``most`` itself is left out.
        note: what a special value means, for the message.
        unit: what stands for the value in the fix.
    """

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False
    besides: tuple[int, ...] = ()
    note: str = ""
    unit: str = "X"

    def fault(self, value: Any, default: Any) -> str | None:
        # The comparisons are false for NaN as well.
        enough = value > self.least if self.above else value >= self.least
        few_enough = value < self.most if self.below else value <= self.most
        if value in self.besides or (enough and few_enough and value != math.inf):
            return None
        bounds = [f"{'above' if self.above else 'at least'} {_number(self.least)}"]
        if self.most < MOST:
            bounds.append(f"{'below' if self.below else 'at most'} {_number(self.most)}")
        finite = "" if math.isfinite(value) else "finite, "
        return f"must be {finite}{' and '.join(bounds)}{f' ({self.note})' if self.note else ''}"

    def fix(self, key: str) -> str:
        return f"pass --{key} {self.unit}"


def count(least: int = 1, most: int = MOST, note: str = "", besides: tuple[int, ...] = ()) -> Rule:
    """The rule of an integer."""
    return Between(least, most, note=note, besides=besides, unit="N")


def number(least: float, most: float = math.inf, above: bool = False, below: bool = False) -> Rule:
    """The rule of a float."""
    return Between(least, most, above, below)


@dataclass(frozen=True)
class Text(Rule):
    """Text that an operating system takes as an argument, or as a path.

    Attributes:
        empty: whether it may be empty.
        path: whether it names a file or folder.
    """

    empty: bool = True
    path: bool = False

    def fault(self, value: Any, default: Any) -> str | None:
        if "\0" in value:
            return NO_NUL
        if not self.empty and not value.strip():
            return "must not be empty"
        try:
            names = [name.encode() for name in value.split("/")]
        except UnicodeEncodeError:
            return "must be text that UTF-8 can hold"
        if self.path and (max(map(len, names)) > LONGEST_NAME or len(value) > LONGEST_PATH):
            return f"must not hold a name of more than {LONGEST_NAME} bytes"
        return None

    def fix(self, key: str) -> str:
        return f"pass --{key} {'PATH' if self.path else 'TEXT'}"


@dataclass(frozen=True)
class OneOf(Rule):
    """One of the names that the trainer knows."""

    known: Collection[str]

    def fault(self, value: Any, default: Any) -> str | None:
        return None if value in self.known else f"is not known; use one of {', '.join(self.known)}"

    def fix(self, key: str) -> str:
        return f"pass --{key} NAME"


@dataclass(frozen=True)
class Names(Rule):
    """A list that holds each item once.

    Attributes:
        known: the names that it may hold; None if others judge that.
        needed: whether it must hold at least one.
    """

    known: Collection[str] | None = None
    needed: bool = False

    def fault(self, value: Any, default: Any) -> str | None:
        # TOML may hold one name as text where upstream takes both.
        items = [value] if isinstance(value, str) else value
        unknown = [item for item in items if self.known is not None and item not in self.known]
        if unknown:
            return f"names {shown(unknown)}, not known here; use {', '.join(self.known or ())}"
        if len(set(items)) < len(items):
            return "names one twice; name each once"
        if self.needed and not items:
            return "must name at least one"
        if any("\0" in str(item) for item in items):
            return NO_NUL
        return None

    def fix(self, key: str) -> str:
        return f"pass --{key} with others"


@dataclass(frozen=True)
class Modules(Names):
    """Lists of names of a Llama's modules. Pipelines judge whether all of them are there."""

    def fault(self, value: Any, default: Any) -> str | None:
        names = [name for part in value for name in part]
        unknown = [name for name in names if not MODULE.fullmatch(name)]
        if unknown:
            return f"names {shown(unknown)}; use tok_embeddings, layers.0 and so on, norm, output"
        return None


@dataclass(frozen=True)
class Default(Rule):
    """A key that this trainer ignores or cannot serve, so that only its default is true of a run.

    Attributes:
        reason: why, as the end of a sentence that begins with the key and its value.
        instead: what to do.
    """

    reason: str = "is not read by this trainer"
    instead: str = ""

    def fault(self, value: Any, default: Any) -> str | None:
        return None if value == default else self.reason

    def fix(self, key: str) -> str:
        return self.instead or f"leave {key} out"


@dataclass(frozen=True)
class Where(Rule):
    """A text that a function of another module judges."""

    test: Callable[[Any], bool]
    words: str

    def fault(self, value: Any, default: Any) -> str | None:
        # Tests may take a while, and every default passes.
        return None if value == default or self.test(value) else self.words


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def shown(value: Any) -> str:
    """A value for a message: short, and true and false as TOML writes them."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"
