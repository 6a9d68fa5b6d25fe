"""Checkpoint files: nothing in them is run, and what is read is checked first.

torch stores each tensor and each value as a zip archive of its own, with a CRC32 that it does not
check when it reads. ``.metadata`` is a pickle without one; our saves put its SHA-256 beside it.
"""

import errno
import io
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from ..errors import UserError, UserFileError, UserValueError
from .checksums import FileFault, check_checksum, require_file
from .folders import METADATA_FILE

# Classes that occur in the metadata of torch's checkpoints; torch's dtypes are allowed as well.
ALLOWED = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}  # fmt: skip
# Signature of a zip entry, and the lengths of the two fields between its header and its data.
LOCAL_HEADER = struct.Struct("<4s22xHH")
MISSING = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR)
CHECKING_THREADS = 4
# Batches of items are checked ahead of the copy into the model.
BATCH_BYTES = 8 * 2**20
BATCHES_AHEAD = 16
BYTES_AT_ONCE = 2**20


class DamagedCheckpointError(UserFileError):
    """A checkpoint cannot be read, or holds something else than was saved.

    Attributes:
        path: the checkpoint's folder.
        reason: the file and its fault.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"checkpoint {path} is damaged: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # Ranks send it to one another.
        return type(self), (self.path, self.reason)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        a_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if a_dtype or (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class _PlainValuesPlanner(DefaultLoadPlanner):
    """Reads values other than tensors without running what they may contain."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            plain = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = read_item.dest_index.fqn
            raise FileFault(f"'{name}' is no plain value: {_first_line(error)}") from None
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)


class CheckpointReader(FileSystemReader):
    """torch's reader of a checkpoint folder, which checks what it reads.

    Its errors name the file. ``read_metadata`` raises them as ``DamagedCheckpointError``.
    """

    _checks: Iterator[None]
    _metadata: Metadata | None = None

    # pyrefly: ignore[bad-override]  Keyword arguments would make torch look for other files too.
    def read_metadata(self) -> Metadata:
        """The checked metadata.

        Raises:
            DamagedCheckpointError: it is missing, unreadable or changed.
        """
        if self._metadata is None:
            try:
                self._metadata = self._read_metadata()
            except (OSError, FileFault) as error:
                raise _user_error(Path(self.path), error) from None
        return self._metadata

    def _read_metadata(self) -> Metadata:
        folder = Path(self.path)
        check_checksum(folder, METADATA_FILE)
        file = folder / METADATA_FILE
        try:
            metadata = _MetadataUnpickler(io.BytesIO(require_file(file).read_bytes())).load()
            for item in metadata.storage_data.values():
                # A checkpoint's files all lie in its own folder.
                if Path(item.relative_path).name != item.relative_path:
                    raise ValueError(f"it names {item.relative_path!r}, outside of the folder")
            dict(metadata.state_dict_metadata)
        except (OSError, FileFault):
            raise
        # Nonsense in a pickle raises whatever it likes.
        except Exception as error:
            raise FileFault(f"{file} cannot be read ({_first_line(error)})") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """As torch's; other threads check what it reads ahead of it."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            by_file.setdefault(stored.relative_path, []).append(stored)
        # torch reads one file after another, each in the order of the plan.
        self._checks = self.checks([x for stored in by_file.values() for x in stored])
        # A read that fails leaves it suspended. Garbage collection, in whatever thread, would then
        # wait for the threads that check, and has met a thread that held what they needed to end.
        with closing(self._checks):
            return super().read_data(plan, planner)

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        next(self._checks)
        return super()._slice_file(file, sinfo)

    def checks(self, stored: list[Any]) -> Generator[None]:
        """Check tensors and values against their CRC32; yields once after each, in their order.

        Args:
            stored: torch's ``_StorageInfo`` of each. Their files are opened at once.
        """
        names = dict.fromkeys(item.relative_path for item in stored)
        files = {name: _DataFile(Path(self.path, name)) for name in names}
        return self._checks_of(stored, files)

    def _checks_of(self, stored: list[Any], files: dict[str, "_DataFile"]) -> Generator[None]:
        with ThreadPoolExecutor(CHECKING_THREADS) as pool:

            def check(batch: list[Any]) -> int:
                for item in batch:
                    files[item.relative_path].check(item.offset, item.length)
                return len(batch)

            waiting: deque[Future[int]] = deque()
            for batch in _batches(stored):
                waiting.append(pool.submit(check, batch))
                if len(waiting) > BATCHES_AHEAD:
                    yield from repeat(None, waiting.popleft().result())
            for future in waiting:
                yield from repeat(None, future.result())


def _batches(stored: list[Any]) -> Iterator[list[Any]]:
    """Lists of at least ``BATCH_BYTES``, but for the last.

    Handing a small value to a thread takes longer than checking it.
    """
    batch: list[Any] = []
    size = 0
    for item in stored:
        batch.append(item)
        size += item.length
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


class _DataFile:
    """A file of tensors and values, open for reading by several threads.

    Raises:
        FileFault: it is not the file that was written.
        OSError: it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        check_checksum(file.parent, file.name)
        self._file = file
        self._opened = require_file(file).open("rb", buffering=0)
        self._size = os.fstat(self._opened.fileno()).st_size
        self._error: OSError | None = None

    def read(self, start: int, size: int) -> bytes:
        try:
            return os.pread(self._opened.fileno(), size, start)
        except OSError as error:
            # ``zipfile`` would take it for a fault of the archive.
            self._error = OSError(error.errno, error.strerror, str(self._file))
            raise self._error from None

    def check(self, start: int, size: int) -> None:
        """Compare every entry of the zip archive at ``start`` with its CRC32.

        Raises:
            FileFault: one has changed.
        """
        if start + size > self._size:
            raise FileFault(f"{self._file} is too short: it ends before byte {start + size:,}")
        try:
            sound = self._is_sound(start, size)
        # Nonsense in an archive raises whatever it likes.
        except Exception:
            sound = False
        if self._error:
            raise self._error
        if not sound:
            raise FileFault(
                f"{self._file} has changed since it was written: bytes {start:,} to "
                f"{start + size:,} do not fit their checksum"
            )

    def _is_sound(self, start: int, size: int) -> bool:
        # ``zipfile`` reads the directory. Its own test takes longer than reading the data.
        with zipfile.ZipFile(_Part(self, start, size)) as archive:
            for entry in archive.infolist():
                place = start + entry.header_offset
                header = LOCAL_HEADER.unpack(self.read(place, LOCAL_HEADER.size))
                signature, name_length, extra_length = header
                if signature != b"PK\3\4" or entry.compress_type != zipfile.ZIP_STORED:
                    return False
                place += LOCAL_HEADER.size + name_length + extra_length
                if self._crc(place, entry.file_size) != entry.CRC:
                    return False
        return True

    def _crc(self, start: int, size: int) -> int:
        crc = 0
        for place in range(start, start + size, BYTES_AT_ONCE):
            crc = zlib.crc32(self.read(place, min(BYTES_AT_ONCE, start + size - place)), crc)
        return crc


