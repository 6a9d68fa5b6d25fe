"""Documents of a sequence that lies in chunks on several ranks.

Every rank is given the layout of the whole sequence, ``documents`` [B, N], and takes what its
chunks need. A document may begin in one chunk and go on in later ones. Within a later chunk it
begins at position 0, and ``before`` says how much of it lies in earlier chunks.

Everything in this file depends on the layout alone, never on q, k or v.

Shapes: B batch, N positions of the whole sequence, W ranks, M chunks on this rank, C positions of a
chunk, S gathered length of a chunk.
"""

from typing import NamedTuple

import torch

from .context_parallel import ContextParallel
from .documents import first_positions, gathered_documents
from .geometry import PyramidGeometry


class ChunkDocuments(NamedTuple):
    """The documents of the chunks on this rank.

    Attributes:
        own: layout of each chunk, [B M, C]: for each position, the first position of its document
            in the chunk, counted from the chunk's first.
        before: positions that the first document of each chunk has in earlier chunks, [B M]; 0 if
            it begins with the chunk.
    """

    own: torch.Tensor
    before: torch.Tensor

    @property
    def continues(self) -> torch.Tensor:
        """Whether the first document of each chunk began in an earlier one, bool [B M]."""
        return self.before > 0


def documents_of_chunks(documents: torch.Tensor, layout: ContextParallel) -> ChunkDocuments:
    """The documents of the chunks on this rank, in the order of ``ContextParallel.split``.

    Args:
        documents: layout of the whole sequence, [B, W M C], the same on every rank.
    """
    ring = layout.rank, layout.world_size, layout.balanced
    return ChunkDocuments(*torch.ops.lighthouse.documents_of_chunks(documents, *ring))


def gathered_documents_of_chunks(
    documents: torch.Tensor, geometry: PyramidGeometry, layout: ContextParallel
) -> torch.Tensor:
    """The layout of documents of the gathered sequences of all chunks, joined in order.

    Args:
        documents: layout of the whole sequence, [B, W M C].
        geometry: that of one chunk.

    Returns:
        int32 [B, W M S], for each place the first place of its document.
    """
    own, before = _in_chunks(documents, layout.chunks)
    places = gathered_documents(own.flatten(0, 1), geometry)
    begins = places == torch.arange(places.shape[1], device=places.device)
    begins = begins.unflatten(0, before.shape)
    # A chunk's first document is at the chunk's first place, and may have begun in an earlier one.
    begins = torch.cat([begins[..., :1] & (before == 0).unsqueeze(-1), begins[..., 1:]], dim=-1)
    return first_positions(begins.flatten(1).cumsum(1))


def _in_chunks(documents: torch.Tensor, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``ChunkDocuments`` of all chunks, [B, chunks, C] and [B, chunks]."""
    parts = documents.unflatten(1, (chunks, -1))
    first = torch.arange(chunks, dtype=documents.dtype, device=documents.device) * parts.shape[2]
    return (parts - first[:, None]).clamp(min=0), (first - parts[..., 0]).clamp(min=0)


# Every rank takes other chunks. As an operation this is the same in all their graphs, and a
# compiler does on every rank alike with it.
@torch.library.custom_op(
    "lighthouse::documents_of_chunks",
    mutates_args=(),
    schema="(Tensor documents, int rank, int world_size, bool balanced) -> (Tensor, Tensor)",
)
def _documents_of_chunks(
    documents: torch.Tensor, rank: int, world_size: int, balanced: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = ContextParallel(None, rank, world_size, balanced)
    own, before = (
        torch.stack([rows[:, number] for number in layout.held], dim=1).flatten(0, 1)
        for rows in _in_chunks(documents, layout.chunks)
    )
    return own, before


@_documents_of_chunks.register_fake
def _(
    documents: torch.Tensor, rank: int, world_size: int, balanced: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = ContextParallel(None, rank, world_size, balanced)
    rows = documents.shape[0] * len(layout.held)
    own = documents.new_empty((rows, documents.shape[1] // layout.chunks))
    return own, documents.new_empty((rows,))
