"""Conversion between our checkpoints and Hugging Face's.

The model is a Llama, so the conversion is upstream's.
"""

from pathlib import Path

from torchtitan.models.llama3 import Llama3StateDictAdapter, TransformerModelArgs


class LighthouseStateDictAdapter(Llama3StateDictAdapter):
    """Upstream's adapter, without its warning when the assets folder holds only a tokenizer."""

    def __init__(self, model_args: TransformerModelArgs, hf_assets_path: str | None) -> None:
        index = Path(hf_assets_path or "", "model.safetensors.index.json")
        super().__init__(model_args, hf_assets_path if index.is_file() else None)
        self.hf_assets_path = hf_assets_path
