"""Files of text, read row by row with the place of each row."""

import io
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as parquet
from fsspec.compression import compr
from fsspec.utils import infer_compression

from .fingerprint import digest

# Rows of a column file that become Python objects at a time.
ROWS_AT_ONCE = 256


def shuffled(name: str, seed: int) -> str:
    """A key by which names are sorted into an order that ``seed`` draws."""
    return digest(f"{seed}/{name}")


@dataclass(frozen=True)
class Row:
    """One row of a file; a line of JSON is parsed when it is asked for.

    Attributes:
        place: line or row, counted from 1, and file.
    """

    place: str
    content: bytes | dict[str, Any]

    def document(self) -> dict[str, Any]:
        """Columns by name; of a Parquet or Arrow file with a column ``text``, that one alone.

        Raises:
            ValueError: the line is not a JSON object; the message names the place.
        """
        if isinstance(self.content, dict):
            return self.content
        try:
            document = json.loads(self.content)
        except json.JSONDecodeError as error:
            problem = f"is not JSON ({error.msg}, column {error.colno})"
            raise ValueError(f"{self.place} {problem}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.place} is not UTF-8 (byte {error.start + 1})") from error
        except RecursionError as error:
            raise ValueError(f"{self.place} is nested too deeply") from error
        # Python reads no numbers of more than 4,300 digits.
        except ValueError as error:
            raise ValueError(f"{self.place} cannot be read: {one_line(error)}") from error
        if not isinstance(document, dict):
            raise ValueError(f"{self.place} is not a JSON object with a 'text'")
        return document


@dataclass(frozen=True)
class TextFiles:
    """The files of a split in the order in which they are read, all of one kind.

    Attributes:
        kind: json, parquet, arrow or text.
    """

    kind: str
    paths: tuple[str, ...]

    @contextmanager
    def opened(
        self, path: str, progress: Callable[[BinaryIO], None] | None = None
    ) -> Generator[BinaryIO]:
        """A file without its compression.

        Args:
            progress: is given the file as it lies on the disk, which tells how far it is read.
        """
        with open(path, "rb") as file:
            if progress:
                progress(file)
            kind = infer_compression(path)
            # pyrefly: ignore[bad-index]  fsspec adds to this table later.
            plain = compr[kind](file, mode="rb")
            # The reader of zstandard cannot read line by line.
            yield io.BufferedReader(plain) if kind == "zstd" else plain

    def rows(self, path: str, progress: Callable[[BinaryIO], None] | None = None) -> Iterator[Row]:
        """The rows of one file; ``progress`` as in ``opened``.

        Raises:
            Exception: the file is damaged; the type is that of the format's library.
        """
        with self.opened(path, progress) as file:
            if self.kind == "json":
                yield from _json_rows(path, file)
            elif self.kind == "text":
                # Lines end in a line feed, whatever the file has.
                yield Row(path, {"text": io.TextIOWrapper(file, encoding="utf-8").read()})
            else:
                read = _parquet_documents if self.kind == "parquet" else _arrow_documents
                for number, document in enumerate(read(file), 1):
                    yield Row(f"row {number} of {path}", document)

    def count(self, path: str) -> int | None:
        """Rows of one file; None if all of it has to be read for that."""
        if self.kind == "json":
            return None
        if self.kind == "text":
            return 1
        with open(path, "rb") as file:
            if self.kind == "parquet":
                return parquet.ParquetFile(file).metadata.num_rows
            return sum(batch.num_rows for batch in _arrow_batches(file))


def document_problem(document: dict[str, Any]) -> str | None:
    """The reason why a document cannot be trained on; None for one that can or that is empty."""
    if "text" not in document:
        return f"has no 'text', only {', '.join(map(repr, document)) or 'an empty object'}"
    text = document["text"]
    if text is None:
        return "has a 'text' that is null"
    if not isinstance(text, str):
        return f"has a 'text' of type {type(text).__name__}, not a string"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has a 'text' whose character {error.start} is half of a surrogate pair"
    return None


def one_line(error: Exception) -> str:
    """The message of a reader's error, which may have several lines or none."""
    return " ".join(str(error).split()) or f"no document is found ({type(error).__name__})"


def _json_rows(path: str, file: BinaryIO) -> Iterator[Row]:
    """Every line that is not blank; blank lines count too. A file may also be one array."""
    for number, line in enumerate(file, 1):
        if number == 1 and line.startswith(b"["):
            for item, value in enumerate(json.loads(line + file.read()), 1):
                document = value if isinstance(value, dict) else {"text": value}
                yield Row(f"item {item} of {path}", document)
        elif line.strip():
            yield Row(f"line {number} of {path}", line)


def _parquet_documents(file: BinaryIO) -> Iterator[dict[str, Any]]:
    whole = parquet.ParquetFile(file)
    columns = ["text"] if "text" in whole.schema_arrow.names else None
    for batch in whole.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
        yield from batch.to_pylist()


def _arrow_batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    # Arrow files come in two formats, and only opening one tells which it is.
    try:
        batches: Iterator[pa.RecordBatch] = iter(pa.ipc.open_stream(file))
    except pa.ArrowInvalid:
        file.seek(0)
        whole = pa.ipc.open_file(file)
        batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
    yield from batches


def _arrow_documents(file: BinaryIO) -> Iterator[dict[str, Any]]:
    for batch in _arrow_batches(file):
        columns = ["text"] if "text" in batch.schema.names else batch.schema.names
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield from batch.select(columns).slice(start, ROWS_AT_ONCE).to_pylist()
