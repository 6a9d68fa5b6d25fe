"""Small models for tests, the smallest in which all parts of the method do something.

Weights are initialised from the same seed every time.
"""

from typing import Any

import torch
from torch import nn

from lighthouse import LighthouseConfig
from lighthouse.inner_attention import InnerAttention
from torchtitan.models.llama3_lighthouse.infra.activation_checkpoint import (
    apply_lighthouse_checkpoint,
)
from torchtitan.models.llama3_lighthouse.job_config import ActivationCheckpoint
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
    leave_out_math_backend,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
N = 256
METHOD = LighthouseConfig(levels=3, pooling_factor=2, top_k=16, picks_per_stratum=8)
SIZE: dict[str, Any] = dict(
    dim=64, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=320, max_seq_len=N
)
FOUR_LAYERS = LighthouseModelArgs(**SIZE, lighthouse=METHOD, dense_layers=[0, 3])
# One dense layer and two Lighthouse layers, for tests that count bytes and products.
THREE_LAYERS = LighthouseModelArgs(
    **{**SIZE, "n_layers": 3, "multiple_of": 32}, lighthouse=METHOD, dense_layers=[0]
)
FFN = 192


def build(cls: type[nn.Module] = LighthouseTransformer, args: Any = FOUR_LAYERS) -> nn.Module:
    """A float32 model of ``cls`` on the CPU."""
    torch.manual_seed(0)
    model = cls(args)
    with torch.no_grad():
        model.init_weights()
    return model


def build_on_device(
    attention: str,
    impl: str | None,
    keep_products: tuple[str, ...] | None = None,
    args: LighthouseModelArgs = THREE_LAYERS,
) -> LighthouseTransformer:
    """The model of ``args`` on ``DEVICE`` in ``DTYPE``.

    Args:
        attention: "lighthouse" or "dense".
        impl: the implementation that layers use in stage "lighthouse".
        keep_products: products that mode "lighthouse" keeps; None applies no checkpointing.
    """
    model = build(args=args)
    assert model.layers["0"].feed_forward.w1.weight.shape[0] == FFN
    model.to(DEVICE)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPE)
    for module in model.modules():
        if isinstance(module, InnerAttention):
            module.impl = impl
    leave_out_math_backend(model)
    if keep_products is not None:
        section = ActivationCheckpoint(mode="lighthouse", keep_products=list(keep_products))
        apply_lighthouse_checkpoint(model, section)
    model.use_attention(attention)
    return model
