"""Qwen 3: a Llama whose queries and keys are normed in every head before their rotation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle, SequenceParallel
from torchtitan.models.llama3.model.args import TransformerModelArgs

from .model import LighthouseModelArgs
from .rotary import RotaryAttention


class NormedRotaryAttention(RotaryAttention):
    """A Llama's attention with RMS norms over the D columns of each head, one weight for all heads.

    Lighthouse attention sees the rows after norm and rotation, as dense attention does.
    """

    norms_heads: ClassVar[bool] = True

    def __init__(self, model_args: TransformerModelArgs) -> None:
        super().__init__(model_args)
        assert isinstance(model_args, LighthouseModelArgs)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(model_args.head_dim, eps=model_args.norm_eps) for _ in range(2)
        )

    def init_weights(self, init_std: float) -> None:
        super().init_weights(init_std)
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()

    def rotated(
        self, q: torch.Tensor, k: torch.Tensor, turns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().rotated(self.q_norm(q), self.k_norm(k), turns)

    @staticmethod
    def tensor_parallel_plan() -> dict[str, ParallelStyle]:
        # Each rank norms its own heads, and the gradients of the weight that they share are added
        # up. Rows are [B, N, H, D]. The style is named after the dimension it is made for.
        return {
            name: SequenceParallel(sequence_dim=2, use_local_output=True)
            for name in ("q_norm", "k_norm")
        }


@dataclass
class Qwen3ModelArgs(LighthouseModelArgs):
    """Arguments of a dense Qwen 3."""

    model_type: ClassVar[str] = "qwen3"
    causal_model: ClassVar[str] = "Qwen3ForCausalLM"
    attention_class: ClassVar[type[RotaryAttention]] = NormedRotaryAttention
    defaults: ClassVar[Mapping[str, Any]] = {
        **LighthouseModelArgs.defaults,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
    }
    own_weights: ClassVar[Mapping[str, str]] = {
        "self_attn.q_norm.weight": "attention.q_norm.weight",
        "self_attn.k_norm.weight": "attention.k_norm.weight",
    }
    column_weights: ClassVar[tuple[str, ...]] = tuple(own_weights.values())
