"""Which outputs reach which positions, within a chunk and from the chunk before it.

The output of entry (l, i) reaches the p^l positions that start at its end. At each level one entry
can reach position t: entry (t - p^l + 1) // p^l of this chunk, or, where t < p^l - 1, the last
entry of the chunk before this one. The output of that last entry is called a seam row.

Shapes: B batch, H query heads, Hkv key-value heads, N positions (of a chunk), D head dimension,
S gathered length, P pyramid length, L levels.
"""

from typing import NamedTuple

import torch

from .geometry import PyramidGeometry
from .precision import accumulation_dtype


class Reach(NamedTuple):
    """The outputs of one level that positions take.

    Attributes:
        place: place of the entry whose output each position takes, int [B, Hkv, N]; -1 if it takes
            none.
        seam: whether each position takes the level's seam row, bool, [N], [B, 1, N] or [B, Hkv, N];
            None without a chunk before this one.
    """

    place: torch.Tensor
    seam: torch.Tensor | None

    @property
    def taken(self) -> torch.Tensor:
        """Whether each position takes an output of the level, bool [B, Hkv, N]."""
        here = self.place >= 0
        return here if self.seam is None else here | self.seam


def reaching(
    slot: torch.Tensor,
    positions: torch.Tensor,
    geometry: PyramidGeometry,
    with_seam: bool,
    documents: torch.Tensor | None = None,
    continues: torch.Tensor | None = None,
) -> list[Reach]:
    """Outputs that ``positions`` take of each level, from the base up.

    With ``combine = "finest"`` a position takes the finest output that reaches it, and no other.

    Args:
        slot: the selection's slot, int32 [B, Hkv, P].
        positions: int64, ascending.
        geometry: the geometry of the whole chunk.
        with_seam: whether there is a chunk before this one.
        documents: [B, N], for each of N ``positions`` the first position of its document, a
            multiple of p^(L-1). No output reaches it from before.
        continues: whether the first document of the chunk began in an earlier chunk, bool [B]. It
            alone takes seam rows. Given if there are documents ``with_seam``.
    """
    assert documents is None or continues is not None or not with_seam
    finest = geometry.config.combine == "finest"
    found: list[Reach] = []
    covered: torch.Tensor | None = None
    for level, (span, offset) in enumerate(zip(geometry.spans, geometry.offsets, strict=True)):
        inside = positions >= span - 1
        seam = ~inside if with_seam and level > 0 else None
        if seam is not None and continues is not None:
            # These positions are of the first document, because documents are not shorter.
            seam = seam & continues[:, None, None]
        if documents is not None:
            # Entries lie in a document as they lie in a sequence, because it begins with one.
            inside = (positions - documents >= span - 1).unsqueeze(1)
        entry = ((positions - span + 1) // span).clamp(min=0)
        place = slot[..., offset + entry].masked_fill(~inside, -1)
        if finest and covered is not None:
            place = place.masked_fill(covered, -1)
            seam = None if seam is None else seam & ~covered
        found.append(Reach(place, seam))
        if finest:
            here = found[-1].taken
            covered = here if covered is None else covered | here
    return found


def seam_rows(rows: torch.Tensor, slot: torch.Tensor, geometry: PyramidGeometry) -> torch.Tensor:
    """Outputs of the entries that end with a chunk, at levels 1 to L - 1.

    An entry that is not included has a row of zeros. With ``combine = "finest"`` it has the row of
    the next coarser level instead, which takes its place there.

    An included entry's parent is included too, and both end with the chunk. Their outputs are
    therefore the last rows of the gathered sequence, in the order of their levels.

    Args:
        rows: attention outputs, [B, H, S, D].
        slot: the selection's slot, int32 [B, Hkv, P].

    Returns:
        [B, H, L - 1, D].
    """
    finest = geometry.config.combine == "finest"
    count = geometry.config.levels - 1
    last = list(rows[:, :, -count:].unbind(dim=2))
    included = ends_with_chunk(slot, geometry, rows.shape[1])
    # The loop leaves out the coarsest entry, which is always included.
    for number in range(count - 2, -1, -1):
        instead = last[number + 1] if finest else torch.zeros_like(last[number])
        last[number] = torch.where(included[:, :, number, None], last[number], instead)
    return torch.stack(last, dim=2)


def seam_rows_gradient(grad: torch.Tensor, included: torch.Tensor, finest: bool) -> torch.Tensor:
    """Gradient of the last L - 1 rows of the gathered sequence through ``seam_rows``.

    Args:
        grad: gradient of the seam rows, [B, H, L - 1, D].
        included: from ``ends_with_chunk``.
        finest: whether ``combine`` is "finest".

    Returns:
        [B, H, L - 1, D], zero for entries that are not included.
    """
    by_level = list(grad.unbind(dim=2))
    # The loop leaves out the coarsest entry, which is always included.
    for number in range(len(by_level) - 1):
        here = included[:, :, number, None]
        if finest:
            passed_on = by_level[number].masked_fill(here, 0.0)
            by_level[number + 1] = by_level[number + 1] + passed_on
        by_level[number] = by_level[number].masked_fill(~here, 0.0)
    return torch.stack(by_level, dim=2)


def ends_with_chunk(slot: torch.Tensor, geometry: PyramidGeometry, heads: int) -> torch.Tensor:
    """Whether the entry that ends with a chunk is included, at each level from 1 to L - 1.

    Returns:
        bool [B, H, L - 1] for H ``heads``.
    """
    ends = [
        slot[..., offset + length - 1] >= 0
        for offset, length in zip(geometry.offsets[1:], geometry.lengths[1:], strict=True)
    ]
    return torch.stack(ends, dim=-1).repeat_interleave(heads // slot.shape[1], dim=1)


def reaching_first(
    slot: torch.Tensor,
    geometry: PyramidGeometry,
    documents: torch.Tensor | None,
    continues: torch.Tensor | None,
) -> list[Reach]:
    """``reaching`` of the first p^(L-1) - 1 positions of a chunk, which alone may take seam rows.

    Args:
        documents: of the whole chunk, [B, N].
    """
    positions = torch.arange(geometry.spans[-1] - 1, device=slot.device)
    documents = None if documents is None else documents[:, : len(positions)]
    return reaching(slot, positions, geometry, True, documents, continues)


def seam_gradient(
    grad: torch.Tensor,
    slot: torch.Tensor,
    geometry: PyramidGeometry,
    documents: torch.Tensor | None = None,
    continues: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of a chunk's seam rows: for each row, the sum over the positions that took it.

    Args:
        grad: gradient of the scattered outputs, [B, H, N, D].
        slot: slot of the chunk's selection, int32 [B, Hkv, P].
        documents: layout of the chunk, [B, N].
        continues: as in ``reaching``.

    Returns:
        [B, H, L - 1, D].
    """
    first = grad[:, :, : geometry.spans[-1] - 1].to(accumulation_dtype(grad.dtype))
    sums = []
    for _, seam in reaching_first(slot, geometry, documents, continues)[1:]:
        assert seam is not None
        if seam.ndim > 1:
            seam = seam.repeat_interleave(grad.shape[1] // seam.shape[1], dim=1)
        sums.append((first * seam.unsqueeze(-1)).sum(dim=2))
    return torch.stack(sums, dim=2).to(grad.dtype)