class _Part(io.RawIOBase):
    """A read-only file over a part of a data file."""

    def __init__(self, whole: _DataFile, start: int, size: int) -> None:
        self._whole, self._start, self._size, self._place = whole, start, size, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}
        self._place = max(0, origin[whence] + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._place)
        size = left if size is None or size < 0 else min(size, left)
        found = self._whole.read(self._start + self._place, size)
        self._place += len(found)
        return found


def load_state(state: dict[str, Any], path: str | Path, no_dist: bool = False) -> None:
    """Read a checkpoint into ``state``, as ``torch.distributed.checkpoint.load`` does.

    Args:
        no_dist: whether this process reads for itself alone.

    Raises:
        DamagedCheckpointError: on every rank, if what any of them reads is not what was saved.
        UserError: on every rank, if one cannot read it, or it lacks what ``state`` has.
    """
    reader = CheckpointReader(path)
    # torch would only say that there is none.
    reader.read_metadata()
    try:
        dcp.load(
            state,
            storage_reader=reader,
            planner=_PlainValuesPlanner(),
            no_dist=no_dist,
        )
    except CheckpointException as error:
        raise _user_error(Path(path), next(iter(error.failures.values()))[0]) from None


def read_metadata(path: str | Path) -> Metadata:
    """The metadata of a checkpoint.

    Raises:
        DamagedCheckpointError: it is missing, unreadable or changed.
    """
    return CheckpointReader(path).read_metadata()


@contextmanager
def in_one_process() -> Generator[None]:
    """Read or write a checkpoint in a single process without torch's warning about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def check_shapes(path: Path, model_state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Check that a checkpoint holds every tensor of a model's state dict, in its shape.

    Returns:
        All that it holds, by name.

    Raises:
        ValueError: the checkpoint belongs to another model.
        DamagedCheckpointError: its metadata cannot be read.
    """
    stored = read_metadata(path).state_dict_metadata
    for name, tensor in model_state.items():
        entry = stored.get(name)
        shape = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if shape != tuple(tensor.shape):
            held = f"has shape {shape}" if shape else "is missing"
            raise UserValueError(
                f"checkpoint {path} is of another model: its '{name}' {held}, this run's has "
                f"shape {tuple(tensor.shape)}; set model.flavor or model.hf_folder to that of the "
                "checkpoint, or pass another checkpoint folder"
            )
    return stored


def _user_error(path: Path, error: BaseException) -> UserError:
    """The error for a checkpoint of which ``error`` kept us from reading a part."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, FileFault):
        return DamagedCheckpointError(path, str(error))
    if isinstance(error, OSError) and error.errno in MISSING:
        return DamagedCheckpointError(path, f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError):
        # The file may be sound, and the way to it broken.
        return UserFileError(
            f"checkpoint {path} cannot be read: {error.filename}: {error.strerror}; mend that, and "
            "start again"
        )
    return UserValueError(f"checkpoint {path} does not fit this run: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
