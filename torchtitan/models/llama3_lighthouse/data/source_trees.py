"""Python packages as documents: real text in which much of what comes next stands far before.

A document is a tree of source files, one file after another in the order of their paths, each under
a line with its path. A tree of more than ``LARGEST_TREE`` bytes is several documents: one for each
folder in it, by the same rule, and one for the files beside them.
"""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from .fingerprint import digest

LARGEST_TREE = 2**20
# Copies of packages would stand in two documents, one of which may be held out: those of another
# Python within the standard library's folder, and those that packages bring along.
COPIES = {"site-packages", "dist-packages", "_vendor", "vendor"}
LEFT_OUT = {"__pycache__", "node_modules", *COPIES}


def package_roots() -> list[Path]:
    """The folders that hold the standard library and installed packages, each once."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return [Path(path) for path in dict.fromkeys(paths) if path and Path(path).is_dir()]


def trees(
    roots: list[Path], wanted: Callable[[str], bool] = lambda package: True
) -> Iterator[tuple[str, str, str]]:
    """Yield each document of the packages that are ``wanted``: package, name and text.

    A module that is no folder is a package of its own name. Files that are not UTF-8 or may not be
    read are left out.
    """
    seen: set[str] = set()
    for root in roots:
        for entry in sorted(root.iterdir()):
            inside = any(entry == other or entry in other.parents for other in roots)
            # Python imports the first of two installations of a package.
            if inside or entry.stem in seen or entry.name in LEFT_OUT or not wanted(entry.stem):
                continue
            found = list(_documents(entry, root))
            if found:
                seen.add(entry.stem)
            for name, text in found:
                yield entry.stem, name, text


def _documents(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    files = list(_files(path))
    if not files:
        return
    name = path.relative_to(root).as_posix()
    if path.is_file() or sum(file.stat().st_size for file in files) <= LARGEST_TREE:
        if text := _text(files, root):
            yield name, text
        return
    own = [file for file in files if file.parent == path]
    if text := _text(own, root):
        yield f"{name}/*.py", text
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        if folder.name not in LEFT_OUT and not folder.is_symlink():
            yield from _documents(folder, root)


def _files(path: Path) -> Iterator[Path]:
    """The source files of a tree, in the order of their paths."""
    if path.is_file():
        if path.suffix == ".py":
            yield path
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if name not in LEFT_OUT)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _text(files: list[Path], root: Path) -> str:
    parts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            parts.append(f"# {file.relative_to(root).as_posix()}\n{text}")
    return "\n".join(parts)


def is_held_out(package: str) -> bool:
    """Whether a package is for validation: about one in ten, whatever else is installed."""
    return int(digest(package), 16) % 10 == 0
