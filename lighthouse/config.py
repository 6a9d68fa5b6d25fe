"""Configuration of Lighthouse attention."""

from dataclasses import dataclass, fields

SCORERS = ("norm", "dilated", "gla")
ENTRY_SCORES = ("max", "first")
COMBINATIONS = ("sum", "finest")


@dataclass(frozen=True)
class LighthouseConfig:
    """What selects the entries that attention runs on (arXiv 2605.06554, section 3).

    Attributes:
        levels: levels L of the pyramid, the base sequence included; at least 2.
        pooling_factor: entries p of one level pooled into one of the next; a power of two.
        top_k: entries k picked at each pooled level; a multiple of ``picks_per_stratum``.
        scorer: "norm", "dilated" or "gla".
        picks_per_stratum: entries m picked in each of the k / m strata of the sequence; even,
            since half of them are the best queries and half the best keys.
        dilation: stride of the "dilated" and "gla" scorers.
        entry_score: how an entry scores by the positions it covers. "max", the paper's: by the
            largest score among them. It tells the first of them something of the later ones, as
            outputs at the first depend on whether the entry was picked. "first": by the score of
            the first, which tells nobody anything new.
        combine: what a position is given that outputs of several levels reach. "sum", the paper's:
            their sum. "finest": that of the finest level among them, as dense attention would give
            it one output.

    Raises:
        TypeError: a value is not of its type.
        ValueError: a value breaks a rule above.
    """

    levels: int = 3
    pooling_factor: int = 4
    top_k: int = 1536
    scorer: str = "norm"
    picks_per_stratum: int = 128
    dilation: int = 4
    entry_score: str = "max"
    combine: str = "sum"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # bool is an int to isinstance, and never what a count means.
            if not isinstance(value, field.type) or isinstance(value, bool):
                raise TypeError(
                    f"{field.name} must be of type {field.type.__name__}, got {value!r} of type "
                    f"{type(value).__name__}"
                )
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
        if self.scorer not in SCORERS:
            raise ValueError(
                f"scorer must be one of {', '.join(SCORERS)}, got scorer = {self.scorer!r}"
            )
        if self.entry_score not in ENTRY_SCORES:
            raise ValueError(
                f"entry_score must be one of {', '.join(ENTRY_SCORES)}, got entry_score = "
                f"{self.entry_score!r}"
            )
        if self.combine not in COMBINATIONS:
            raise ValueError(
                f"combine must be one of {', '.join(COMBINATIONS)}, got combine = {self.combine!r}"
            )
        if self.dilation < 1:
            raise ValueError(f"dilation must be at least 1, got dilation = {self.dilation}")
