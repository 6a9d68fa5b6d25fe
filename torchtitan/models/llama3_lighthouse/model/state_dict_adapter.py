"""Conversion between our checkpoints and Hugging Face's.

The model is a Llama or near to one, so the conversion is upstream's, with heads of any width and
norms of heads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchtitan.models.llama3 import Llama3StateDictAdapter

from .model import LighthouseModelArgs

# Hugging Face's names of Qwen 3's norms of heads -> ours.
NORMS_OF_HEADS: dict[str, str | None] = {
    f"model.layers.{{}}.self_attn.{name}.weight": f"layers.{{}}.attention.{name}.weight"
    for name in ("q_norm", "k_norm")
}
ENDS_OF_NORMS = ("attention.q_norm.weight", "attention.k_norm.weight")


class LighthouseStateDictAdapter(Llama3StateDictAdapter):
    """Upstream's adapter, without its warning when the assets folder holds only a tokenizer."""

    def __init__(self, model_args: LighthouseModelArgs, hf_assets_path: str | None) -> None:
        index = Path(hf_assets_path or "", "model.safetensors.index.json")
        super().__init__(model_args, hf_assets_path if index.is_file() else None)
        self.hf_assets_path = hf_assets_path
        if model_args.attention_class.norms_heads:
            self.from_hf_map |= NORMS_OF_HEADS

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return super().to_hf(_norms_permuted(state_dict, self._permute))

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return _norms_permuted(super().from_hf(hf_state_dict), self._reverse_permute)

    # Upstream computes the sizes from dim / n_heads; a weight's own shape says them for any heads.
    def _permute(
        self, w: torch.Tensor, n_heads_arg: int, dim1: int | None = None, dim2: int | None = None
    ) -> torch.Tensor:
        return super()._permute(w, n_heads_arg)

    def _reverse_permute(
        self, w: torch.Tensor, n_heads_arg: int, dim1: int | None = None, dim2: int | None = None
    ) -> torch.Tensor:
        return super()._reverse_permute(w, n_heads_arg)


def _norms_permuted(
    state: dict[str, Any], permute: Callable[[torch.Tensor, int], torch.Tensor]
) -> dict[str, Any]:
    """The state under our names, with the norms of heads in the order of their heads' columns."""
    return {
        name: permute(tensor[:, None], 1)[:, 0] if name.endswith(ENDS_OF_NORMS) else tensor
        for name, tensor in state.items()
    }
