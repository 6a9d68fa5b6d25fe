"""Documents packed into training sequences, with a position that a resume continues exactly."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from .job_config import JobConfig
from .text_sources import TextSource, find_source
from .tokenizer import ByteTokenizer

START_OVER = (
    "pass --checkpoint.exclude_from_loading dataloader to start the text over on purpose, with "
    "weights and optimizer as saved"
)
# Local text that is read ahead when a loader is built, so that bad documents show up at once.
CHECKED_CHARACTERS = 32 * 2**20


class PackedTextDataset(IterableDataset, Stateful):
    """Every ``dp_world_size``-th document, each between BOS and EOS, cut into sequences.

    A sequence has ``seq_len`` inputs and as many labels, the inputs shifted by one; the next one
    begins at the last label, so every token of the text is predicted once.

    Yields:
        ({"input": int64 [seq_len]}, int64 [seq_len]).
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: BaseTokenizer,
        seq_len: int,
        dp_rank: int,
        dp_world_size: int,
        infinite: bool,
        key: str,
    ) -> None:
        self._open = lambda: split_dataset_by_node(source.open(), dp_rank, dp_world_size)
        self._data = self._open()
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._infinite = infinite
        self._key = key
        self._buffer = np.empty(0, dtype=np.int32)
        self._epoch = 0
        self._documents = 0
        if source.is_local:
            self._check_first_documents(dp_rank, dp_world_size)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            # First what a resumed position still holds.
            yield from self._cut()
            for document in self._data:
                text = self._checked_text(document, self._documents)
                self._documents += 1
                self._buffer = np.concatenate([self._buffer, self._encode(text)])
                yield from self._cut()
            if self._documents == 0:
                raise ValueError(
                    f"{self._key}.dataset holds no document for this data-parallel rank; give it "
                    "more documents or lower parallelism.data_parallel_shard_degree"
                )
            if not self._infinite:
                return
            self._epoch += 1
            self._documents = 0
            # A stream that is read a second time may begin anywhere once its state was taken.
            self._data = self._open()
            logger.info(f"{self._key}.dataset has been read whole; beginning epoch {self._epoch}")

    def _cut(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while len(self._buffer) > self._seq_len:
            window = torch.from_numpy(self._buffer[: self._seq_len + 1].astype(np.int64))
            self._buffer = self._buffer[self._seq_len :]
            yield {"input": window[:-1]}, window[1:]

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
        raise ValueError(
            f"{self._key}.dataset: document {number} of this rank (counted from 0) {problem}; "
            "remove or mend it"
        )

    def _check_first_documents(self, dp_rank: int, dp_world_size: int) -> None:
        characters = number = 0
        documents = iter(self._open())
        while characters < CHECKED_CHARACTERS:
            try:
                document = next(documents, None)
            except Exception as error:
                raise ValueError(
                    f"{self._key}.dataset cannot be read past document {number} of this rank: "
                    f"{error}; mend or remove the file"
                ) from error
            if document is None:
                break
            characters += len(self._checked_text(document, number))
            number += 1
        if number == 0:
            raise ValueError(
                f"{self._key}.dataset has no document for data-parallel rank {dp_rank} of "
                f"{dp_world_size}; give it more documents or use fewer data-parallel ranks"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "buffer": self._buffer.copy(),
            "epoch": self._epoch,
            "documents": self._documents,
            "data": self._data.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._buffer = state_dict["buffer"]
        self._epoch = state_dict["epoch"]
        self._documents = state_dict["documents"]
        self._data = self._open()
        self._data.load_state_dict(state_dict["data"])


class PackedTextDataloader(ParallelAwareDataloader):
    """A loader whose position is void without the text, sequence length and tokenizer it is of.

    Args:
        identity: what the position depends on, by the configuration key that sets it.
    """

    def __init__(self, dataset, dp_rank, dp_world_size, identity: dict[str, str], **kwargs) -> None:
        super().__init__(dataset, dp_rank, dp_world_size, **kwargs)
        self._identity = identity

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "identity": pickle.dumps(self._identity)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` stopped.

        Raises:
            ValueError: it has no state for this rank, or is of another number of ranks or of
                other text.
        """
        saved = [key for key in state_dict if key.startswith("dp_rank_")]
        if self._rank_id not in saved or state_dict["world_size"] != self.dp_world_size:
            raise _other_degree(state_dict.get("world_size", len(saved)), self.dp_world_size)
        identity = pickle.loads(state_dict["identity"])
        for key, value in self._identity.items():
            if identity.get(key) != value:
                raise ValueError(
                    f"the checkpoint's position in the data is for {key} = {identity.get(key)}, "
                    f"this run has {value}; restore that, or {START_OVER}"
                )
        super().load_state_dict(state_dict)


def _other_degree(saved: int, wanted: int) -> ValueError:
    return ValueError(
        f"the checkpoint's position in the data is for data-parallel degree {saved}, this run has "
        f"{wanted}; use {saved}, or {START_OVER}"
    )


def check_dataloader_state(checkpoint: str | Path, dp_world_size: int) -> None:
    """Check that a checkpoint folder holds a position in the data for every rank.

    Distributed checkpoint would name a missing internal key instead.

    Raises:
        ValueError: it holds none, or that of another number of data-parallel ranks.
    """
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    saved = sum(key.startswith("dataloader.dp_rank_") for key in stored)
    if saved == 0:
        raise ValueError(f"checkpoint {checkpoint} holds no position in the data; {START_OVER}")
    if saved != dp_world_size:
        raise _other_degree(saved, dp_world_size)


def _build(
    key: str,
    split: str,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool,
) -> PackedTextDataloader:
    section = getattr(job_config, key)
    if section.dataloader.num_workers > 1:
        raise ValueError(
            f"{key}.dataloader.num_workers = {section.dataloader.num_workers}: documents are "
            "packed in one sequence, by 1 worker at most; use 0 or 1"
        )
    source = find_source(section.dataset, split, section.dataset_path, key)
    dataset = PackedTextDataset(
        source, tokenizer, section.seq_len, dp_rank, dp_world_size, infinite, key
    )
    identity = {
        f"{key}.dataset": section.dataset,
        f"{key}.seq_len": str(section.seq_len),
        "lighthouse.tokenizer": job_config.lighthouse.tokenizer,
        f"text of {key}.dataset": source.fingerprint,
    }
    return PackedTextDataloader(
        dataset,
        dp_rank,
        dp_world_size,
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
    return _build("training", "train", dp_world_size, dp_rank, tokenizer, job_config, infinite)


def build_validation_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = False,
) -> PackedTextDataloader:
    """Loader of the held-out split of ``validation.dataset``; raises as ``build_dataloader``."""
    return _build(
        "validation", "validation", dp_world_size, dp_rank, tokenizer, job_config, infinite
    )
