"""The stage of a training step, and the attention that the step uses."""

ATTENTIONS = ("lighthouse", "dense")


def stage_at(step: int, stage: str, dense_from_step: int) -> str:
    """The stage, "lighthouse" or "dense", of step number ``step``; the first step is 1.

    Args:
        stage: "auto", or the stage of every step.
        dense_from_step: last step of the Lighthouse stage if ``stage`` is "auto".
    """
    if stage != "auto":
        return stage
    return "lighthouse" if step <= dense_from_step else "dense"


def attention_at(step: int, stage: str, dense_every: int) -> str:
    """The attention, "lighthouse" or "dense", that step number ``step`` of a stage uses.

    Args:
        dense_every: each step that is a multiple of this number is dense; 0 means none.
    """
    return "dense" if dense_every and step % dense_every == 0 else stage
