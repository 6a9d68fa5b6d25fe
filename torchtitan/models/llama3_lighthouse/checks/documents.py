"""Checks of ``training.document_mask`` with other keys."""

from ..errors import UserValueError
from ..job_config import Lighthouse
from ..stages import Stage

KEY = "training.document_mask"
OFF = f"or pass --{KEY.replace('.', '.no-')}"


def check_documents(stage: Stage) -> None:
    """Check that the documents of a stage can be kept apart.

    Raises:
        ValueError: another setting does not go with it.
    """
    config = stage.config
    if not config.training.document_mask:
        return
    section = config.lighthouse
    if section.repeat_mix:
        raise UserValueError(
            f"{KEY} = true is not supported with lighthouse.repeat_mix = {section.repeat_mix}, "
            "whose passages return in other documents, which do not see them; set repeat_mix to "
            f"0, {OFF}"
        )
    if stage.attention == "lighthouse" and section.attention == "lighthouse":
        check_window(section)


def check_window(section: Lighthouse) -> None:
    """Check that Lighthouse attention has a window, which documents need.

    Raises:
        ValueError: it has none.
    """
    if not section.window:
        zeros = section.pooling_factor ** (section.levels - 1) - 1
        raise UserValueError(
            f"{KEY} = true needs a window beside Lighthouse attention: with lighthouse.window = 0, "
            f"up to {zeros:,} positions at the beginning of each document would attend over "
            f"nothing; pass --lighthouse.window 512 --lighthouse.combine finest, {OFF}"
        )
