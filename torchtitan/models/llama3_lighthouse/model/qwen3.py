"""Qwen 3: a Llama whose queries and keys are normed in every head before their rotation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
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
        assert isinstance(model_args, Qwen3ModelArgs)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(model_args.head_dim, eps=model_args.norm_eps) for _ in range(2)
        )

    def init_weights(self, init_std: float) -> None:
        super().init_weights(init_std)
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()

    def before_rotation(
        self, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q_norm(q), self.k_norm(k)


@dataclass
class Qwen3ModelArgs(LighthouseModelArgs):
    model_type: ClassVar[str] = "qwen3"
    causal_model: ClassVar[str] = "Qwen3ForCausalLM"
    attention_class: ClassVar[type[RotaryAttention]] = NormedRotaryAttention
