"""Mistral without a window: a Llama under another name, with other defaults in config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .model import LighthouseModelArgs


@dataclass
class MistralModelArgs(LighthouseModelArgs):
    """Arguments of a Mistral, which computes what a Llama does."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **LighthouseModelArgs.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        # The library gives a Mistral a window unless its file has null.
        "sliding_window": 4096,
    }
    has_window_switch: ClassVar[bool] = False
