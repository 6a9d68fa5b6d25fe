"""Where training text comes from: every source gives documents, each a row with a ``text``."""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetBuilder, IterableDataset, load_dataset, load_dataset_builder

from ..errors import UserValueError
from .origins import blank_line, first_fault
from .text_files import TextFiles, one_line

# Suffix of a file -> name of the reader in Hugging Face datasets.
FILE_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")


@dataclass(frozen=True)
class TextSource:
    """Documents, and what identifies them.

    Attributes:
        open: starts at the first document; the order is the same every time.
        fingerprint: changes when the documents change, which makes saved positions void.
        is_local: whether the documents can be read ahead without a network.
        files: the files that hold the documents, in this order; None if messages cannot name them.
    """

    open: Callable[[], IterableDataset]
    fingerprint: str
    is_local: bool
    files: TextFiles | None = None


def c4(split: str, path: str | None, key: str) -> TextSource:
    """English C4, streamed from the Hugging Face hub or from a mirror of it at ``path``.

    Raises:
        ValueError: from ``open``, if the hub or the mirror cannot be reached.
    """
    name = path or "allenai/c4"

    def open_documents() -> IterableDataset:
        try:
            return load_dataset(name, name="en", split=split, streaming=True)
        except Exception as error:
            raise UserValueError(
                f"{key}.dataset = 'c4' cannot be streamed from {name}: {error}; check the network, "
                f"or use {key}.dataset = 'c4_local' with a folder"
            ) from error

    return TextSource(open_documents, name, is_local=False)


def c4_local(split: str, path: str | None, key: str) -> TextSource:
    """A folder of JSON lines, Parquet, Arrow or text files, read in place.

    Raises:
        ValueError: as ``local_files``, or the first file cannot be read.
    """
    files, builder, fingerprint = _local_files(split, path, key)
    try:
        splits = builder.as_streaming_dataset()
    except Exception as error:
        raise UserValueError(
            f"{key}.dataset_path = '{path}' cannot be read as {files.kind}: "
            f"{_fault_at_the_start(files.kind, builder, error)}; mend or remove it"
        ) from error
    # Without a split's name, the builder gives all splits by name.
    assert isinstance(splits, dict)
    return TextSource(lambda: splits[split], fingerprint, is_local=True, files=files)


def _fault_at_the_start(kind: str, builder: DatasetBuilder, error: Exception) -> str:
    """The fault in the first file of the first split, which the columns are told from."""
    first = next(iter((builder.config.data_files or {}).values()))
    files = TextFiles(kind, tuple(first))
    fault = first_fault(files, 0, 0, error)
    # A blank line is a fault only if nothing else is.
    return (blank_line(files) if one_line(error) in fault else None) or fault


def local_files(split: str, path: str | None, key: str) -> TextFiles:
    """The files of a split of ``c4_local``, in the order in which training reads them.

    Hugging Face datasets tells from the names of the files which split each belongs to.

    Raises:
        ValueError: the folder is missing, holds no files or files of several kinds, or has no such
            split.
    """
    return _local_files(split, path, key)[0]


def _local_files(split: str, path: str | None, key: str) -> tuple[TextFiles, DatasetBuilder, str]:
    """The files of the split, the builder that reads them, and the folder's fingerprint."""
    folder, kind, fingerprint = _folder(path, key)
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    try:
        builder = load_dataset_builder(kind, data_dir=str(folder), **options)
    except Exception as error:
        raise UserValueError(
            f"{key}.dataset_path = '{path}' cannot be read as {kind}: {one_line(error)}; "
            "mend or remove the file"
        ) from error
    paths = builder.config.data_files or {}
    if split not in paths:
        others = ", ".join(map(str, paths))
        raise UserValueError(
            f"{key}.dataset_path = '{path}' has no {split} split, only {others}; "
            f"give it files with '{split}' in their name, or use another {key}.dataset_path"
        )
    return TextFiles(kind, tuple(paths[split])), builder, fingerprint


def _folder(path: str | None, key: str) -> tuple[Path, str, str]:
    """The folder, the kind of its files, and a hash of their names and sizes."""
    if not path:
        raise UserValueError(
            f"{key}.dataset = 'c4_local' needs a folder; pass --{key}.dataset_path FOLDER"
        )
    folder = Path(path)
    if not folder.is_dir():
        raise UserValueError(
            f"{key}.dataset_path = '{path}' is not a folder; pass --{key}.dataset_path FOLDER "
            "with the folder that holds the text"
        )
    files = {file: kind for file in sorted(folder.rglob("*")) if (kind := _file_kind(file))}
    kinds = sorted(set(files.values()))
    if len(kinds) != 1:
        found = f"files of {len(kinds)} kinds ({', '.join(kinds)})" if kinds else "no readable file"
        raise UserValueError(
            f"{key}.dataset_path = '{path}' holds {found}; give it files of one kind of "
            f"{', '.join(FILE_KINDS)}, the JSON and text ones compressed or not"
        )
    listing = "\n".join(f"{file.relative_to(folder)} {file.stat().st_size}" for file in files)
    return folder, kinds[0], _digest(listing)


def _file_kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return FILE_KINDS.get(suffixes[-1]) if suffixes and path.is_file() else None


def python_stdlib(split: str, path: str | None, key: str) -> TextSource:
    """Source text of the running interpreter's standard library: real text on any machine.

    Tests and installed packages are left out. Files are sorted by a hash of their path, so that
    neighbours differ. The same hash holds out one file in twenty for validation.

    Raises:
        ValueError: the interpreter has no source text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for file in _library_files(root):
        rank = _digest(file.relative_to(root).as_posix())
        if (int(rank, 16) % 20 == 0) == (split == "validation"):
            documents.append((rank, file))
    texts = []
    for _, file in sorted(documents):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            texts.append(text)
    if not texts:
        raise UserValueError(
            f"{key}.dataset = 'python_stdlib': this interpreter has no source text in {root}; "
            f"use {key}.dataset = 'c4_local' with a folder of your own"
        )
    dataset = Dataset.from_dict({"text": texts})
    return TextSource(dataset.to_iterable_dataset, _digest("\0".join(texts)), is_local=True)


def _library_files(root: Path) -> Iterator[Path]:
    """The modules below ``root``, without tests and installed packages."""
    left_out = {"test", "tests", "idle_test", "__pycache__"}
    for folder, subfolders, names in os.walk(root):
        # Folders of installed packages end in "-packages" in every distribution of Python. Most
        # files are in them, so they are not even entered.
        subfolders[:] = [
            name for name in subfolders if name not in left_out and not name.endswith("-packages")
        ]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ``training.dataset`` or ``validation.dataset`` -> function of split, dataset_path and section.
SOURCES: dict[str, Callable[[str, str | None, str], TextSource]] = {
    "c4": c4,
    "c4_local": c4_local,
    "python_stdlib": python_stdlib,
}


def find_source(name: str, split: str, path: str | None, key: str) -> TextSource:
    """The source that ``{key}.dataset = name`` means.

    Args:
        split: "train" or "validation".
        path: value of ``{key}.dataset_path``.
        key: section of the configuration that names the source, for messages.

    Raises:
        ValueError: the source is unknown or cannot be opened.
    """
    if name not in SOURCES:
        raise UserValueError(
            f"{key}.dataset = '{name}' is not known; use one of {', '.join(SOURCES)}"
        )
    return SOURCES[name](split, path, key)
