"""Documents packed into training sequences, with a position that a resume continues exactly."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset as HFDataset
from datasets.distributed import split_dataset_by_node
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from ..errors import UserValueError
from ..job_config import JobConfig
from .retrieval import PromptEncoder, RetrievalMix
from .text_sources import TextSource, find_source
from .tokenizer import ByteTokenizer

START_OVER = (
    "pass --checkpoint.exclude_from_loading dataloader to start the text over on purpose, with "
    "weights and optimizer as saved"
)
# Local text that is read ahead when a loader is built, so that bad documents show up at once.
CHECKED_CHARACTERS = 32 * 2**20


class _Documents:
    """Every ``count``-th document of a dataset from document ``number`` on.

    A dataset that was given a position states another one until it has been read from; this
    states the one it was given. A long document may span two resumes.
    """

    def __init__(self, data: HFDataset, number: int, count: int) -> None:
        self._data = split_dataset_by_node(data, number, count)
        self._given = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for document in self._data:
            self._given = None
            yield document

    def state_dict(self) -> dict[str, Any]:
        return self._given or self._data.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._given = state_dict
        self._data.load_state_dict(state_dict)


class TextStream:
    """Every ``count``-th document, each between BOS and EOS, cut into sequences.

    A sequence has ``seq_len`` inputs and as many labels, the inputs shifted by one; the next one
    begins at the last label, so every token of the text is predicted once.

    Args:
        number: the first document, of those counted from 0.
        infinite: begin again at the end.
        key: section of the configuration that asks, for messages.
        mix: sequences that come between those of text, which it delays and leaves whole.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: BaseTokenizer,
        seq_len: int,
        number: int,
        count: int,
        infinite: bool,
        key: str,
        mix: RetrievalMix | None = None,
    ) -> None:
        self.number = number
        self.sequences = 0
        self._open = lambda: _Documents(source.open(), number, count)
        self._data = self._open()
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._infinite = infinite
        self._key = key
        self._mix = mix
        self._buffer = np.empty(0, dtype=np.int32)
        self._epoch = 0
        self._documents = 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield ({"input": int64 [seq_len]}, int64 [seq_len]) from the present position on."""
        while True:
            # First what a resumed position still holds.
            yield from self._cut()
            for document in self._data:
                text = self._checked_text(document, self._documents)
                self._documents += 1
                self._buffer = np.concatenate([self._buffer, self._encode(text)])
                yield from self._cut()
            if self._documents == 0:
                raise self._no_document()
            if not self._infinite:
                return
            self._epoch += 1
            self._documents = 0
            # A stream that is read a second time may begin anywhere once its state was taken.
            self._data = self._open()
            logger.info(
                f"{self._key}.dataset: stream {self.number} has been read whole; "
                f"beginning epoch {self._epoch}"
            )

    def _cut(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while len(self._buffer) > self._seq_len:
            if self._mix and self._mix.takes(self.number, self.sequences):
                tokens, in_loss = self._mix.sequence(self.number, self.sequences)
                window = torch.from_numpy(tokens.astype(np.int64))
                labels = window.masked_fill(~torch.from_numpy(in_loss), IGNORE_INDEX)
            else:
                window = torch.from_numpy(self._buffer[: self._seq_len + 1].astype(np.int64))
                labels = window
                self._buffer = self._buffer[self._seq_len :]
            self.sequences += 1
            yield {"input": window[:-1]}, labels[1:]

    def _encode(self, text: str) -> np.ndarray:
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._tokenizer.encode_array(text, add_bos=True, add_eos=True)
        ids = self._tokenizer.encode(text, add_bos=True, add_eos=True)
        return np.array(ids, dtype=np.int32)

    def _checked_text(self, document: dict[str, Any], number: int) -> str:
        text = document.get("text")
        if isinstance(text, str) and text:
            return text
        if "text" not in document:
            problem = f"has no 'text', only {', '.join(map(repr, document))}"
        elif text == "":
            problem = "is empty"
        else:
            problem = f"has a 'text' of type {type(text).__name__}, not a string"
        raise UserValueError(
            f"{self._key}.dataset: document {number} of stream {self.number} (both counted from "
            f"0) {problem}; remove or mend it"
        )

    def _no_document(self) -> UserValueError:
        return UserValueError(
            f"{self._key}.dataset has no document for stream {self.number} (counted from 0); give "
            "it more documents, or deal it to fewer streams by lighthouse.data_streams"
        )

    def check_first_documents(self, characters_to_check: int) -> None:
        """Read ahead from the beginning.

        Raises:
            ValueError: a document is empty or no text, a file is broken, or there is no document.
        """
        characters = number = 0
        documents = iter(self._open())
        while characters < characters_to_check:
            try:
                document = next(documents, None)
            except Exception as error:
                raise UserValueError(
                    f"{self._key}.dataset cannot be read past document {number} of stream "
                    f"{self.number}: {error}; mend or remove the file"
                ) from error
            if document is None:
                break
            characters += len(self._checked_text(document, number))
            number += 1
        if number == 0:
            raise self._no_document()

    def state_dict(self) -> dict[str, Any]:
        return {
            "sequences": self.sequences,
            "buffer": self._buffer.copy(),
            "epoch": self._epoch,
            "documents": self._documents,
            "data": self._data.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sequences = state_dict["sequences"]
        self._buffer = state_dict["buffer"]
        self._epoch = state_dict["epoch"]
        self._documents = state_dict["documents"]
        self._data = self._open()
        self._data.load_state_dict(state_dict["data"])


class PackedTextDataset(IterableDataset, Stateful):
    """The streams of one data-parallel rank, a sequence from each in turn."""

    def __init__(self, streams: list[TextStream]) -> None:
        self.streams = streams

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield ({"input": int64 [seq_len]}, int64 [seq_len]); ends with the first stream."""
        sequences = [iter(stream) for stream in self.streams]
        while True:
            # Whose turn it is can be told from the streams alone, whichever rank had them before.
            counts = [stream.sequences for stream in self.streams]
            sequence = next(sequences[counts.index(min(counts))], None)
            if sequence is None:
                return
            yield sequence

    def state_dict(self) -> dict[str, Any]:
        return {_state_key(stream.number): stream.state_dict() for stream in self.streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for stream in self.streams:
            stream.load_state_dict(state_dict[_state_key(stream.number)])


def _state_key(stream: int) -> str:
    return f"stream_{stream}"


class PackedTextDataloader(ParallelAwareDataloader):
    """A loader whose position is that of the streams, whichever rank reads them.

    Args:
        stream_count: streams of all ranks together.
        identity: what the position depends on, by the configuration key that sets it.
    """

    def __init__(
        self,
        dataset: PackedTextDataset,
        dp_rank: int,
        dp_world_size: int,
        stream_count: int,
        identity: dict[str, str],
        **kwargs,
    ) -> None:
        super().__init__(dataset, dp_rank, dp_world_size, **kwargs)
        self.stream_count = stream_count
        self._identity = identity

    def state_dict(self) -> dict[str, Any]:
        if self.num_workers == 0 or self._iterator is None:
            streams = self.dataset.state_dict()
        else:
            # The worker reads ahead; this is where it was at the last batch handed out.
            loader_state = StatefulDataLoader.state_dict(self)
            streams = loader_state["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"]
        return {
            **{key: pickle.dumps(state) for key, state in streams.items()},
            "identity": pickle.dumps(self._identity),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict``, which may hold more streams than this rank's, stopped.

        Raises:
            ValueError: it has no position, or one of other streams or other text.
        """
        if "identity" not in state_dict:
            raise _no_position("the checkpoint")
        identity = pickle.loads(state_dict["identity"])
        for key, value in self._identity.items():
            if identity.get(key) != value:
                raise UserValueError(
                    f"the checkpoint's position in the data is for {key} = {identity.get(key)}, "
                    f"this run has {value}; restore that, or {START_OVER}"
                )
        self.dataset.load_state_dict({
            key: pickle.loads(state) for key, state in state_dict.items() if key != "identity"
        })  # fmt: skip
        # One that was begun reads from before.
        self._iterator = None


def check_dataloader_state(checkpoint: str | Path, stream_count: int) -> None:
    """Check that a checkpoint folder holds the position of every stream.

    Distributed checkpoint would name a missing internal key instead.

    Raises:
        ValueError: it holds none, or that of another number of streams.
    """
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    saved = sum(key.startswith("dataloader.stream_") for key in stored)
    if saved == 0:
        raise _no_position(f"checkpoint {checkpoint}")
    if saved != stream_count:
        raise UserValueError(
            f"checkpoint {checkpoint} holds the position of {saved} streams of text, this run "
            f"deals it to {stream_count}, the sequences of its global batch; pass "
            f"--lighthouse.data_streams {saved}, or {START_OVER}"
        )


def _no_position(holder: str) -> UserValueError:
    return UserValueError(f"{holder} holds no position in the data; {START_OVER}")


def global_batch_size(job_config: JobConfig, dp_world_size: int) -> int:
    """Sequences of one optimizer step."""
    training = job_config.training
    if training.global_batch_size < 0:
        return training.local_batch_size * dp_world_size
    return training.global_batch_size


def stream_count(job_config: JobConfig, dp_world_size: int) -> int:
    """Streams that the training text is dealt to: one for each sequence of a global batch.

    Raises:
        ValueError: ranks cannot share them evenly, or they a global batch.
    """
    batch = global_batch_size(job_config, dp_world_size)
    streams = job_config.lighthouse.data_streams or batch
    if streams < 1 or streams % dp_world_size or batch % streams:
        raise UserValueError(
            f"lighthouse.data_streams = {streams} must be a multiple of the data-parallel degree "
            f"{dp_world_size} and divide the global batch of {batch} sequences"
        )
    return streams


def _build(
    key: str,
    split: str,
    streams: int,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool,
) -> PackedTextDataloader:
    section = getattr(job_config, key)
    if section.dataloader.num_workers > 1:
        raise UserValueError(
            f"{key}.dataloader.num_workers = {section.dataloader.num_workers}: documents are "
            "packed in one sequence, by 1 worker at most; use 0 or 1"
        )
    source = find_source(section.dataset, split, section.dataset_path, key)
    mix, method = None, job_config.lighthouse
    if method.passkey_mix and split == "train":
        mix = RetrievalMix(
            PromptEncoder(tokenizer),
            method.passkey_mix,
            section.seq_len + 1,
            streams,
            method.passkey_tasks,
        )
    share = streams // dp_world_size
    own = [
        TextStream(source, tokenizer, section.seq_len, number, streams, infinite, key, mix)
        for number in range(dp_rank * share, (dp_rank + 1) * share)
    ]
    if source.is_local:
        for stream in own:
            stream.check_first_documents(CHECKED_CHARACTERS // share)
    identity = {
        f"{key}.dataset": section.dataset,
        f"{key}.seq_len": str(section.seq_len),
        "lighthouse.tokenizer": job_config.lighthouse.tokenizer,
        "lighthouse.data_streams": str(streams),
        f"text of {key}.dataset": source.fingerprint,
    }
    return PackedTextDataloader(
        PackedTextDataset(own),
        dp_rank,
        dp_world_size,
        streams,
        identity,
        batch_size=section.local_batch_size,
        **vars(section.dataloader),
    )


def build_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = True,
) -> PackedTextDataloader:
    """Loader of ``training.dataset``, over and over.

    Raises:
        ValueError: the text is not there, or a document near its beginning is empty or no text.
    """
    streams = stream_count(job_config, dp_world_size)
    return _build(
        "training", "train", streams, dp_world_size, dp_rank, tokenizer, job_config, infinite
    )


def build_validation_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = False,
) -> PackedTextDataloader:
    """Loader of the held-out split of ``validation.dataset``; raises as ``build_dataloader``."""
    return _build(
        "validation",
        "validation",
        dp_world_size,
        dp_world_size,
        dp_rank,
        tokenizer,
        job_config,
        infinite,
    )
