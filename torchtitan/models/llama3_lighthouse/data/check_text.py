"""A check of every document of a split, file by file, without a model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..errors import UserValueError
from .text_files import Row, TextFiles, document_problem, one_line
from .text_folder import read_folder
from .text_sources import check_source, find_source

# Bad documents that a report names.
MOST_NAMED = 10
# Rows between two messages of progress.
ROWS_BETWEEN = 500


@dataclass
class TextReport:
    """Counts of a split.

    Attributes:
        documents: all of them, empty and bad ones too; a line that is not JSON is one as well.
        empty: those whose text is ""; training skips them.
        characters: of all texts.
        bad: documents that training refuses, and files that cannot be read.
        named: the first ``MOST_NAMED`` of the bad ones, each with its file and line.
    """

    documents: int = 0
    empty: int = 0
    characters: int = 0
    bad: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Count a document."""
        self.documents += 1
        try:
            document = row.document()
        except ValueError as error:
            self.add_bad(str(error))
            return
        problem = document_problem(document)
        if problem:
            self.add_bad(f"{row.place} {problem}")
            return
        self.empty += not document["text"]
        self.characters += len(document["text"])

    def add_bad(self, message: str) -> None:
        """Count something that training refuses."""
        self.bad += 1
        if self.bad <= MOST_NAMED:
            self.named.append(message)


class TextCheck:
    """A split of a source that can be read whole.

    Args:
        name: value of ``{key}.dataset``.
        split: "train" or "validation".
        path: value of ``{key}.dataset_path``.
        key: section of the configuration that names the source.

    Attributes:
        size: bytes of the files, on the disk; 0 for a source without files.
        described: lines on the files that are read, and those that are not.

    Raises:
        ValueError: the source is unknown, cannot be found, or lies on the network.
    """

    def __init__(self, name: str, split: str, path: str | None, key: str) -> None:
        if name == "c4":
            raise UserValueError(
                f"{key}.dataset = 'c4' is streamed from the network, and only local text can be "
                f"checked whole; use {key}.dataset = 'c4_local' with a folder"
            )
        check_source(name, path, key)
        self._open = lambda: find_source(name, split, path, key).open()
        self._key = key
        self._files: TextFiles | None = None
        self.size = 0
        self.described: list[str] = []
        if name == "c4_local":
            folder = read_folder(path, key)
            self._files = folder.files(split, key)
            self.described = folder.describe(split)
            self.size = sum(Path(file).stat().st_size for file in self._files.paths)

    def run(self, progress: Callable[[float], object]) -> TextReport:
        """Read every document.

        Args:
            progress: told now and then how many more bytes are done.
        """
        report = TextReport()
        if self._files is None:
            for number, document in enumerate(self._open()):
                report.add(Row(f"document {number} (counted from 0)", document))
        else:
            for path in self._files.paths:
                try:
                    for row in _rows_with_progress(self._files, path, progress):
                        report.add(row)
                except Exception as error:
                    report.add_bad(f"{path} cannot be read: {one_line(error)}")
        if not report.bad and report.documents == report.empty:
            report.add_bad(f"{self._key}.dataset holds no document with text")
        return report


def _rows_with_progress(
    files: TextFiles, path: str, progress: Callable[[float], object]
) -> Iterator[Row]:
    size, count = Path(path).stat().st_size, files.count(path)
    on_disk: list[BinaryIO] = []
    told = 0
    for number, row in enumerate(files.rows(path, on_disk.append), 1):
        yield row
        if number % ROWS_BETWEEN == 0:
            place = size * number // count if count else on_disk[0].tell()
            progress(place - told)
            told = place
    progress(size - told)
