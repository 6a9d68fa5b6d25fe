"""The loaders of training and validation, and the position from which they resume exactly.

Documents are dealt to streams (``streams.TextStream``). Every rank reads its share of the streams,
and a checkpoint holds the position of each stream, whichever rank reads it.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from ..errors import UserValueError
from ..job_config import JobConfig
from ..processes import serve_parent
from .documents import layout_of
from .fingerprint import BY_CONTENT
from .mixes import mixes_of
from .positions import START_OVER, decode, encode
from .skipped_positions import skipped_positions_of
from .stream_messages import StreamMessages
from .streams import PackedTextDataset, TextStream, state_key
from .text_sources import TextSource, find_source
from .tokenizer import tokenizer_fingerprint

MASK = "training.document_mask"
# Values in positions of earlier versions, which do not name them.
BEFORE = {MASK: "False"}
TOKENIZER_FILE = "the tokenizer in model.hf_assets_path"
# Characters of local text that are read when a loader is built, so that bad documents show at once.
CHECKED_CHARACTERS = 32 * 2**20


class PackedTextDataloader(ParallelAwareDataloader):
    """A loader whose saved position belongs to the streams, not to the rank that reads them.

    Args:
        stream_count: streams of all ranks together.
        settings: those that a saved position depends on, by configuration key.
        key: section of the configuration that names the text.
        source: the text, on which a saved position depends as well.
    """

    dataset: PackedTextDataset

    def __init__(
        self,
        dataset: PackedTextDataset,
        dp_rank: int,
        dp_world_size: int,
        stream_count: int,
        settings: dict[str, str],
        key: str,
        source: TextSource,
        **kwargs: Any,
    ) -> None:
        with warnings.catch_warnings():
            # torchdata calls a function that the next torch will drop.
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")
            super().__init__(dataset, dp_rank, dp_world_size, **kwargs)
        self.stream_count = stream_count
        self._settings = settings
        self._key = key
        self._source = source

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the text; the first call may read all of it."""
        return self._source.fingerprint()

    # pyrefly: ignore[bad-override]  torchtitan's trainer and validator only call next().
    def __iter__(self) -> Iterator[Any]:
        return _without_traceback(super().__iter__())

    def _positions(self) -> dict[str, Any]:
        """The position of each stream after the last batch that was handed out."""
        if self.num_workers == 0 or self._iterator is None:
            return self.dataset.state_dict()
        # The worker reads ahead; its snapshot is of the last batch that it handed out.
        loader_state = StatefulDataLoader.state_dict(self)
        return loader_state["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"]

    def go_on_from(self, other: "PackedTextDataloader") -> None:
        """Continue where ``other`` is, which reads the same streams of the same text."""
        self.dataset.load_state_dict(other._positions())
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        return {
            **{key: encode(state) for key, state in self._positions().items()},
            "identity": encode({**self._settings, self._text: self.fingerprint}),
        }

    def load_state_dict(self, state_dict: dict[str, Any], but: Sequence[str] = ()) -> None:
        """Continue from a position, which may hold more streams than this rank reads.

        Args:
            but: settings in which the position may differ from this run.

        Raises:
            ValueError: the state holds no position, or one in other streams or other text.
        """
        if "identity" not in state_dict:
            raise _no_position("the checkpoint")
        identity = decode(state_dict["identity"], "identity")
        for key, value in self._settings.items():
            # Positions of earlier versions do not tell which file the tokenizer was read from.
            if key in but or (key == TOKENIZER_FILE and key not in identity):
                continue
            saved = identity.get(key, BEFORE.get(key))
            if saved != value:
                keep = ""
                if key == "training.seq_len":
                    keep = "pass --lighthouse.keep_position to go on from there all the same, or "
                raise UserValueError(
                    f"the checkpoint's position in the data is for {key} = {saved}, "
                    f"this run has {value}; restore that, or {keep}{START_OVER}"
                )
        self._check_text(identity.get(self._text))
        # Positions of other ranks' streams need not be read.
        names = [state_key(stream.number) for stream in self.dataset.streams]
        if missing := [name for name in names if name not in state_dict]:
            raise _no_position(f"the checkpoint's entry 'dataloader.{missing[0]}'")
        self.dataset.load_state_dict({name: decode(state_dict[name], name) for name in names})
        # An iterator that has begun would go on from its old position.
        self._iterator = None

    @property
    def _text(self) -> str:
        """The name of the text's fingerprint in a saved position."""
        return f"text of {self._key}.dataset"

    def _check_text(self, saved: Any) -> None:
        """Check that a position is for the text of this run.

        Raises:
            ValueError: the text is another one.
        """
        if saved == self.fingerprint:
            return
        problem = "its files, their contents or their order changed since; restore them, or"
        if self._source.older_fingerprint and not str(saved).startswith(BY_CONTENT):
            older = self._source.older_fingerprint()
            if older is not None and saved == older:
                logger.warning(
                    f"The checkpoint's {self._text} fits by the names and sizes of its files, "
                    "which is all that older versions kept; their contents could not be compared"
                )
                return
            if older is None:
                problem = "an older version read other files or in another order;"
        raise UserValueError(
            f"the checkpoint's position in the data is for another {self._text}: {problem} "
            f"{START_OVER}"
        )


