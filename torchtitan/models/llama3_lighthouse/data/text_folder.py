"""The files of a folder of text: which train, which are held out, and which are not read."""

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath

from fsspec.compression import compr

from ..errors import UserFileError, UserValueError
from .text_files import TextFiles, shuffled

# Suffix of a file -> kind of file, as in ``TextFiles``.
FILE_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")
# A file is held out if its name, or a folder's name on the way to it, contains this word.
HELD_OUT = "validation"
# Hugging Face's tools put these files beside their text. They hold settings.
DESCRIPTIONS = {
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
}
# Reasons why something in the folder is not read: of one thing, and of several.
NO_TEXT = "file is no text", "files are no text"
DESCRIPTION = "file describes a data set", "files describe a data set"
HIDDEN = "name is hidden", "names are hidden"
NOT_REGULAR = "is no regular file", "are no regular files"
LEADS_OUT = "link leads out of the folder", "links lead out of the folder"
LEADS_NOWHERE = "link leads nowhere", "links lead nowhere"
TO_A_FOLDER = "link leads to a folder in it", "links lead to folders in it"
SECOND_NAME = "link leads to a file that is read", "links lead to files that are read"
# Names that a message gives for one reason.
MOST_NAMED = 5


@dataclass(frozen=True)
class TextFolder:
    """The contents of a folder.

    Attributes:
        path: as the user gave it.
        kind: of all files of text, as in ``TextFiles``.
        train, held_out: path -> size in bytes, in the order in which they are read.
        left_out: reason, of one thing and of several -> paths below the folder.
    """

    path: str
    kind: str
    train: dict[str, int]
    held_out: dict[str, int]
    left_out: dict[tuple[str, str], list[str]]

    def files(self, split: str, key: str, shuffle_seed: int = 0) -> TextFiles:
        """The files of ``split``, "train" or "validation".

        Args:
            key: section of the configuration that names the folder, for messages.
            shuffle_seed: draws their order, by their paths below the folder; 0 keeps it.

        Raises:
            ValueError: there are none.
            OSError: one may not be read.
        """
        paths = self._of(split)
        if not paths:
            how_many, which = ("all", "without") if split == "train" else ("none", "with")
            raise UserValueError(
                f"{key}.dataset_path = {self.path!r} has no {split} split: {how_many} of its files "
                f"have '{HELD_OUT}' in their names; give it files {which} that, or use another "
                f"{key}.dataset_path"
            )
        for path in paths:
            if not os.access(path, os.R_OK):
                raise UserFileError(
                    f"{key}.dataset_path = {self.path!r} holds {path}, which this user may not "
                    "read; change its permissions, or move it away"
                )
        if shuffle_seed:
            root = os.path.realpath(self.path)
            paths = sorted(paths, key=lambda x: shuffled(os.path.relpath(x, root), shuffle_seed))
        return TextFiles(self.kind, tuple(paths))

    def describe(self, split: str, shuffle_seed: int = 0) -> list[str]:
        """One or two lines: what ``split`` reads, and what nothing reads, with the reasons."""
        reads = "training" if split == "train" else "validation"
        line = f"{reads} reads {_counted(self.kind, self._of(split))} of {self.path}"
        if split == "train":
            line += f"; held out: {_counted(self.kind, self.held_out) if self.held_out else 'none'}"
        if shuffle_seed:
            line += f"; its files are shuffled by seed {shuffle_seed}"
        lines = [line[0].upper() + line[1:]]
        if self.left_out:
            lines.append(f"Not read in {self.path}: {_reasons(self.left_out)}")
        return lines

    def _of(self, split: str) -> dict[str, int]:
        return self.train if split == "train" else self.held_out


def read_folder(path: str | None, key: str) -> TextFolder:
    """Find the files of text below a folder.

    Files are read in the order of their paths, which are compared as strings, "/" included. A
    second name of a file, by a link, would train on it twice and is left out.

    Args:
        path: value of ``{key}.dataset_path``; None is no folder.

    Raises:
        ValueError: it is no folder, or holds no text, text of several kinds, or a name that no
            reader can open.
        OSError: a folder below it may not be read.
    """
    if path is None or not os.path.isdir(path):
        raise UserValueError(
            f"{key}.dataset_path = {path!r} is not a folder; pass --{key}.dataset_path FOLDER "
            "with the folder that holds the text"
        )
    setting = f"{key}.dataset_path = {path!r}"
    root = os.path.realpath(path)
    sizes: dict[str, int] = {}
    left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    try:
        # Links come last, so that a file is read by its own name.
        names = sorted(_files(root, left_out), key=lambda name: _is_link(root, name))
        targets: set[str] = set()
        for name in names:
            found = _judge(root, name, targets)
            if isinstance(found, int):
                sizes[name] = found
                targets.add(_target(root, name))
            else:
                left_out[found].append(name)
    except OSError as error:
        raise UserFileError(
            f"{setting} cannot be read: {error.strerror}: {error.filename}; change its "
            "permissions, or move it away"
        ) from None
    kind = _only_kind(setting, sorted(sizes), left_out)
    for name in sizes:
        _check_name(os.path.join(root, name))
    ordered = {os.path.join(root, name): sizes[name] for name in sorted(sizes)}
    held_out = {os.path.join(root, name) for name in sizes if HELD_OUT in name.lower()}
    return TextFolder(
        path,
        kind,
        {file: size for file, size in ordered.items() if file not in held_out},
        {file: size for file, size in ordered.items() if file in held_out},
        dict(left_out),
    )


