"""Small models of transformers under Lighthouse attention, shared by tests."""

from typing import Any

import torch
import transformers
from transformers import LlamaConfig, PreTrainedModel

from lighthouse import LighthouseConfig

N, VOCABULARY = 128, 320
METHOD = LighthouseConfig(
    pooling_factor=2, top_k=16, picks_per_stratum=8, entry_score="first", combine="finest"
)
WITH_WINDOW = LighthouseConfig(
    pooling_factor=2,
    top_k=16,
    picks_per_stratum=8,
    entry_score="first",
    combine="finest",
    window=16,
)
SIZE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2 * N,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def build(config: Any = None, attention: str = "lighthouse", seed: int = 0) -> PreTrainedModel:
    """A causal language model with random weights, by default a Llama under Lighthouse."""
    config = config or LlamaConfig(**SIZE)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int = 2, length: int = N, seed: int = 1) -> torch.Tensor:
    """Rows in which no token comes twice: the first layer would score both the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randperm(VOCABULARY, generator=generator)[:length] for _ in range(rows)]
    )
