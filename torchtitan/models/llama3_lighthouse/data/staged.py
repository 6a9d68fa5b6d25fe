"""The loader of a run whose sequences change their length from stage to stage."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from ..errors import UserValueError
from ..job_config import JobConfig
from ..stages import distinct_stages, naming
from .documents import DocumentLayout, layout_of
from .mixes import mixes_of
from .packing import PackedTextDataloader, build_dataloader, stream_count
from .positions import decode
from .skipped_positions import SkippedPositions, skipped_positions_of

LENGTH = "training.seq_len"


class StagedDataloader(BaseDataLoader):
    """The loader of the present stage; the next one goes on in the text where it ended.

    An iterator follows: its next batch comes from the stage that was named last.

    Args:
        configs: the configurations of the stages; the first one's loader comes first.
        build: makes the loader of a stage, given another one of the same text if there is one.
        any_length: whether a position may be of sequences of a length that no stage has.
    """

    def __init__(
        self,
        configs: Iterable[JobConfig],
        build: Callable[[JobConfig, PackedTextDataloader | None], PackedTextDataloader],
        any_length: bool,
    ) -> None:
        self._configs = list(configs)
        self._build = build
        self._any_length = any_length
        self._shape = _shape(self._configs[0])
        self.present = build(self._configs[0], None)
        self._restored = False

    @property
    def seq_len(self) -> int:
        """Length of the sequences that this loader gives now."""
        return self._shape[0]

    @property
    def stream_count(self) -> int:
        """Streams of all ranks together, as many in every stage."""
        return self.present.stream_count

    def use(self, config: JobConfig) -> None:
        """Give the sequences of a stage from the next batch on."""
        if _shape(config) == self._shape:
            return
        before, self.present = self.present, self._build(config, self.present)
        self.present.go_on_from(before)
        self._shape = _shape(config)

    def __iter__(self) -> Iterator[Any]:
        loader = None
        while loader is not self.present:
            loader = self.present
            for batch in loader:
                yield batch
                if loader is not self.present:
                    break

    def state_dict(self) -> dict[str, Any]:
        return self.present.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position, in the stage whose sequences have its length.

        Raises:
            ValueError: as ``PackedTextDataloader``.
        """
        if "identity" in state_dict:
            # A length that no stage has is refused below, unless it is meant.
            length = decode(state_dict["identity"], "identity").get(LENGTH)
            fits = (x for x in self._configs if str(x.training.seq_len) == length)
            config = next(fits, self._configs[0])
            if _shape(config) != self._shape:
                self.present = self._build(config, self.present)
                self._shape = _shape(config)
            if self._any_length and length != str(self.seq_len):
                logger.warning(
                    f"The text goes on from sequences of {length} tokens in ones of "
                    f"{self.seq_len}, as lighthouse.keep_position asks"
                )
        self._restored = True
        self.present.load_state_dict(state_dict, but=(LENGTH,) if self._any_length else ())

    def check_length(self, step: int, expected: int) -> None:
        """Check that the position after ``step`` steps is one of the stage that ended them.

        Raises:
            ValueError: its sequences have another length than ``expected``.
        """
        if self._restored and self.seq_len != expected and not self._any_length:
            raise UserValueError(
                f"the checkpoint's position in the data, after step {step}, is in sequences of "
                f"{self.seq_len} tokens, and lighthouse.schedule has {expected} there; restore the "
                "schedule, or pass --lighthouse.keep_position to go on from there all the same"
            )


def _shape(
    config: JobConfig,
) -> tuple[int, int, DocumentLayout | None, SkippedPositions | None]:
    length, batch = config.training.seq_len, config.training.local_batch_size
    return length, batch, layout_of(config, length), skipped_positions_of(config)


def build_staged_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = True,
) -> StagedDataloader:
    """Loader of ``training.dataset`` for all stages; begins again at the end of the text.

    Raises:
        ValueError: as ``build_dataloader``.
    """
    streams = stream_count(job_config, dp_world_size)

    def build(config: JobConfig, known: PackedTextDataloader | None) -> PackedTextDataloader:
        config = copy.deepcopy(config)
        # As many in each stage, whatever its batch.
        config.lighthouse.data_streams = streams
        return build_dataloader(dp_world_size, dp_rank, tokenizer, config, infinite, known)

    stages = distinct_stages(job_config)
    for stage in stages:
        # A later stage would complain of its sequences only when it begins.
        with naming(stage):
            mixes_of(stage.config, tokenizer, streams)
    configs = [stage.config for stage in stages]
    return StagedDataloader(configs, build, job_config.lighthouse.keep_position)