def _files(root: str, left_out: dict[tuple[str, str], list[str]]) -> Iterator[str]:
    """Paths below ``root`` of everything but folders; what is hidden goes to ``left_out``."""
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        below = os.path.relpath(folder, root)
        entered = []
        for name in subfolders:
            path = os.path.normpath(os.path.join(below, name))
            if _is_hidden(name):
                left_out[HIDDEN].append(f"{path}/")
            elif _is_link(root, path):
                inside = _is_inside(root, _target(root, path))
                left_out[TO_A_FOLDER if inside else LEADS_OUT].append(f"{path}/")
            else:
                entered.append(name)
        subfolders[:] = entered
        for name in names:
            path = os.path.normpath(os.path.join(below, name))
            if _is_hidden(name):
                left_out[HIDDEN].append(path)
            else:
                yield path


def _judge(root: str, name: str, targets: set[str]) -> int | tuple[str, str]:
    """The size of a file that is to be read, in bytes, or the reason why it is not.

    Args:
        targets: files that are read already, without links.
    """
    path, target = os.path.join(root, name), _target(root, name)
    if _is_link(root, name) and not os.path.exists(path):
        return LEADS_NOWHERE
    if not _is_inside(root, target):
        return LEADS_OUT
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        return NOT_REGULAR
    if PurePath(name).name in DESCRIPTIONS:
        return DESCRIPTION
    if _kind(name) is None:
        return NO_TEXT
    return SECOND_NAME if target in targets else status.st_size


def _kind(name: str) -> str | None:
    """The reader of a file, told from its name; None if it is no text."""
    path = PurePath(name.lower())
    if path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
    return FILE_KINDS.get(path.suffix)


def _only_kind(
    setting: str, names: Iterable[str], left_out: dict[tuple[str, str], list[str]]
) -> str:
    """The kind of all files; ``setting`` names the folder in messages."""
    examples: dict[str, str] = {}
    for name in names:
        examples.setdefault(_kind(name) or "", name)
    if len(examples) == 1:
        return next(iter(examples))
    kinds = ", ".join(sorted(examples))
    named = ", ".join(examples[kind] for kind in sorted(examples))
    found = f"files of {len(examples)} kinds ({kinds}: {named})"
    if not examples:
        found = f"no readable file{left_out and f' ({_reasons(left_out)})' or ''}"
    raise UserValueError(
        f"{setting} holds {found}; give it files of one kind of {', '.join(FILE_KINDS)}, the JSON "
        "and text ones compressed or not"
    )


def _check_name(path: str) -> None:
    """Refuse a file whose compression, which its name tells, needs a package.

    Raises:
        ValueError: the package is not installed.
    """
    if path.lower().endswith(".zst") and "zstd" not in compr:
        raise UserValueError(f"{path} needs the package zstandard; pip install zstandard")


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_link(root: str, name: str) -> bool:
    return os.path.islink(os.path.join(root, name))


def _target(root: str, name: str) -> str:
    """The path of a file without links; no folder below ``root`` that is entered is one."""
    path = os.path.join(root, name)
    return os.path.realpath(path) if os.path.islink(path) else path


def _is_inside(root: str, target: str) -> bool:
    return PurePath(target).is_relative_to(root)


def _raise(error: OSError) -> None:
    raise error


def _counted(kind: str, files: dict[str, int]) -> str:
    """Files, documents where that is quickly known, and bytes."""
    parts = [f"{len(files):,} {kind} file{'s' if len(files) > 1 else ''}"]
    documents = _documents(kind, tuple(files))
    if documents is not None:
        parts.append(f"{documents:,} document{'s' if documents != 1 else ''}")
    return ", ".join([*parts, _in_bytes(sum(files.values()))])


@cache
def _documents(kind: str, paths: tuple[str, ...]) -> int | None:
    """Documents of files, counted once; None if that takes long or a file is damaged."""
    if kind not in ("text", "parquet"):
        return None
    files = TextFiles(kind, paths)
    try:
        return sum(files.count(path) or 0 for path in paths)
    # The reader says what is wrong with the file.
    except Exception:
        return None


def _in_bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.4g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"


def _reasons(left_out: dict[tuple[str, str], list[str]]) -> str:
    return "; ".join(
        f"{len(names):,} {reason[len(names) > 1]} ({_listed(names)})"
        for reason, names in sorted(left_out.items())
    )


def _listed(names: list[str]) -> str:
    # A name may hold line breaks, or bytes that are no text.
    shown = [
        "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name)
        for name in sorted(names)[:MOST_NAMED]
    ]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
