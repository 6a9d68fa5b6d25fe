"""Where training text comes from: every source as a stream of documents with a key ``text``."""

import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset

from ..errors import UserValueError

# Suffixes of the file kinds that Hugging Face datasets reads as documents.
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
    """A stream of documents and what identifies its content.

    Attributes:
        open: a fresh stream over all documents, in the same order every time.
        fingerprint: changes when the documents do; a saved position is void then.
        is_local: whether reading ahead costs nothing but time.
    """

    open: Callable[[], IterableDataset]
    fingerprint: str
    is_local: bool


def c4(split: str, path: str | None, key: str) -> TextSource:
    """English C4, streamed from the Hugging Face hub or from a mirror of it at ``path``."""
    name = path or "allenai/c4"

    def open_stream() -> IterableDataset:
        try:
            return load_dataset(name, name="en", split=split, streaming=True)
        except Exception as error:
            raise UserValueError(
                f"{key}.dataset = 'c4' cannot be streamed from {name}: {error}; check the network, "
                f"or use {key}.dataset = 'c4_local' with a folder"
            ) from error

    return TextSource(open_stream, name, is_local=False)


def c4_local(split: str, path: str | None, key: str) -> TextSource:
    """A folder of JSON lines, Parquet, Arrow or text files, streamed from where they lie.

    Which files belong to which split is read from their names, as Hugging Face datasets does.
    """
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
    options = {"sample_by": "document"} if kinds == ["text"] else {}
    try:
        splits = load_dataset(kinds[0], data_dir=str(folder), streaming=True, **options)
    except Exception as error:
        raise UserValueError(
            f"{key}.dataset_path = '{path}' cannot be read as {kinds[0]}: {error}; "
            "mend or remove the file"
        ) from error
    if split not in splits:
        raise UserValueError(
            f"{key}.dataset_path = '{path}' has no {split} split, only {', '.join(splits)}; "
            f"give it files with '{split}' in their name, or use another {key}.dataset_path"
        )
    listing = "\n".join(f"{file.relative_to(folder)} {file.stat().st_size}" for file in files)
    return TextSource(lambda: splits[split], _digest(listing), is_local=True)


def _file_kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return FILE_KINDS.get(suffixes[-1]) if suffixes and path.is_file() else None


def python_stdlib(split: str, path: str | None, key: str) -> TextSource:
    """Source text of the running interpreter's own standard library: real text on any machine.

    Tests and installed packages are left out. Files follow one another in the order of a hash of
    their path, so that neighbours differ; every twentieth by that hash is held out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "__pycache__"}
    documents = []
    for file in root.rglob("*.py"):
        name = file.relative_to(root)
        # Installed packages lie in a folder of that ending, whoever distributes the interpreter.
        if any(part in left_out or part.endswith("-packages") for part in name.parts):
            continue
        rank = _digest(name.as_posix())
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
    return TextSource(
        lambda: Dataset.from_dict({"text": texts}).to_iterable_dataset(),
        _digest("\0".join(texts)),
        is_local=True,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
        key: section of the configuration that asks, for messages.

    Raises:
        ValueError: the source is not known or cannot be opened.
    """
    if name not in SOURCES:
        raise UserValueError(
            f"{key}.dataset = '{name}' is not known; use one of {', '.join(SOURCES)}"
        )
    return SOURCES[name](split, path, key)
