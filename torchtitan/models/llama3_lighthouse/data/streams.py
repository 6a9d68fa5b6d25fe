"""The streams that training text is dealt to, each cut into sequences of equal length."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset as TorchIterableDataset
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from .documents import DOCUMENTS, PADDING, DocumentLayout
from .mixes import Mixes
from .older_positions import is_older_reader
from .positions import check_stream, unreadable
from .skipped_positions import POSITIONS, SkippedPositions
from .stream_messages import StreamMessages
from .text_files import document_problem
from .text_sources import TextSource
from .tokenizer import ByteTokenizer

# Inputs by name, and labels.
TrainingSequence = tuple[dict[str, torch.Tensor], torch.Tensor]


def state_key(stream: int) -> str:
    """The name of a stream's position in the state of a loader."""
    return f"stream_{stream}"


class _Documents:
    """Every ``count``-th document of a dataset from document ``number`` on.

    Hugging Face's dataset forgets the position that it was given until it has been read from. This
    class returns the given position until then: a run may resume twice within a long document.
    """

    def __init__(self, data: IterableDataset, number: int, count: int) -> None:
        self._data = split_dataset_by_node(data, number, count)
        self._given: dict[str, Any] | None = None
        self._skipped = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for document in itertools.islice(self._data, self._skipped, None):
            self._given = None
            yield document

    def state_dict(self) -> dict[str, Any]:
        return self._given or self._data.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], documents: int) -> None:
        """Go on from a position behind ``documents`` documents."""
        self._given = state_dict
        if is_older_reader(state_dict) and not is_older_reader(self._data.state_dict()):
            self._skipped = documents
        else:
            self._data.load_state_dict(state_dict)


