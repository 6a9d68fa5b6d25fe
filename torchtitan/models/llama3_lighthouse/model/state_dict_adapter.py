"""Conversion between our checkpoints and Hugging Face's.

The model is a Llama or near to one, so the conversion is upstream's, with heads of any width and
the weights that its family has beside a Llama's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.llama3 import Llama3StateDictAdapter

from .model import LighthouseModelArgs


class LighthouseStateDictAdapter(Llama3StateDictAdapter):
    """Upstream's adapter, without its warning when the assets folder holds only a tokenizer."""

    def __init__(self, model_args: LighthouseModelArgs, hf_assets_path: str | None) -> None:
        index = Path(hf_assets_path or "", "model.safetensors.index.json")
        super().__init__(model_args, hf_assets_path if index.is_file() else None)
        self.hf_assets_path = hf_assets_path
        self.from_hf_map |= {
            f"model.layers.{{}}.{theirs}": f"layers.{{}}.{ours}"
            for theirs, ours in model_args.own_weights.items()
        }
        self.column_weights = tuple(f".{name}" for name in model_args.column_weights)
        self.head_dim = model_args.head_dim

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return super().to_hf(self._reordered(state_dict, self._permute))

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return self._reordered(super().from_hf(hf_state_dict), self._reverse_permute)

    def _reordered(
        self, state: dict[str, Any], permute: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> dict[str, Any]:
        """The state under our names, weights of columns in the order of their heads' columns."""

        def reordered(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, DTensor):
                # A rank's part of the new order is no stretch of it, as files need, so the whole
                # is put in order and divided again. These weights are small.
                mesh, placements = tensor.device_mesh, tensor.placements
                whole = reordered(tensor.full_tensor())
                replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim)
                return replicated.redistribute(placements=placements)
            return permute(tensor[:, None], tensor.shape[0] // self.head_dim)[:, 0]

        return {
            name: reordered(tensor) if name.endswith(self.column_weights) else tensor
            for name, tensor in state.items()
        }

    # Upstream computes the sizes from dim / n_heads; a weight's own shape says them for any heads.
    def _permute(
        self, w: torch.Tensor, n_heads_arg: int, dim1: int | None = None, dim2: int | None = None
    ) -> torch.Tensor:
        return super()._permute(w, n_heads_arg)

    def _reverse_permute(
        self, w: torch.Tensor, n_heads_arg: int, dim1: int | None = None, dim2: int | None = None
    ) -> torch.Tensor:
        return super()._reverse_permute(w, n_heads_arg)