def _without_traceback(batches: Iterator[Any]) -> Iterator[Any]:
    """``batches``, with a worker's mistake of the user as the worker's own message.

    torch puts the worker's traceback before it.
    """
    try:
        yield from batches
    except UserValueError as error:
        message = str(error)
        if "DataLoader worker process" not in message:
            raise
        raise UserValueError(message.rpartition("UserValueError: ")[2].strip()) from None


def check_dataloader_state(
    checkpoint: str | Path, stored: Iterable[str], stream_count: int
) -> None:
    """Check that a checkpoint folder holds the position of every stream.

    Without this check, torch's error would name an internal key instead.

    Args:
        stored: names of what the checkpoint holds.

    Raises:
        ValueError: the folder holds no position, or the positions of another number of streams.
    """
    saved = sum(key.startswith("dataloader.stream_") for key in stored)
    if saved == 0:
        raise _no_position(f"checkpoint {checkpoint}")
    if saved != stream_count:
        raise UserValueError(
            f"checkpoint {checkpoint} has lighthouse.data_streams = {saved}, this run "
            f"{stream_count}, by default the sequences of its global batch; pass "
            f"--lighthouse.data_streams {saved}, or {START_OVER}"
        )


def _no_position(holder: str) -> UserValueError:
    return UserValueError(f"{holder} holds no position in the data; {START_OVER}")


def global_batch_size(job_config: JobConfig, dp_world_size: int) -> int:
    """Number of sequences in one optimizer step."""
    training = job_config.training
    if training.global_batch_size < 0:
        return training.local_batch_size * dp_world_size
    return training.global_batch_size


def can_share(batch: int, streams: int) -> bool:
    """Whether a step of ``batch`` sequences reads all streams alike, at once or in turn."""
    return batch % streams == 0 or streams % batch == 0


