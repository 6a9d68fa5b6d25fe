"""Counts of the documents in a step's sequences, and the FLOPs that their masks save.

Everything is counted on the host, from batches that were not copied to the device yet.
"""

from collections.abc import Callable, Sequence

import torch
from torchtitan.tools.logging import logger

from .data.documents import DOCUMENTS, PADDING
from .metrics import DOCUMENTS_PER_SEQUENCE
from .model.model import LighthouseModelArgs

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
# A run whose padding is a greater share than this is warned of it, once.
MUCH_PADDING = 0.2


class DocumentStatistics:
    """Documents of the present step's sequences on this rank; empty without document masks."""

    def __init__(self) -> None:
        self._layout: torch.Tensor | None = None
        self._padding = torch.zeros(())
        self._warned = False

    def count(self, microbatches: Sequence[Batch]) -> None:
        """Count a step's documents, and take what the model does not read out of its inputs."""
        found = [inputs.pop(PADDING) for inputs, _ in microbatches if PADDING in inputs]
        if not found:
            self._layout = None
            return
        self._padding = torch.cat(found).sum().double()
        self._layout = torch.cat([inputs[DOCUMENTS] for inputs, _ in microbatches])

    def metrics(self, sum_over: Callable[[str, torch.Tensor], float]) -> dict[str, float]:
        """Documents a sequence, and padding's share of all positions, on all ranks.

        Every rank has to call it. A large share gives a warning, once.

        Args:
            sum_over: as ``LighthouseMetricsProcessor.sum_over``.
        """
        if self._layout is None:
            return {}
        length = self._layout.shape[1]
        begins = self._layout == torch.arange(length)
        sequences = sum_over("batch", torch.tensor(float(len(begins))))
        share = sum_over("batch", self._padding) / (sequences * length)
        if share > MUCH_PADDING and not self._warned:
            self._warned = True
            logger.warning(_padding_line(share))
        return {
            DOCUMENTS_PER_SEQUENCE: sum_over("batch", begins.sum().double()) / sequences,
            "lighthouse/padding_share": share,
        }

    def flops_saved(self, args: LighthouseModelArgs, attention: str) -> float:
        """FLOPs per token that attention within documents takes less, on this rank."""
        if self._layout is None:
            return 0.0
        return args.flops_saved_by_masks(self._layout, attention)


def _padding_line(share: float) -> str:
    """The warning of a text whose documents are too short."""
    return (
        f"{share:.0%} of the positions of this step are padding, which trains nothing: the text's "
        "documents are short, and each begins at a multiple of pooling_factor^(levels - 1) "
        "positions; join several of them in the text, or lower lighthouse.levels or "
        "lighthouse.pooling_factor"
    )
