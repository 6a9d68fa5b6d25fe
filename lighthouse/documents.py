"""Documents that do not see each other: where they begin, and how they share picks and places.

A layout of documents is an integer tensor [B, N], named ``documents`` everywhere: for each
position, the first position of its document. Its shape does not depend on the documents, and only
``check_layout`` makes the host wait.

Everything in this file depends on the layout alone, never on q, k or v. Documents therefore learn
nothing of one another from their shares.

Shapes: B batch, N positions, S gathered length, n coarsest entries, m picks of a stratum at one
level.
"""

from typing import NamedTuple

import torch

from .geometry import PyramidGeometry

INTEGERS = (torch.int32, torch.int64)


class Shares(NamedTuple):
    """The part of a stratum that belongs to one document, for each coarsest entry, int64 [B, n].

    The picks that a stratum makes at one level are numbered from 0 to m - 1. The part has the
    numbers from ``before`` to ``after`` - 1, at each level.

    Attributes:
        first, last: the part's first coarsest entry and the first one after it, counted from the
            stratum's first.
        before, after: the numbers of its first pick, and of the first pick after it.
        stratum: the stratum's number.
    """

    first: torch.Tensor
    last: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    stratum: torch.Tensor

    @property
    def by_query(self) -> torch.Tensor:
        """Picks by query: those of an even number. The others are by key."""
        return (self.after + 1) // 2 - (self.before + 1) // 2


def first_positions(numbers: torch.Tensor) -> torch.Tensor:
    """The layout of documents by numbers that differ between neighbouring documents.

    Args:
        numbers: integers [B, N].

    Returns:
        int32 [B, N], for each position the first position of its document.

    Raises:
        ValueError: ``numbers`` is no tensor of two dimensions.
    """
    _check_rows("numbers", numbers)
    begins = torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    position = torch.arange(numbers.shape[1], dtype=torch.int32, device=numbers.device)
    return torch.where(begins, position, 0).cummax(dim=1).values