class TextStream:
    """One of ``count`` streams: every ``count``-th document, cut into sequences.

    Each document stands between BOS and EOS. A sequence has ``seq_len`` inputs and as many labels,
    the inputs shifted by one. The next sequence begins at the last label, so every token of the
    text is predicted once. With a layout of documents, a sequence holds fewer tokens and padding
    between them.

    Args:
        number: the stream's number, which is also that of its first document; both count from 0.
        infinite: begin again at the end of the text.
        messages: those of the loader that the stream belongs to.
        mixes: what stands among and within the sequences of text.
        layout: how documents lie in a sequence if they do not see each other. Passages then do not
            return in it.
        skipped: positions of the sequences if they skip some.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: BaseTokenizer,
        seq_len: int,
        number: int,
        count: int,
        infinite: bool,
        messages: StreamMessages,
        mixes: Mixes | None = None,
        layout: DocumentLayout | None = None,
        skipped: SkippedPositions | None = None,
    ) -> None:
        self.number = number
        self.sequences = 0
        self._open: Callable[[], _Documents] = lambda: _Documents(source.open(), number, count)
        self._data = self._open()
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._infinite = infinite
        self._messages = messages
        self._mixes = mixes
        self._layout = layout
        self._skipped = skipped
        self._buffer = np.empty(0, dtype=np.int32)
        # Places in the buffer, from 1 on, at which documents begin. Only a layout drops those that
        # were cut, so without one there are none.
        self._begins: list[int] = []
        self._epoch = 0
        # Documents of this epoch, and the empty ones among them.
        self._documents = 0
        self._empty = 0
        # The position before the last document was read, and how much was cut since. A position
        # thus holds no tokens of it, which may be many: a worker hands one over with every batch.
        self._before: dict[str, Any] | None = None
        self._cut_since = 0
        # How much of the next document was cut before a resume.
        self._cut_before = 0

    def __iter__(self) -> Iterator[TrainingSequence]:
        """Yield ({"input": int64 [seq_len]}, int64 [seq_len]) from the present position on.

        A layout adds ``DOCUMENTS``, int32 [seq_len], and ``PADDING``, int64 []. Skipped positions
        add ``POSITIONS``, int32 [seq_len].
        """
        while True:
            # The buffer of a resumed position may hold whole sequences.
            if not self._cut_before:
                yield from self._cut()
            before = self._position()
            for document in self._read(self._data, self._documents):
                text = self._checked_text(document, self._documents)
                self._documents += 1
                if not text:
                    self._empty += 1
                else:
                    own = self._encode(text)
                    tokens = np.concatenate([self._buffer, own])
                    if (cut := self._cut_before) > len(tokens):
                        raise unreadable(state_key(self.number), f"'cut' = {cut} is too much")
                    # A tokenizer that adds no BOS or EOS makes nothing of some texts.
                    if self._layout and len(own):
                        self._begins.append(len(self._buffer))
                    self._drop_begins(cut)
                    self._buffer, self._before = tokens[cut:], before
                    self._cut_since, self._cut_before = cut, 0
                    yield from self._cut()
                before = self._position()
            self._require_text(self._documents, self._empty)
            if not self._infinite:
                return
            self._epoch += 1
            logger.info(
                f"{self._messages.key}.dataset: stream {self.number} has been read whole: "
                f"{self._documents:,} documents, {self._empty:,} of them empty and skipped; "
                f"beginning epoch {self._epoch}"
            )
            self._documents = self._empty = 0
            # A dataset whose state was taken may begin anywhere when it is read again.
            self._data = self._open()

    def _read(self, data: _Documents, number: int) -> Iterator[dict[str, Any]]:
        """The documents of ``data``, the first of which is document ``number`` of this stream.

        Raises:
            ValueError: a file is broken.
        """
        documents = iter(data)
        while True:
            try:
                document = next(documents, None)
            except Exception as error:
                raise self._messages.unreadable(self.number, number, error) from error
            if document is None:
                return
            yield document
            number += 1

    def _cut(self) -> Iterator[TrainingSequence]:
        """Yield sequences until the buffer is too short for another."""
        while len(self._buffer) > self._seq_len:
            place = self.number, self.sequences
            others = {POSITIONS: self._skipped.of(*place)} if self._skipped else {}
            if self._mixes and (drawn := self._mixes.documents(*place)):
                window = torch.from_numpy(drawn.tokens.astype(np.int64))
                labels = window.masked_fill(~torch.from_numpy(drawn.in_loss), IGNORE_INDEX)
                if self._layout:
                    others |= self._masks(torch.from_numpy(drawn.documents[:-1]), drawn.padding)
            elif self._layout:
                yield self._laid_out(self._layout)
                continue
            else:
                tokens = self._buffer[: self._seq_len + 1]
                if self._mixes:
                    tokens = self._mixes.text(tokens, *place)
                window = labels = torch.from_numpy(tokens.astype(np.int64))
                self._buffer = self._buffer[self._seq_len :]
                self._cut_since += self._seq_len
            self.sequences += 1
            yield {"input": window[:-1], **others}, labels[1:]

    def _laid_out(self, layout: DocumentLayout) -> TrainingSequence:
        inputs, labels, documents, padding, taken = layout.lay_out(self._buffer, self._begins)
        self._buffer = self._buffer[taken:]
        self._drop_begins(taken)
        self._cut_since += taken
        self.sequences += 1
        return {"input": inputs, **self._masks(documents, padding)}, labels

    def _masks(self, documents: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
        return {DOCUMENTS: documents, PADDING: torch.tensor(padding)}

    def _drop_begins(self, cut: int) -> None:
        """Count places from ``cut`` on, which is where the buffer then begins."""
        self._begins = [begin - cut for begin in self._begins if begin > cut]

    def _encode(self, text: str) -> np.ndarray:
        """Ids of one document, int32 [tokens]."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._tokenizer.encode_array(text, add_bos=True, add_eos=True)
        ids = self._tokenizer.encode(text, add_bos=True, add_eos=True)
        return np.array(ids, dtype=np.int32)

    def _checked_text(self, document: dict[str, Any], number: int) -> str:
        """The text of document ``number`` of this stream; "" gives a warning.

        Raises:
            ValueError: it is missing or not a string.
        """
        if document_problem(document):
            raise self._messages.bad_document(self.number, number, document)
        if not document["text"]:
            self._messages.warn_of_empty(self.number, number)
        return document["text"]

    def _require_text(self, documents: int, empty: int) -> None:
        """Check that a stream that has been read whole had text."""
        if documents == 0:
            raise self._messages.no_document(self.number)
        if documents == empty:
            raise self._messages.all_empty(self.number, documents)

    def check_first_documents(self, characters_to_check: int) -> None:
        """Read ``characters_to_check`` characters from the beginning, and check each document.

        Raises:
            ValueError: a document has no text, a file is broken, or there is no document with text.
        """
        characters = number = empty = 0
        for document in self._read(self._open(), 0):
            text = self._checked_text(document, number)
            number += 1
            empty += not text
            characters += len(text)
            if characters >= characters_to_check:
                break
        self._require_text(number, empty)

    def state_dict(self) -> dict[str, Any]:
        if self._before is None:
            return {"sequences": self.sequences, **self._position(), "cut": 0}
        return {"sequences": self.sequences, **self._before, "cut": self._cut_since}

    def _position(self) -> dict[str, Any]:
        """The position in the documents, with what is left of those that were read."""
        return {
            "buffer": self._buffer,
            "epoch": self._epoch,
            "documents": self._documents,
            "empty": self._empty,
            "data": self._data.state_dict(),
            **({"begins": list(self._begins)} if self._layout else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            ValueError: it is no position of such a stream.
        """
        # A dataset whose state was taken may begin anywhere when it is read, so it is another one.
        start = {"data": self._open().state_dict()}
        check_stream(state_dict, start, state_key(self.number))
        self._data = self._open()
        self.sequences = state_dict["sequences"]
        self._buffer = state_dict["buffer"]
        self._begins = list(state_dict["begins"])
        self._epoch = state_dict["epoch"]
        self._documents = state_dict["documents"]
        self._empty = state_dict["empty"]
        self._data.load_state_dict(state_dict["data"], self._documents)
        self._cut_since = self._cut_before = state_dict["cut"]
        # Until the document has been read again, the position is the given one.
        self._before = self._position() if self._cut_since else None


class PackedTextDataset(TorchIterableDataset, Stateful):
    """The streams of one data-parallel rank, a sequence from each in turn.

    If a step reads fewer sequences than there are streams, each of its sequences belongs to
    neighbouring streams, as many for each, and takes them in turn. The order is thus the same for
    any number of ranks.

    Args:
        step_sequences: sequences that this rank reads in an optimizer step. Reading begins and goes
            on at the beginning of a step.
    """

    def __init__(self, streams: list[TextStream], step_sequences: int) -> None:
        self.streams = streams
        size = max(1, len(streams) // step_sequences)
        groups = [streams[first : first + size] for first in range(0, len(streams), size)]
        self._groups = groups if size > 1 else [streams]

    def __iter__(self) -> Iterator[TrainingSequence]:
        """Yield ({"input": int64 [seq_len]}, int64 [seq_len]) until a stream has no more."""
        sequences = {stream.number: iter(stream) for stream in self.streams}
        for group in itertools.cycle(self._groups):
            # The streams' own counts tell whose turn it is, even if another rank read them before.
            stream = min(group, key=lambda stream: stream.sequences)
            sequence = next(sequences[stream.number], None)
            if sequence is None:
                return
            yield sequence

    def state_dict(self) -> dict[str, Any]:
        return {state_key(stream.number): stream.state_dict() for stream in self.streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for stream in self.streams:
            stream.load_state_dict(state_dict[state_key(stream.number)])
