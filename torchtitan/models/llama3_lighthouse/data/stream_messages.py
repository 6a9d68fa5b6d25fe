"""Messages on documents that cannot be trained on; they name file and line where there are any."""

from typing import Any

from torchtitan.tools.logging import logger

from ..errors import UserValueError
from .origins import find_document, find_fault
from .text_files import TextFiles, document_problem, one_line
from .text_sources import TextSource


class StreamMessages:
    """The messages of all streams of one loader.

    Args:
        key: section of the configuration that names the text.
        streams: streams that the text is dealt to; streams and their documents count from 0.
    """

    def __init__(self, source: TextSource, key: str, streams: int) -> None:
        self.key = key
        self._source = source
        self._streams = streams
        self._warned_of_empty = False

    def bad_document(self, stream: int, number: int, document: dict[str, Any]) -> UserValueError:
        """The error for a document without a text that is a string."""
        place = f"document {number} of stream {stream} (both counted from 0)"
        problem = document_problem(document)
        found = self._find(stream, number)
        # The place is told only if what stands there has a fault too.
        if found and (told := document_problem(found[1])):
            place, problem = found[0], told
        return UserValueError(f"{self.key}.dataset: {place} {problem}; remove or mend it")

    def unreadable(self, stream: int, number: int, error: Exception) -> UserValueError:
        """The error for text that cannot be read at document ``number`` or the next ones."""
        files = self._files()
        if files:
            fault = find_fault(files, stream, self._streams, number, error)
            return UserValueError(f"{self.key}.dataset: {fault}; mend or remove it")
        advice = "mend or remove the file" if self._source.is_local else "check the network"
        return UserValueError(
            f"{self.key}.dataset cannot be read past document {number} of stream {stream} (both "
            f"counted from 0): {one_line(error)}; {advice}"
        )

    def no_document(self, stream: int) -> UserValueError:
        """The error for a stream that gets nothing."""
        return UserValueError(
            f"{self.key}.dataset has no document for stream {stream} (counted from 0); give it "
            f"{self._streams} documents or more, one for each stream, or deal it to fewer streams "
            "by lighthouse.data_streams"
        )

    def all_empty(self, stream: int, documents: int) -> UserValueError:
        """The error for a stream that gets empty documents alone."""
        return UserValueError(
            f"{self.key}.dataset: all documents of stream {stream} (counted from 0) are empty, "
            f"{documents:,} of them; give it text, or deal it to fewer streams by "
            "lighthouse.data_streams"
        )

    def warn_of_empty(self, stream: int, number: int) -> None:
        """Name the first empty document that the loader meets."""
        if self._warned_of_empty:
            return
        self._warned_of_empty = True
        place = f"document {number} of stream {stream} (both counted from 0)"
        found = self._find(stream, number)
        if found and found[1].get("text") == "":
            place = found[0]
        logger.warning(
            f"{self.key}.dataset: {place} is empty; empty documents are skipped, and the log says "
            "how many there were when a stream has been read whole"
        )

    def _find(self, stream: int, number: int) -> tuple[str, dict[str, Any]] | None:
        files = self._files()
        return find_document(files, stream, self._streams, number) if files else None

    def _files(self) -> TextFiles | None:
        """The source's files, if documents are dealt by them as ``origins`` expects."""
        files = self._source.files
        if files and self._source.open().num_shards == len(files.paths):
            return files
        return None
