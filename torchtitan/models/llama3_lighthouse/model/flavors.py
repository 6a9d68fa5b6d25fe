"""The sizes that ``model.flavor`` names."""

from typing import Any

from ..data.tokenizer import PADDED_VOCABULARY_SIZE
from .model import LighthouseModelArgs

# The vocabulary of upstream's Llama 3. The paper keeps it, although its tokens are bytes.
LLAMA3_VOCABULARY_SIZE = 128256

# The paper's decoder. Upstream's FFN width is ffn_dim_multiplier times 2/3 of 4 dim, rounded up to
# multiple_of: 0.5625 gives the paper's 1536.
PAPER: dict[str, Any] = dict(
    dim=1024,
    n_layers=30,
    n_heads=8,
    ffn_dim_multiplier=0.5625,
    multiple_of=256,
    rope_theta=500000,
)

# The small decoder that the studies in docs/studies train.
STUDIED: dict[str, Any] = dict(
    dim=384,
    n_layers=8,
    n_heads=6,
    multiple_of=256,
    vocab_size=PADDED_VOCABULARY_SIZE,
    rope_theta=500000,
)
WIDER: dict[str, Any] = STUDIED | {"dim": 640, "n_heads": 10}

flavors: dict[str, LighthouseModelArgs] = {
    "debugmodel": LighthouseModelArgs(
        dim=256,
        n_layers=6,
        n_heads=4,
        n_kv_heads=2,
        multiple_of=64,
        vocab_size=PADDED_VOCABULARY_SIZE,
        rope_theta=500000,
    ),
    "15M": LighthouseModelArgs(**STUDIED),
    "17M": LighthouseModelArgs(**STUDIED, ffn_dim_multiplier=1.25),
    "50M": LighthouseModelArgs(**WIDER, ffn_dim_multiplier=1.25),
    "270M": LighthouseModelArgs(**PAPER, vocab_size=PADDED_VOCABULARY_SIZE),
    "530M": LighthouseModelArgs(**PAPER, vocab_size=LLAMA3_VOCABULARY_SIZE),
    "8B": LighthouseModelArgs(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.3,
        multiple_of=1024,
        vocab_size=LLAMA3_VOCABULARY_SIZE,
        rope_theta=500000,
    ),
}
