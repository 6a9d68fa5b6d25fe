"""The families of models that can be trained, each by its ``model_type`` in config.json.

A family is its class of arguments. Nothing else asks for one by name.
"""

from .mistral import MistralModelArgs
from .model import LighthouseModelArgs
from .qwen3 import Qwen3ModelArgs

FAMILIES: dict[str, type[LighthouseModelArgs]] = {
    "llama": LighthouseModelArgs,
    "mistral": MistralModelArgs,
    "qwen3": Qwen3ModelArgs,
}
