"""Which stage a step belongs to, and under which attention it trains."""


def stage_at(step: int, stage: str, dense_from_step: int) -> str:
    """The stage, "lighthouse" or "dense", that trains step number ``step`` (the first is 1)."""
    if stage != "auto":
        return stage
    return "lighthouse" if step <= dense_from_step else "dense"


def attention_at(step: int, stage: str, dense_every: int) -> str:
    """The attention, "lighthouse" or "dense", that step number ``step`` of a stage trains under."""
    return "dense" if dense_every and step % dense_every == 0 else stage
