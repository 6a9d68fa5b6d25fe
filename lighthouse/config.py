"""Settings of Lighthouse attention, and the rules that each of them keeps."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

Scorer = Literal["norm", "dilated", "gla", "random"]
EntryScore = Literal["max", "first"]
Combine = Literal["sum", "finest"]

SCORERS: tuple[str, ...] = get_args(Scorer)
ENTRY_SCORES: tuple[str, ...] = get_args(EntryScore)
COMBINATIONS: tuple[str, ...] = get_args(Combine)

# A scorer that attends needs the whole sequence, in steps of the dilation, to score one position.
ATTENDS: dict[str, bool] = {"norm": False, "dilated": True, "gla": True, "random": False}

# Kernels and torch's own tables number positions with 32 bits.
LARGEST_SPAN = 2**30
MOST_POSITIONS = 2**31 - 1


@dataclass(frozen=True)
class LighthouseConfig:
    """The settings that decide which entries attention runs on (arXiv 2605.06554, section 3).

    Attributes:
        levels: Levels L of the pooling pyramid, the base sequence included; at least 2.
        pooling_factor: Entries p of one level that the next coarser level pools into one; a power
            of two.
        top_k: Entries k picked at each pooled level; a multiple of picks_per_stratum.
        scorer: How positions are scored: by the norms of q and k ("norm"), or by the norms of what
            softmax attention ("dilated") or gated linear attention ("gla") returns for them.
            "random" is a control: hashes of q and k, which know nothing of the content.
        picks_per_stratum: Entries m picked from each of the k / m strata of the sequence. The
            number is even: half of the picks are the best queries and half the best keys.
        dilation: Stride of the positions that the scorers "dilated" and "gla" attend over.
        entry_score: How an entry is scored by the positions it covers. "max", as in the paper,
            takes their largest score; outputs at the first of them then depend on the later ones.
            "first" takes the score of the first position, which reveals nothing later.
        combine: How the outputs of several levels that reach one position are combined. "sum", as
            in the paper, adds them. "finest" takes the finest level's output alone, so that each
            position has one output as in dense attention.
        window: Positions W of a causal window, the position itself included, that each position
            attends over too, with its own query. 0, as in the paper, for none. It needs "finest".

    Raises:
        TypeError: a value is not of its type.
        ValueError: a value breaks a rule above.
    """

    levels: int = 3
    pooling_factor: int = 4
    top_k: int = 1536
    scorer: Scorer = "norm"
    picks_per_stratum: int = 128
    dilation: int = 4
    entry_score: EntryScore = "first"
    combine: Combine = "finest"
    window: int = 0

    def __post_init__(self) -> None:
        for name, kind in TYPES.items():
            _check_type(name, getattr(self, name), kind)
        if self.levels < 2:
            raise ValueError(
                f"levels must be at least 2, got levels = {self.levels}; "
                "one level alone is dense attention"
            )
        p = self.pooling_factor
        if p < 2 or p & (p - 1):
            raise ValueError(
                f"pooling_factor must be a power of two, at least 2, got pooling_factor = {p}; "
                "use 2, 4 or 8"
            )
        # Powers of two are compared by their exponents, because the number itself may fill memory.
        if (self.levels - 1) * (p.bit_length() - 1) > LARGEST_SPAN.bit_length() - 1:
            raise ValueError(
                f"levels = {self.levels} with pooling_factor = {p} would pool more than "
                f"{LARGEST_SPAN:,} positions into one entry; lower one of them"
            )
        if self.picks_per_stratum < 2 or self.picks_per_stratum % 2:
            raise ValueError(
                "picks_per_stratum must be even and at least 2, got picks_per_stratum = "
                f"{self.picks_per_stratum}; half of the picks are by query and half by key"
            )
        if self.top_k < 1 or self.top_k % self.picks_per_stratum:
            raise ValueError(
                f"top_k must be a positive multiple of picks_per_stratum = "
                f"{self.picks_per_stratum}, got top_k = {self.top_k}; round it to "
                f"{max(1, round(self.top_k / self.picks_per_stratum)) * self.picks_per_stratum}"
            )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {name} = {value!r}"
                )
        if self.window < 0:
            raise ValueError(
                f"window must be at least 0, got window = {self.window}; use 0 for no window"
            )
        check_largest_window(self.window)
        if self.window and self.combine != "finest":
            raise ValueError(
                f"window = {self.window} needs combine = 'finest', which leaves each position one "
                f"output to merge with, got combine = {self.combine!r}"
            )
        if self.dilation < 1:
            raise ValueError(f"dilation must be at least 1, got dilation = {self.dilation}")

    @property
    def coarsest_span(self) -> int:
        """Positions p^(L-1) that an entry of the coarsest level covers."""
        return self.pooling_factor ** (self.levels - 1)

    @property
    def strata(self) -> int:
        """Number T = k / m of strata that the sequence is divided into."""
        return self.top_k // self.picks_per_stratum

    @property
    def scorer_attends(self) -> bool:
        """Whether the scorer runs an attention over the whole sequence."""
        return ATTENDS[self.scorer]


# Both are read from the annotations once, because torch.compile cannot trace typing's functions.
# A setting with choices is of type str.
CHOICES: dict[str, tuple[str, ...]] = {
    setting.name: get_args(setting.type)
    for setting in fields(LighthouseConfig)
    if get_origin(setting.type) is Literal
}
TYPES: dict[str, Any] = {
    setting.name: str if setting.name in CHOICES else setting.type
    for setting in fields(LighthouseConfig)
}


def check_largest_window(window: int) -> None:
    """Check that ``window`` is no more than the longest sequence has positions.

    Raises:
        ValueError: it is more.
    """
    if window > MOST_POSITIONS:
        raise ValueError(
            f"window must be at most {MOST_POSITIONS:,}, got window = {window}; one of the "
            "sequence's length is dense causal attention already"
        )


def _check_type(name: str, value: object, kind: type) -> None:
    # isinstance takes a bool for an int, but a count is never a bool.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(
            f"{name} must be of type {kind.__name__}, got {value!r} of type {type(value).__name__}"
        )
