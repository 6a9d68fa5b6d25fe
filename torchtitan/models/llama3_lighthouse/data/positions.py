"""Positions in the text as a checkpoint holds them: JSON, which runs no code when it is read."""

import base64
import json
import operator
from typing import Any

import numpy as np

from ..errors import UserValueError
from .older_positions import is_older_reader, read_pickle

START_OVER = (
    "pass --checkpoint.exclude_from_loading dataloader to start the text over on purpose, with "
    "weights and optimizer as saved"
)
COUNTS = ("sequences", "epoch", "documents", "empty", "cut")


def encode(state: dict[str, Any]) -> str:
    """JSON of a state, with a buffer of tokens, int32 [tokens], in base64."""
    buffer = state.get("buffer")
    if buffer is not None:
        contents = base64.b64encode(buffer.astype("<i4").tobytes()).decode()
        state = {**state, "buffer": contents}
    # Numbers of numpy count as well.
    return json.dumps(state, default=operator.index)


def decode(saved: Any, name: str) -> dict[str, Any]:
    """The state that ``encode``, or an older version, made.

    Args:
        saved: JSON, or the bytes of a pickle from an older version.
        name: of the entry in the loader's state, for messages.

    Raises:
        ValueError: it is damaged, or is no such thing.
    """
    try:
        if isinstance(saved, bytes):
            state = read_pickle(saved)
        else:
            state = json.loads(saved)
            if isinstance(state, dict) and "buffer" in state:
                contents = base64.b64decode(state["buffer"], validate=True)
                state["buffer"] = np.frombuffer(contents, dtype="<i4").astype(np.int32)
    # A damaged pickle raises nearly anything.
    except Exception as error:
        raise unreadable(name, f"{type(error).__name__}: {error}") from None
    if not isinstance(state, dict):
        raise unreadable(name, f"it holds a {type(state).__name__}, not a position")
    return state


def check_stream(state: dict[str, Any], start: dict[str, Any], name: str) -> None:
    """Check the decoded state of a stream before anything is read from there.

    Args:
        start: the state of the same stream at its beginning.

    Raises:
        ValueError: it has other parts than ``start``, or impossible ones.
    """
    # Empty documents were an error when positions did not count them yet.
    state.setdefault("empty", 0)
    # Positions once held all that was left of the last document.
    state.setdefault("cut", 0)
    buffer = state.get("buffer")
    if not isinstance(buffer, np.ndarray) or (buffer < 0).any():
        raise unreadable(name, "'buffer' holds no tokens")
    # Sequences whose documents see each other do not keep where these begin.
    begins = state.setdefault("begins", [])
    places = isinstance(begins, list) and all(map(_is_count, begins))
    # The first place is the beginning of another document than that of the buffer's first token.
    if not places or sorted({0, *begins}) != [0, *begins] or max(begins, default=-1) >= len(buffer):
        raise unreadable(name, "'begins' holds no places in 'buffer', in rising order")
    for key in COUNTS:
        if not _is_count(state.get(key)):
            raise unreadable(name, f"'{key}' is no number from 0 on")
    # Such a place is not read: the stream counts documents.
    if is_older_reader(state.get("data")) and not is_older_reader(start["data"]):
        return
    if problem := _differs(state.get("data"), start["data"]):
        raise unreadable(name, f"'data{problem}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _differs(saved: Any, start: Any) -> str | None:
    """The first part of a reader's position that is not formed as at the beginning."""
    if isinstance(start, dict):
        if not isinstance(saved, dict) or saved.keys() != start.keys():
            return f"' is not made of {', '.join(map(str, start))}"
        for key, value in start.items():
            if value is None and saved[key] is not None:
                # A part that begins as None becomes an earlier state of the reader beside it.
                value = start.get("examples_iterable", 0)
            if problem := _differs(saved[key], value):
                return f".{key}{problem}"
    elif isinstance(start, int) and not _is_count(saved):
        return "' is no number from 0 on"
    elif isinstance(start, str) and saved != start:
        return f"' is not {start!r}"
    return None


def unreadable(name: str, problem: str) -> UserValueError:
    """The error of a position that does not name a place in the text."""
    return UserValueError(
        f"the checkpoint's entry 'dataloader.{name}' holds no position in the text: {problem}; "
        f"use an older checkpoint, or {START_OVER}"
    )
