"""The loss, and what the model returns for it: logits, or their two factors."""

from typing import Any

import torch
from torch import nn
from torchtitan.components.loss import LossFunction, build_cross_entropy_loss

from ..job_config import JobConfig
from .linear_cross_entropy import linear_cross_entropy

# From this size on, the whole logits of one token take 160 KiB or more: the loss holds them once in
# bfloat16 and twice in float32.
CHUNKED_FROM_VOCABULARY = 16384

# Hidden states [B, N, dim] and weight [V, dim]; the logits are their product. The container is a
# plain tuple, because FSDP looks for tensors in it and pipeline stages can return no other.
FactoredLogits = tuple[torch.Tensor, torch.Tensor]


class _Alias(torch.autograd.Function):
    """Another tensor with a parameter's memory and gradient, which is no view for autograd."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach()

    @staticmethod
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class FactoredOutput(nn.Linear):
    """An output projection that leaves its matrix product to the loss."""

    def forward(self, hidden: torch.Tensor) -> FactoredLogits:
        # FSDP adds a hook to every output in every forward; on the parameter itself, hooks would
        # pile up.
        return hidden, _Alias.apply(self.weight)


def factored(output: nn.Linear) -> FactoredOutput:
    """A ``FactoredOutput`` with the same parameter as ``output``, which has no bias."""
    with torch.device("meta"):
        replacement = FactoredOutput(output.in_features, output.out_features, bias=False)
    replacement.weight = output.weight
    return replacement


def is_chunked(config: JobConfig, vocabulary: int) -> bool:
    """Whether ``lighthouse.loss`` asks for a loss in chunks of tokens.

    "auto" does for large vocabularies, unless tensor parallelism shards the logits.

    Args:
        vocabulary: V, the model's vocabulary size.
    """
    if config.lighthouse.loss == "auto":
        shared = config.parallelism.tensor_parallel_degree > 1
        return vocabulary >= CHUNKED_FROM_VOCABULARY and not shared
    return config.lighthouse.loss == "chunked"


def build_loss(job_config: JobConfig, **options: Any) -> LossFunction:
    """Build the cross-entropy, summed over tokens, of labels and logits or ``FactoredLogits``."""
    whole_logits_loss = build_cross_entropy_loss(job_config, **options)

    def loss(prediction: torch.Tensor | FactoredLogits, labels: torch.Tensor) -> torch.Tensor:
        if isinstance(prediction, tuple):
            return linear_cross_entropy(*prediction, labels)
        return whole_logits_loss(prediction, labels)

    return loss
