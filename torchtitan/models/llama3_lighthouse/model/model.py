"""The Llama-3 model with Lighthouse as the inner attention of most of its layers."""

from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import nn
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3.model import model as upstream
from torchtitan.models.llama3.model.args import TransformerModelArgs

from lighthouse import LighthouseAttention, LighthouseConfig
from lighthouse.geometry import PyramidGeometry
from lighthouse.scoring import SDPA_BACKENDS

from ..job_config import JobConfig, Lighthouse
from .loss import factored, is_chunked
from .rotary import RotaryAttention, table_of


def lighthouse_config(section: Lighthouse) -> LighthouseConfig:
    """The method's own configuration, from the [lighthouse] section."""
    return LighthouseConfig(
        levels=section.levels,
        pooling_factor=section.pooling_factor,
        top_k=section.top_k,
        scorer=section.scorer,
        picks_per_stratum=section.picks_per_stratum,
        dilation=section.dilation,
        entry_score=section.entry_score,
        combine=section.combine,
    )


@dataclass
class LighthouseModelArgs(TransformerModelArgs):
    lighthouse: LighthouseConfig | None = None
    dense_layers: list[int] = field(default_factory=list)
    chunked_loss: bool = False
    """Whether the model returns factors of its logits, for a loss in chunks of tokens."""

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        super().update_from_config(job_config, **kwargs)
        self.lighthouse = lighthouse_config(job_config.lighthouse)
        self.dense_layers = list(job_config.lighthouse.dense_layers)
        self.chunked_loss = is_chunked(job_config, self.vocab_size)

    def gathered_length(self, seq_len: int) -> int:
        """Length S of the sequence that attention runs on in a Lighthouse layer."""
        return PyramidGeometry(self.lighthouse, seq_len).gathered_length

    def flops_per_token(self, matmul_parameters: int, seq_len: int, attention: str) -> float:
        """FLOPs of forward and backward per token, counting what runs.

        A parameter that multiplies costs 6 per token. Attention over a causal sequence of length
        M has M (M + 1) / 2 pairs, each 2 products of 2 D in each head forward and twice that
        backward; M is S in the Lighthouse layers of the Lighthouse stage and N elsewhere. Scorers
        that attend do so twice, forward only: over N / d causal positions, or with a state of
        D x D that each step adds to and multiplies with. Recomputation, pooling and picking are
        not counted.
        """
        per_pair = 12 * self.dim
        lighthouse_layers = 0
        if attention == "lighthouse":
            lighthouse_layers = self.n_layers - len(self.dense_layers)
        gathered = self.gathered_length(seq_len) if lighthouse_layers else 0
        pairs = (self.n_layers - lighthouse_layers) * seq_len * (seq_len + 1) / 2
        pairs += lighthouse_layers * gathered * (gathered + 1) / 2
        scoring = lighthouse_layers * self._scoring_flops_per_token(seq_len)
        return 6 * matmul_parameters + per_pair * pairs / seq_len + scoring

    def _scoring_flops_per_token(self, seq_len: int) -> float:
        """Of one layer: two passes of an attention with 4 D per pair and head, or per step."""
        steps = {
            "norm": 0.0,
            "dilated": (seq_len / self.lighthouse.dilation + 1) / 2,
            "gla": self.dim / self.n_heads,
        }
        return 2 * 4 * self.dim * steps[self.lighthouse.scorer]

    def get_nparams_and_flops(
        self, model: nn.Module, seq_len: int, attention: str = "dense"
    ) -> tuple[int, float]:
        """Number of parameters, and FLOPs per token of forward and backward in ``attention``."""
        parameters = sum(p.numel() for p in model.parameters())
        embedding = sum(p.numel() for p in model.tok_embeddings.parameters())
        return parameters, self.flops_per_token(parameters - embedding, seq_len, attention)


def leave_out_math_backend(model: nn.Module) -> None:
    """Let dense attention run on backends whose memory is linear in the sequence, and no other.

    Upstream also lists MATH, to which float32 on a GPU falls back without a word, and which fails
    under context parallelism.
    """
    for module in model.modules():
        if isinstance(module, ScaledDotProductAttentionWrapper):
            module.sdpa_backends = SDPA_BACKENDS


def _as_in_autocast(
    module: nn.Module, arguments: tuple[torch.Tensor, ...], embeddings: torch.Tensor
) -> torch.Tensor:
    """Embeddings in the precision of autocast, which leaves them in that of the weights.

    On one GPU, where torchtitan trains under autocast, the residual stream and whatever is kept of
    it would be in float32: twice the bytes of FSDP's, which casts the weights themselves.
    """
    device = embeddings.device.type
    if torch.is_autocast_enabled(device):
        return embeddings.to(torch.get_autocast_dtype(device))
    return embeddings


class LighthouseTransformer(upstream.Transformer):
    """Upstream's Llama 3, its state dict unchanged; ``use_attention`` chooses its attention."""

    def __init__(self, model_args: LighthouseModelArgs) -> None:
        with patch.object(upstream, "Attention", RotaryAttention):
            super().__init__(model_args)
        self.tok_embeddings.register_forward_hook(_as_in_autocast)
        if model_args.chunked_loss:
            self.output = factored(self.output)
        for index, block in self.layers.items():
            if int(index) in model_args.dense_layers:
                continue
            block.attention.inner_attention = LighthouseAttention(
                model_args.lighthouse, block.attention.inner_attention
            )

    def _precompute_freqs_cis(self) -> torch.Tensor:
        return table_of(super()._precompute_freqs_cis())

    def use_attention(self, attention: str) -> None:
        """Use Lighthouse ("lighthouse") or dense attention ("dense") from the next forward on."""
        for module in self.modules():
            if isinstance(module, LighthouseAttention):
                module.enabled = attention == "lighthouse"
