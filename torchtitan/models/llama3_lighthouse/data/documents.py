"""Documents of a sequence that do not see each other: ``training.document_mask``.

Every document begins at a multiple of the coarsest entry's span, so that no entry covers parts of
two. Padding fills the positions before such a place. It belongs to the document before it, comes
after all of its tokens, and has no label.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.loss import IGNORE_INDEX

from lighthouse.documents import check_layout

from ..job_config import JobConfig, Lighthouse
from ..stages import stages_of

# Names among a sequence's inputs: its layout, and how many of its positions are padding.
DOCUMENTS, PADDING = "documents", "padding"


def document_span(config: JobConfig) -> int:
    """Positions that the first position of each document is a multiple of.

    Validation has the same places in all stages, and serves the one with the longest entries. Spans
    are powers of two. Windows and dense attention take documents that begin anywhere.
    """
    sections = [x.config.lighthouse for x in stages_of(config) if x.attention == "lighthouse"]
    selecting = [section for section in sections if section.attention == "lighthouse"]
    return max((x.pooling_factor ** (x.levels - 1) for x in selecting), default=1)


class LaidOut(NamedTuple):
    """A sequence of N positions whose documents lie apart.

    Attributes:
        inputs, labels: int64 [N]; ``IGNORE_INDEX`` is the label of padding.
        documents: int32 [N], for each position the first position of its document.
        padding: positions that hold no token of the text.
        taken: tokens of the text that became inputs.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    documents: torch.Tensor
    padding: int
    taken: int


@dataclass(frozen=True)
class DocumentLayout:
    """How documents lie in sequences.

    Attributes:
        seq_len: N.
        span: positions that the first position of each document is a multiple of.
    """

    seq_len: int
    span: int

    def lay_out(self, tokens: np.ndarray, begins: Sequence[int]) -> LaidOut:
        """The sequence that the first of ``tokens`` make up.

        A label is the next token of the text, as in sequences without padding. A document that
        does not end here goes on as another one at the beginning of the next sequence.

        Args:
            tokens: [M], M above N.
            begins: places from 1 to M - 1 in ``tokens`` at which documents begin, in rising order.
        """
        inputs = np.empty(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        documents = np.empty(self.seq_len, dtype=np.int32)
        place = first = taken = 0
        bounds = itertools.pairwise((0, *begins, len(tokens)))
        for begin, end in bounds:
            if place >= self.seq_len:
                break
            first, taken = place, min(end, begin + self.seq_len - place)
            place = first + taken - begin
            inputs[first:place] = tokens[begin:taken]
            labels[first:place] = tokens[begin + 1 : taken + 1]
            documents[first:place] = first
            aligned = place + -place % self.span
            # A document's last token stands in for the tokens that there are not.
            inputs[place:aligned] = tokens[taken - 1]
            documents[place:aligned] = first
            place = aligned
        inputs[place:] = tokens[taken - 1]
        documents[place:] = first
        laid_out = torch.from_numpy(documents)
        check_layout(laid_out[None], self.span)
        padding = self.seq_len - taken
        return LaidOut(torch.from_numpy(inputs), torch.from_numpy(labels), laid_out, padding, taken)


def layout_of(config: JobConfig, seq_len: int, span: int | None = None) -> DocumentLayout | None:
    """How documents lie in sequences of ``seq_len`` positions; None if they lie side by side.

    Args:
        span: positions that the first position of each document is a multiple of, 0 for no layout;
            None: as ``config`` says.
    """
    if span is None:
        span = document_span(config) if config.training.document_mask else 0
    return DocumentLayout(seq_len, span) if span else None


def layout_lines(config: JobConfig) -> list[str]:
    """The line of a run's description about documents, if they do not see each other."""
    layout = layout_of(config, config.training.seq_len)
    if layout is None:
        return []
    places = "and begin anywhere"
    if layout.span > 1:
        places = f"and each begins at a multiple of {layout.span} positions"
    runs = "run on" if config.lighthouse.document_positions == "run_on" else "restart with each"
    return [
        f"documents     do not see each other {places}; rotary positions {runs}; "
        "FLOPs below are the most, those of one document a sequence"
    ]


def without_idle_masks(
    inputs: dict[str, torch.Tensor], batch_mesh: DeviceMesh | None
) -> dict[str, torch.Tensor]:
    """``inputs`` without their documents if each row is one document, where masks change nothing.

    The kernels without masks are faster. Call it before the copy to the device: reading the layout
    there would hold up the host.

    Args:
        inputs: a microbatch of a loader, on the CPU.
        batch_mesh: the ranks that read other text. With such ranks the documents stay: a step is as
            slow as the slowest of them, and one that compiles late in a run would let all wait.
    """
    # A row that is one document has 0 everywhere.
    if batch_mesh is not None or DOCUMENTS not in inputs or inputs[DOCUMENTS].any():
        return inputs
    return {name: x for name, x in inputs.items() if name != DOCUMENTS}


def positions_within(documents: torch.Tensor) -> torch.Tensor:
    """The position of each of ``documents`` [B, N] in its document, from 0."""
    return torch.arange(documents.shape[1], device=documents.device) - documents


def model_options(documents: torch.Tensor | None, section: Lighthouse) -> dict[str, torch.Tensor]:
    """What a model's forward takes besides tokens, on the device of ``documents`` [B, N]."""
    if documents is None:
        return {}
    options = {"attention_masks": documents}
    if section.document_positions == "restart":
        options["positions"] = positions_within(documents)
    return options
