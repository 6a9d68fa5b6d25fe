"""Where training text comes from: every source gives documents, each a row with a ``text``."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from ..errors import UserValueError
from .fingerprint import contents_fingerprint, digest
from .older_positions import older_fingerprint
from .origins import first_fault
from .source_trees import is_held_out, package_roots, trees
from .text_files import TextFiles, shuffled
from .text_folder import read_folder


@dataclass(frozen=True)
class TextSource:
    """Documents, and what identifies them.

    Attributes:
        open: starts at the first document; the order is the same every time.
        fingerprint: changes when the documents change, which makes saved positions void. It is
            asked for only where positions are saved.
        is_local: whether the documents can be read ahead without a network.
        files: the files that hold the documents, in this order; None if messages cannot name them.
        describe: lines for the log on what is read.
        older_fingerprint: the fingerprint that older versions gave to the same documents in the
            same order without reading them, which is None if they read others; None if theirs are
            those of this version.
    """

    open: Callable[[], IterableDataset]
    fingerprint: Callable[[], str]
    is_local: bool
    files: TextFiles | None = None
    describe: Callable[[], list[str]] = list
    older_fingerprint: Callable[[], str | None] | None = None


def c4(split: str, path: str | None, key: str, shuffle_seed: int = 0) -> TextSource:
    """English C4, streamed from the Hugging Face hub or from a mirror of it at ``path``.

    Raises:
        ValueError: it is to be shuffled; from ``open``, if the hub or the mirror cannot be reached.
    """
    name = path or "allenai/c4"
    if shuffle_seed:
        raise UserValueError(
            f"lighthouse.shuffle_seed = {shuffle_seed} does not go with {key}.dataset = 'c4', "
            "which is read in the order of the hub; set it to 0, or use 'c4_local' with a folder"
        )

    def open_documents() -> IterableDataset:
        try:
            return load_dataset(name, name="en", split=split, streaming=True)
        except Exception as error:
            raise UserValueError(
                f"{key}.dataset = 'c4' cannot be streamed from {name}: {error}; check the network, "
                f"or use {key}.dataset = 'c4_local' with a folder"
            ) from error

    return TextSource(open_documents, lambda: name, is_local=False)


def c4_local(split: str, path: str | None, key: str, shuffle_seed: int = 0) -> TextSource:
    """A folder of JSON lines, Parquet, Arrow or text files, read in place.

    Raises:
        ValueError, OSError: as ``read_folder`` and ``TextFolder.files``, or the first file cannot
            be read.
    """
    folder = read_folder(path, key)
    files = folder.files(split, key, shuffle_seed)
    # Each file is a shard. The library's own readers of files resume at a wrong document if one
    # before it is long.
    data = IterableDataset.from_generator(
        _rows_of, gen_kwargs={"kind": files.kind, "paths": list(files.paths)}
    )
    try:
        next(iter(data), None)
    except Exception as error:
        raise UserValueError(
            f"{key}.dataset_path = {path!r} cannot be read as {files.kind}: "
            f"{first_fault(files, 0, 0, error)}; mend or remove it"
        ) from error
    return TextSource(
        lambda: data,
        lambda: contents_fingerprint(folder.path, files.kind, files.paths),
        is_local=True,
        files=files,
        describe=lambda: folder.describe(split, shuffle_seed),
        older_fingerprint=lambda: None if shuffle_seed else older_fingerprint(folder),
    )


def _rows_of(kind: str, paths: list[str]) -> Iterator[dict[str, Any]]:
    """The documents of files, one after another."""
    files = TextFiles(kind, tuple(paths))
    for path in paths:
        for row in files.rows(path):
            yield row.document()


def python_stdlib(split: str, path: str | None, key: str, shuffle_seed: int = 0) -> TextSource:
    """Source text of the running interpreter's standard library: real text on any machine.

    Tests and installed packages are left out. Files are sorted by a hash of their path, so that
    neighbours differ. The same hash holds out one file in twenty for validation.

    Raises:
        ValueError: the interpreter has no source text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for file in _library_files(root):
        name = file.relative_to(root).as_posix()
        rank = digest(name)
        if (int(rank, 16) % 20 == 0) == (split == "validation"):
            documents.append((shuffled(name, shuffle_seed) if shuffle_seed else rank, file))
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
    return _in_memory(texts)


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


def python_packages(split: str, path: str | None, key: str, shuffle_seed: int = 0) -> TextSource:
    """Source trees of the standard library and of installed packages (``source_trees``).

    They are sorted by a hash of their name. One package in ten is held out whole.

    Raises:
        ValueError: the interpreter has no source text.
    """
    found = sorted(
        (shuffled(name, shuffle_seed), text)
        for _, name, text in trees(
            package_roots(), lambda package: is_held_out(package) == (split == "validation")
        )
    )
    texts = [text for _, text in found]
    if not texts:
        raise UserValueError(
            f"{key}.dataset = 'python_packages': this interpreter has no source text; use "
            f"{key}.dataset = 'c4_local' with a folder of your own"
        )
    size = sum(map(len, texts))
    reads = "Training" if split == "train" else "Validation"
    line = (
        f"{reads} reads {len(texts):,} source trees of installed Python packages, {size:,} "
        f"characters, the longest of {max(map(len, texts)):,}"
    )
    return _in_memory(texts, line)


def _in_memory(texts: list[str], *lines: str) -> TextSource:
    """A source of documents that are read already, with lines for the log."""
    dataset, fingerprint = Dataset.from_dict({"text": texts}), digest("\0".join(texts))
    return TextSource(
        dataset.to_iterable_dataset,
        lambda: fingerprint,
        is_local=True,
        describe=lambda: list(lines),
    )


# ``training.dataset`` or ``validation.dataset`` -> function of split, dataset_path, section, seed.
SOURCES: dict[str, Callable[[str, str | None, str, int], TextSource]] = {
    "c4": c4,
    "c4_local": c4_local,
    "python_stdlib": python_stdlib,
    "python_packages": python_packages,
}
# Sources of text that come from no folder.
WITHOUT_PATH = ("python_stdlib", "python_packages")


def check_source(name: str, path: str | None, key: str) -> None:
    """Check what ``find_source`` is given, as far as no text has to be there.

    Raises:
        ValueError: the source is unknown, lacks its folder, or is given one that it does not read.
    """
    if name not in SOURCES:
        raise UserValueError(
            f"{key}.dataset = '{name}' is not known; use one of {', '.join(SOURCES)}"
        )
    if name == "c4_local" and not path:
        raise UserValueError(
            f"{key}.dataset = 'c4_local' needs a folder; pass --{key}.dataset_path FOLDER"
        )
    if name in WITHOUT_PATH and path:
        raise UserValueError(
            f"{key}.dataset_path = '{path}' is not read by {key}.dataset = '{name}'; pass "
            f"--{key}.dataset c4_local to read the folder, or leave {key}.dataset_path out"
        )


def find_source(
    name: str, split: str, path: str | None, key: str, shuffle_seed: int = 0
) -> TextSource:
    """The source that ``{key}.dataset = name`` means.

    Args:
        split: "train" or "validation".
        path: value of ``{key}.dataset_path``.
        key: section of the configuration that names the source, for messages.
        shuffle_seed: seed of the order of the files; 0 reads them in that of their names.

    Raises:
        ValueError: as ``check_source``, or the source cannot be shuffled or opened.
    """
    check_source(name, path, key)
    return SOURCES[name](split, path, key, shuffle_seed)
