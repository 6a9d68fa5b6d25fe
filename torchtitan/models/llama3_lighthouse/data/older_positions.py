"""Positions as older versions saved them: in pickles, of text known by its names and sizes."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset_builder

from .fingerprint import digest
from .text_folder import COMPRESSIONS, FILE_KINDS, TextFolder


class _Saved:
    """Stands for numpy's classes and functions, and keeps what the pickle says of an array."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PlainUnpickler(pickle.Unpickler):
    """Makes nothing but plain values and ``_Saved``; no function that a pickle names is called."""

    ALLOWED = {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        # The module of these two moved in numpy 2.
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no position holds")
        return _Saved


def read_pickle(saved: bytes) -> Any:
    """The value of a pickle that an older version wrote; an array of int32 is one again.

    Raises:
        Exception: it is damaged, or holds anything but plain values and a buffer of tokens.
    """
    value = _PlainUnpickler(io.BytesIO(saved)).load()
    if isinstance(value, dict) and isinstance(value.get("buffer"), _Saved):
        value["buffer"] = _tokens(value["buffer"])
    return value


def _tokens(array: _Saved) -> np.ndarray:
    """int32 [tokens], from the contents that numpy's pickle of an array has."""
    if array.state is None:
        contents, kind = array.arguments[:2]
    else:
        _, _, kind, _, contents = array.state
    if kind.arguments[0] != "i4" or kind.state[1] != "<":
        raise pickle.UnpicklingError("its buffer holds no int32")
    return np.frombuffer(contents, dtype="<i4").astype(np.int32)


def is_older_reader(place: Any) -> bool:
    """Whether a place was saved by one of the library's own readers of files.

    Older versions read local files by them too. From a place behind a long document these readers
    go on wrongly, so documents are counted instead.
    """
    if not isinstance(place, dict):
        return False
    # All of them make Arrow tables of files.
    return "Arrow" in str(place.get("type")) or is_older_reader(place.get("examples_iterable"))


def older_fingerprint(folder: TextFolder) -> str | None:
    """The fingerprint that older versions gave to a folder, by names and sizes.

    They let Hugging Face datasets tell from the names which files train, and in which order. None
    if that would be other files or another order than ``folder`` has.
    """
    root = Path(folder.path)
    files = {file: kind for file in sorted(root.rglob("*")) if (kind := _file_kind(file))}
    if set(files.values()) != {folder.kind}:
        return None
    try:
        builder = load_dataset_builder(folder.kind, data_dir=folder.path)
    # Older versions could not read the folder.
    except Exception:
        return None
    read = (builder.config.data_files or {}).get("train", [])
    if [Path(path).resolve() for path in read] != [Path(path).resolve() for path in folder.train]:
        return None
    return digest("\n".join(f"{file.relative_to(root)} {file.stat().st_size}" for file in files))


def _file_kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return FILE_KINDS.get(suffixes[-1]) if suffixes and path.is_file() else None