def within(documents: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What an attention is given besides: the layout, and nothing without documents.

    Some attentions know no documents, and so no such argument.
    """
    return () if documents is None else (documents,)


def check_documents(
    documents: torch.Tensor, q: torch.Tensor, span: int = 1, ranks: int = 1
) -> None:
    """Check that ``documents`` is a layout for tensors like ``q``.

    The numbers are read on CPUs alone, and not in compiled code. On other devices this would make
    the host wait. There a wrong layout lets documents see each other.

    Args:
        documents: int32 or int64 [B, N], or [B, N times ``ranks``] for the whole sequence.
        q: [B, H, N, D].
        span: positions that each document's first position must be a multiple of.
        ranks: ranks that share the sequence under context parallelism.

    Raises:
        TypeError, ValueError: its dtype, shape or device is another, or it is no such layout.
    """
    _check_dtype(documents)
    shape = (q.shape[0], q.shape[2] * ranks)
    if ranks > 1 and tuple(documents.shape) != shape:
        raise ValueError(
            f"under context parallelism documents must be the layout of the whole sequence, of "
            f"shape {shape} for {ranks} ranks that hold {q.shape[2]} positions each, got "
            f"{tuple(documents.shape)}"
        )
    if tuple(documents.shape) != shape or documents.device != q.device:
        raise ValueError(
            f"documents must give each position's first position, of shape {shape} on {q.device}, "
            f"got {tuple(documents.shape)} on {documents.device}"
        )
    if _is_readable(documents):
        check_layout(documents, span)


def check_selected(index: torch.Tensor, documents: torch.Tensor, geometry: PyramidGeometry) -> None:
    """Check that a selection made elsewhere is one for these documents.

    As in ``check_documents``, the numbers are read on CPUs alone, and not in compiled code. In
    another selection an entry would lie among those of a document that is not its own.

    Args:
        index: the selection's index, int32 [B, Hkv, S].
        documents: a layout [B, N].

    Raises:
        ValueError: the selection is one for other documents, or for none.
    """
    if not _is_readable(documents):
        return
    level = torch.bucketize(index, torch.tensor(geometry.offsets[1:]), right=True)
    first = (index - torch.tensor(geometry.offsets)[level]) * torch.tensor(geometry.spans)[level]
    own = documents.unsqueeze(1).expand(-1, index.shape[1], -1).gather(2, first)
    places = gathered_documents(documents, geometry).unsqueeze(1)
    if (first_positions(own.flatten(0, 1)).view_as(own) != places).any():
        raise ValueError(
            "selection is one for other documents, so that documents would see each other; make it "
            "by select with documents = those of this call"
        )


def check_layout(documents: torch.Tensor, span: int = 1) -> None:
    """Check the numbers of a layout [B, N], which may be on any device. The host waits for them.

    Args:
        span: positions that each document's first position must be a multiple of: 1 for dense
            attention and windows, ``LighthouseConfig.coarsest_span`` for Lighthouse attention.

    Raises:
        TypeError, ValueError: it has another dtype or shape, or a number is not the first position
            of a document.
    """
    _check_dtype(documents)
    _check_rows("documents", documents)
    begins = documents == torch.arange(documents.shape[1], device=documents.device)
    goes_on = torch.zeros_like(begins)
    goes_on[:, 1:] = documents[:, 1:] == documents[:, :-1]
    # By induction from position 0, every position then has the number of a document that begins
    # before it or there.
    wrong = (~(begins | goes_on)).nonzero()
    if len(wrong):
        row, position = wrong[0].tolist()
        raise ValueError(
            "documents must hold, for each position, the first position of its document, got "
            f"{documents[row, position].item()} at position {position} of row {row}; make it by "
            "lighthouse.first_positions"
        )
    misplaced = (documents % span != 0).nonzero()
    if len(misplaced):
        row, position = misplaced[0].tolist()
        raise ValueError(
            f"documents must begin at multiples of pooling_factor^(levels - 1) = {span}, got one "
            f"at {documents[row, position].item()} in row {row}; pad the document before it"
        )


def _check_dtype(documents: torch.Tensor) -> None:
    if not isinstance(documents, torch.Tensor) or documents.dtype not in INTEGERS:
        given = getattr(documents, "dtype", type(documents).__name__)
        raise TypeError(f"documents must be a tensor of int32 or int64, got {given}")


def _check_rows(name: str, numbers: torch.Tensor) -> None:
    if not isinstance(numbers, torch.Tensor) or numbers.ndim != 2:
        given = getattr(numbers, "shape", type(numbers).__name__)
        raise ValueError(
            f"{name} must be a tensor [B, N], a row for each sequence of the batch, got "
            f"{tuple(given) if isinstance(given, torch.Size) else given}"
        )


def _is_readable(documents: torch.Tensor) -> bool:
    """Whether nobody has to wait for the numbers."""
    return documents.device.type == "cpu" and not torch.compiler.is_compiling()


def shares(documents: torch.Tensor, geometry: PyramidGeometry) -> Shares:
    """How the documents of a stratum share its m picks: by their lengths, and always all of them.

    A part of a stratum of C coarsest entries, from entry x to entry y - 1 of it, has the picks
    numbered from floor(x m / C) to floor(y m / C) - 1.

    - The parts of a stratum are neighbours, so the numbers of one end where those of the next
      begin; they run from floor(0) = 0 to floor(C m / C) = m. All m picks are shared out, and S is
      what it is without documents.
    - m <= C, because the coarsest level has at least k = m T entries. A part of c entries has
      at most ceil(c m / C) <= c picks, so there are enough candidates at the coarsest level. At
      finer levels the candidates are the p children of each of its picks.
    - Only x, y, m and C enter: the layout and the settings.
    - One document has x = 0 and y = C: all picks, half of them by query.

    Args:
        documents: [B, N], each document beginning at a multiple of p^(L-1).
    """
    n, strata, m = geometry.lengths[-1], geometry.strata, geometry.config.picks_per_stratum
    entry = torch.arange(n, device=documents.device)
    # Computed on the device: a copy of geometry.stratum_bounds would synchronise with the host.
    bounds = torch.arange(strata + 1, device=documents.device) * n // strata
    stratum = torch.searchsorted(bounds, entry, right=True) - 1
    low, high = bounds[stratum], bounds[stratum + 1]
    begin = _first_entries(documents, geometry)
    # Numbers of documents ascend, so a document ends where greater numbers begin.
    end = torch.searchsorted(begin, begin, right=True)
    first, last = torch.maximum(begin, low) - low, torch.minimum(end, high) - low
    length = high - low
    picks = first * m // length, last * m // length
    return Shares(first, last, *picks, stratum.expand_as(begin))


def gathered_documents(documents: torch.Tensor, geometry: PyramidGeometry) -> torch.Tensor:
    """The layout of documents of the gathered sequence, the same in every head.

    Before the first entry of a document lie the coarsest entries of the documents before it, and
    the p children of each of their picks at L - 1 levels. Shares say how many picks they are.

    Args:
        documents: [B, N].

    Returns:
        int64 [B, S], for each place the first place of its document.
    """
    config, share = geometry.config, shares(documents, geometry)
    begin = _first_entries(documents, geometry)
    picks_before = (share.stratum * config.picks_per_stratum + share.before).gather(1, begin)
    first = begin + (config.levels - 1) * config.pooling_factor * picks_before
    place = torch.arange(geometry.gathered_length, device=documents.device)
    place = place.expand(len(first), -1).contiguous()
    return first.gather(1, torch.searchsorted(first, place, right=True) - 1)


def _first_entries(documents: torch.Tensor, geometry: PyramidGeometry) -> torch.Tensor:
    """For each coarsest entry, the first coarsest entry of its document, int64 [B, n]."""
    span = geometry.spans[-1]
    return (documents[:, ::span].long() // span).contiguous()