def stream_count(job_config: JobConfig, dp_world_size: int) -> int:
    """Streams that the training text is dealt to.

    By default there is one for each sequence of a global batch.

    Raises:
        ValueError: the streams cannot be shared evenly by the ranks, or by the sequences of a
            global batch.
    """
    batch = global_batch_size(job_config, dp_world_size)
    streams = job_config.lighthouse.data_streams or batch
    if streams < 1 or streams % dp_world_size or not can_share(batch, streams):
        raise UserValueError(
            f"lighthouse.data_streams = {streams} must be a multiple of the data-parallel degree "
            f"{dp_world_size}, and divide the global batch of {batch} sequences or be a multiple "
            "of it"
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
    check: bool = True,
    span: int | None = None,
) -> PackedTextDataloader:
    """Loader of this rank's share of the streams.

    Args:
        key: section of the configuration, "training" or "validation".
        streams: streams of all ranks together.
        check: whether to read the first documents of local text.
        span: as in ``layout_of``.
    """
    section = getattr(job_config, key)
    if section.dataloader.num_workers > 1:
        raise UserValueError(
            f"{key}.dataloader.num_workers = {section.dataloader.num_workers}: documents are "
            "packed in one sequence, by 1 worker at most; use 0 or 1"
        )
    # Runs that are compared validate on the same text, whatever the order of their own.
    seed = job_config.lighthouse.shuffle_seed if split == "train" else 0
    source = find_source(section.dataset, split, section.dataset_path, key, seed)
    for line in source.describe():
        _say_once(line)
    mixes = mixes_of(job_config, tokenizer, streams) if split == "train" else None
    share = streams // dp_world_size
    of_step = share
    if split == "train":
        of_step = global_batch_size(job_config, dp_world_size) // dp_world_size
    messages = StreamMessages(source, key, streams)
    layout = layout_of(job_config, section.seq_len, span)
    skipped = skipped_positions_of(job_config) if split == "train" else None
    own = [
        TextStream(
            source,
            tokenizer,
            section.seq_len,
            number,
            streams,
            infinite,
            messages,
            mixes,
            layout,
            skipped,
        )
        for number in range(dp_rank * share, (dp_rank + 1) * share)
    ]
    if check and source.is_local:
        for stream in own:
            stream.check_first_documents(CHECKED_CHARACTERS // share)
    settings = {
        f"{key}.dataset": section.dataset,
        f"{key}.seq_len": str(section.seq_len),
        "lighthouse.tokenizer": job_config.lighthouse.tokenizer,
        "lighthouse.data_streams": str(streams),
        MASK: str(job_config.training.document_mask),
    }
    if job_config.lighthouse.tokenizer == "hf":
        settings[TOKENIZER_FILE] = tokenizer_fingerprint(tokenizer)
    return PackedTextDataloader(
        PackedTextDataset(own, of_step),
        dp_rank,
        dp_world_size,
        streams,
        settings,
        key,
        source,
        batch_size=section.local_batch_size,
        worker_init_fn=serve_parent,
        **vars(section.dataloader),
    )


@cache
def _say_once(line: str) -> None:
    """Log a line if it was not logged before; every validation builds a loader."""
    logger.info(line)


def build_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = True,
    known: PackedTextDataloader | None = None,
) -> PackedTextDataloader:
    """Loader of ``training.dataset``; begins again at the end of the text.

    Args:
        known: another loader of this text, which then is neither checked nor fingerprinted again.

    Raises:
        ValueError: the text cannot be found or read, or a document near its beginning has no text.
    """
    streams = stream_count(job_config, dp_world_size)
    loader = _build(
        "training",
        "train",
        streams,
        dp_world_size,
        dp_rank,
        tokenizer,
        job_config,
        infinite,
        check=known is None,
    )
    # A run without checkpoints asks for no fingerprint, for which all text may be read.
    if known is not None and "fingerprint" in vars(known):
        loader.fingerprint = known.fingerprint
    elif job_config.checkpoint.enable:
        # The first save would wait for it otherwise, and might find text that changed meanwhile.
        _ = loader.fingerprint
    return loader


def build_validation_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = False,
    span: int | None = None,
) -> PackedTextDataloader:
    """Loader of the held-out split of ``validation.dataset``.

    Args:
        span: positions that documents begin at multiples of, 0 for neither layout nor padding;
            None: as ``training.document_mask`` says.

    Raises:
        ValueError: as ``build_dataloader``.
    """
    return _build(
        "validation",
        "validation",
        dp_world_size,
        dp_world_size,
        dp_rank,
        tokenizer,
        job_config,
        infinite,
        span=span,
    )
