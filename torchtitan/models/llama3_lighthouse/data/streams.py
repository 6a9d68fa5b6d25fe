"""The streams that training text is dealt to, each cut into sequences of equal length."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from ..errors import UserValueError
from .retrieval_mix import RetrievalMix
from .text_sources import TextSource
from .tokenizer import ByteTokenizer

# Inputs by name, and labels.
TrainingSequence = tuple[dict[str, torch.Tensor], torch.Tensor]


class _Documents:
    """Every ``count``-th document of a dataset from document ``number`` on.

    Hugging Face's dataset forgets the position that it was given until it has been read from. This
    class returns the given position until then: a run may resume twice within a long document.
    """

    def __init__(self, data: IterableDataset, number: int, count: int) -> None:
        self._data = split_dataset_by_node(data, number, count)
        self._given: dict[str, Any] | None = None

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
    """One of ``count`` streams: every ``count``-th document, cut into sequences.

    Each document stands between BOS and EOS. A sequence has ``seq_len`` inputs and as many labels,
    the inputs shifted by one. The next sequence begins at the last label, so every token of the
    text is predicted once.

    Args:
        number: the stream's number, which is also that of its first document; both count from 0.
        infinite: begin again at the end of the text.
        key: section of the configuration that names the text, for messages.
        mix: sequences that stand between those of text; no text is lost to them.
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
        self._open: Callable[[], _Documents] = lambda: _Documents(source.open(), number, count)
        self._data = self._open()
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._infinite = infinite
        self._key = key
        self._mix = mix
        self._buffer = np.empty(0, dtype=np.int32)
        self._epoch = 0
        self._documents = 0

    def __iter__(self) -> Iterator[TrainingSequence]:
        """Yield ({"input": int64 [seq_len]}, int64 [seq_len]) from the present position on."""
        while True:
            # The buffer of a resumed position may hold whole sequences.
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
            # A dataset whose state was taken may begin anywhere when it is read again.
            self._data = self._open()
            logger.info(
                f"{self._key}.dataset: stream {self.number} has been read whole; "
                f"beginning epoch {self._epoch}"
            )

    def _cut(self) -> Iterator[TrainingSequence]:
        """Yield sequences until the buffer is too short for another."""
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
        """Ids of one document, int32 [tokens]."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._tokenizer.encode_array(text, add_bos=True, add_eos=True)
        ids = self._tokenizer.encode(text, add_bos=True, add_eos=True)
        return np.array(ids, dtype=np.int32)

    def _checked_text(self, document: dict[str, Any], number: int) -> str:
        """The text of document ``number`` of this stream.

        Raises:
            ValueError: it is empty, missing or not a string.
        """
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
        """Read ``characters_to_check`` characters from the beginning, and check each document.

        Raises:
            ValueError: a document is empty or has no text, a file is broken, or there is no
                document.
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
