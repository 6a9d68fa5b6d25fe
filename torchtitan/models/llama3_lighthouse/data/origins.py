"""Files and lines of documents that messages speak of, found when they are needed.

Documents are dealt to streams as Hugging Face's ``split_dataset_by_node`` deals them: by whole
files if the number of streams divides the number of files, else one by one. Streams, documents and
rows count from 0 here, lines and rows in messages from 1.
"""

from itertools import islice
from typing import Any

from .text_files import TextFiles, document_problem, one_line


def find_document(
    files: TextFiles, stream: int, streams: int, number: int
) -> tuple[str, dict[str, Any]] | None:
    """The place of document ``number`` of a stream, and the document as its file has it.

    None if it cannot be found, as in a file that is damaged.
    """
    own, first, step = _share(files, stream, streams)
    left = first + number * step
    try:
        for path in own.paths:
            count = own.count(path)
            if count is None:
                for row in own.rows(path):
                    if left == 0:
                        return row.place, row.document()
                    left -= 1
            elif left < count:
                row = next(islice(own.rows(path), left, None))
                return row.place, row.document()
            else:
                left -= count
    # The message that asks for the place is right without it too.
    except Exception:
        return None
    return None


def find_fault(
    files: TextFiles, stream: int, streams: int, documents: int, error: Exception
) -> str:
    """The reason why a stream cannot be read on after ``documents`` documents, with its file.

    Args:
        error: of the reader; its message may name no file.
    """
    own, _, step = _share(files, stream, streams)
    # A row is read for every stream before this stream gets its own.
    return first_fault(own, documents * step, (documents + 1) * step - 1, error)


def first_fault(files: TextFiles, unread: int, wanted: int, error: Exception) -> str:
    """The first fault from row ``unread`` on, looked for to the end of the file of row ``wanted``.

    That file is named without a line if its lines are sound one by one.
    """
    passed, path = 0, ""
    for path in files.paths:
        fault, count = _fault_in_file(files, path, unread - passed)
        if fault:
            return fault
        passed += count
        if wanted < passed:
            break
    return f"{path} cannot be read: {one_line(error)}"


def _share(files: TextFiles, stream: int, streams: int) -> tuple[TextFiles, int, int]:
    """The files that a stream reads, the first of its rows in them, and the step to the next."""
    if len(files.paths) % streams == 0:
        return TextFiles(files.kind, files.paths[stream::streams]), 0, 1
    return files, stream, streams


def _fault_in_file(files: TextFiles, path: str, unread: int) -> tuple[str | None, int]:
    """The first fault from row ``unread`` of a file on, and the number of rows read."""
    passed, bad_document = 0, None
    try:
        for row in files.rows(path):
            passed += 1
            if passed <= unread:
                continue
            try:
                problem = document_problem(row.document())
            except ValueError as error:
                return str(error), passed
            # A document without text disturbs the reader less than damage further on.
            if problem and not bad_document:
                bad_document = f"{row.place} {problem}"
    except Exception as error:
        return f"{path} cannot be read: {one_line(error)}", passed
    return bad_document, passed
