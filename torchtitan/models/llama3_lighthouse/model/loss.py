"""The loss, and what the model hands over to it: logits, or the two factors of them."""

import torch
from torch import nn
from torchtitan.components.loss import LossFunction, build_cross_entropy_loss

from ..job_config import JobConfig
from .linear_cross_entropy import linear_cross_entropy

# A token's whole logits, once in bfloat16 and twice in float32, then take 160 KiB and more.
CHUNKED_FROM_VOCABULARY = 16384


# Hidden states [B, N, dim] and weight [V, dim], whose product the logits are. A plain tuple: FSDP
# looks for tensors in it, and pipeline stages know no other kind.
FactoredLogits = tuple[torch.Tensor, torch.Tensor]


class _Alias(torch.autograd.Function):
    """A parameter's memory and gradient under another tensor, which is no view to autograd."""

    @staticmethod
    def forward(ctx, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class FactoredOutput(nn.Linear):
    """An output projection that leaves the product to the loss."""

    def forward(self, hidden: torch.Tensor) -> FactoredLogits:
        # FSDP puts a hook on every output: on the parameter itself they would pile up.
        return hidden, _Alias.apply(self.weight)


def factored(output: nn.Linear) -> FactoredOutput:
    """``output`` without bias as a ``FactoredOutput`` with the same parameter."""
    with torch.device("meta"):
        replacement = FactoredOutput(output.in_features, output.out_features, bias=False)
    replacement.weight = output.weight
    return replacement


def is_chunked(config: JobConfig, vocabulary: int) -> bool:
    """Whether the loss is computed in chunks of tokens, as ``lighthouse.loss`` says.

    "auto" does so for large vocabularies, where tensor parallelism does not share out the logits.
    """
    if config.lighthouse.loss == "auto":
        shared = config.parallelism.tensor_parallel_degree > 1
        return vocabulary >= CHUNKED_FROM_VOCABULARY and not shared
    return config.lighthouse.loss == "chunked"


def build_loss(job_config: JobConfig, **options) -> LossFunction:
    """Cross-entropy, summed over tokens, of logits or of ``FactoredLogits`` and labels."""
    of_logits = build_cross_entropy_loss(job_config, **options)

    def loss(prediction: torch.Tensor | FactoredLogits, labels: torch.Tensor) -> torch.Tensor:
        if isinstance(prediction, tuple):
            return linear_cross_entropy(*prediction, labels)
        return of_logits(prediction, labels)

    return loss
