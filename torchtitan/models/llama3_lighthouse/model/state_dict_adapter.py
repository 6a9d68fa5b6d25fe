"""Conversion between our checkpoints and Hugging Face's.

The model is a Llama, so the conversion is upstream's, with heads of any width.
"""

from pathlib import Path

import torch
from torchtitan.models.llama3 import Llama3StateDictAdapter, TransformerModelArgs


class LighthouseStateDictAdapter(Llama3StateDictAdapter):
    """Upstream's adapter, without its warning when the assets folder holds only a tokenizer."""

    def __init__(self, model_args: TransformerModelArgs, hf_assets_path: str | None) -> None:
        index = Path(hf_assets_path or "", "model.safetensors.index.json")
        super().__init__(model_args, hf_assets_path if index.is_file() else None)
        self.hf_assets_path = hf_assets_path

    # Upstream computes the sizes from dim / n_heads; a weight's own shape says them for any heads.
    def _permute(
        self, w: torch.Tensor, n_heads_arg: int, dim1: int | None = None, dim2: int | None = None
    ) -> torch.Tensor:
        return super()._permute(w, n_heads_arg)

    def _reverse_permute(
        self, w: torch.Tensor, n_heads_arg: int, dim1: int | None = None, dim2: int | None = None
    ) -> torch.Tensor:
        return super()._reverse_permute(w, n_heads_arg)
