"""Whose outputs reach which positions, within a chunk and from the one before it.

The output of entry (l, i) reaches the p^l positions that start at its end. At each level one entry
can reach position t: number (t - p^l + 1) // p^l, or, where t < p^l - 1, the last of the chunk
before this one, whose output is a seam row.

Shapes: B batch, H query heads, Hkv key-value heads, N positions (of a chunk), D head dimension,
S gathered length, P pyramid length, L levels.
"""

from typing import NamedTuple

import torch

from .geometry import PyramidGeometry


class Reach(NamedTuple):
    """What positions take of one level.

    Attributes:
        place: of the entry whose output the position takes, int [B, Hkv, N]; -1 for none.
        seam: whether it takes the level's seam row, bool, [N] or [B, Hkv, N]; None if there is
            none.
    """

    place: torch.Tensor
    seam: torch.Tensor | None


def reaching(
    slot: torch.Tensor,
    positions: torch.Tensor,
    p: int,
    levels: int,
    length: int,
    finest: bool,
    with_seam: bool,
) -> list[Reach]:
    """What ``positions`` take of each level, from the base up.

    Args:
        slot: of the selection, int32 [B, Hkv, P].
        positions: int64, ascending.
        length: positions N of the whole chunk.
        finest: whether a position takes the output of the finest level that reaches it, and not
            those of all levels.
        with_seam: whether there is a chunk before this one.
    """
    found, offset, covered = [], 0, None
    for level in range(levels):
        span = p**level
        inside = positions >= span - 1
        entry = ((positions - span + 1) // span).clamp(min=0)
        place = slot[..., offset + entry].masked_fill(~inside, -1)
        seam = ~inside if with_seam and level > 0 else None
        if finest:
            if covered is not None:
                place = place.masked_fill(covered, -1)
                seam = None if seam is None else seam & ~covered
            here = place >= 0 if seam is None else (place >= 0) | seam
            covered = here if covered is None else covered | here
        found.append(Reach(place, seam))
        offset += length // span
    return found


def seam_rows(rows: torch.Tensor, slot: torch.Tensor, geometry: PyramidGeometry) -> torch.Tensor:
    """Outputs of the entries that end with a chunk, at levels 1 to L - 1.

    For an entry that is not included: zero, or, where the finest level counts, the row of the next
    coarser one, which then stands in its place.

    With such an entry its parent is included, which ends there too. They are therefore the last
    places of the gathered sequence, in the order of their levels.

    Args:
        rows: attention outputs, [B, H, S, D].
        slot: of the selection, int32 [B, Hkv, P].

    Returns:
        [B, H, L - 1, D].
    """
    finest = geometry.config.combine == "finest"
    count = geometry.config.levels - 1
    last = list(rows[:, :, -count:].unbind(dim=2))
    # The coarsest is always included.
    for number in range(count - 2, -1, -1):
        level = number + 1
        end = geometry.offsets[level] + geometry.lengths[level] - 1
        absent = slot[..., end : end + 1] < 0
        absent = absent.repeat_interleave(rows.shape[1] // slot.shape[1], dim=1)
        instead = last[number + 1] if finest else torch.zeros_like(last[number])
        last[number] = torch.where(absent, instead, last[number])
    return torch.stack(last, dim=2)


def seam_gradient(
    grad: torch.Tensor, slot: torch.Tensor, p: int, levels: int, finest: bool
) -> torch.Tensor:
    """Gradient of the seam rows that reached a chunk: sums over the positions that took each.

    Args:
        grad: of the scattered outputs, [B, H, N, D].
        slot: of the chunk's selection, int32 [B, Hkv, P].

    Returns:
        [B, H, L - 1, D].
    """
    length = grad.shape[2]
    positions = torch.arange(p ** (levels - 1) - 1, device=grad.device)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    first = grad[:, :, : len(positions)].to(dtype)
    sums = []
    for _, seam in reaching(slot, positions, p, levels, length, finest, with_seam=True)[1:]:
        if seam.ndim > 1:
            seam = seam.repeat_interleave(grad.shape[1] // slot.shape[1], dim=1)
        sums.append((first * seam.unsqueeze(-1)).sum(dim=2))
    return torch.stack(sums, dim=2).to(grad.dtype)
