"""Estimates of the memory of a rank: weights and optimizer, activations, and the loss."""

from torch import nn
from torch.distributed.tensor import DTensor

from lighthouse.geometry import PyramidGeometry

from .infra.activation_checkpoint import replaced_products
from .infra.offload import INPUTS_ON_DEVICE
from .job_config import ActivationCheckpoint
from .model.linear_cross_entropy import tokens_per_chunk
from .model.model import LighthouseModelArgs

# Bytes of a parameter, its gradient and AdamW's two moments: float32, as in torchtitan's FSDP.
OPTIMIZER_BYTES = {"parameters": 4, "gradients": 4, "optimizer": 8}
# Mixed precision keeps activations in bfloat16.
ACTIVATION_BYTES = 2


def local_parameters(model: nn.Module) -> int:
    """Parameters of ``model`` that this rank holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def head_bytes(args: LighthouseModelArgs, tokens: int) -> int:
    """Bytes that the output layer and the loss of ``tokens`` tokens hold.

    A loss that is computed whole holds all logits once in bfloat16 and twice in float32. A loss in
    chunks holds the logits of one chunk, the gradient of the hidden states, the weight in bfloat16
    and the gradient of the weight in float32.
    """
    if not args.chunked_loss:
        return tokens * args.vocab_size * (ACTIVATION_BYTES + 8)
    chunk = min(tokens, tokens_per_chunk(args.vocab_size, ACTIVATION_BYTES))
    weight = args.vocab_size * args.dim * (ACTIVATION_BYTES + 4)
    return (chunk * args.vocab_size + tokens * args.dim) * ACTIVATION_BYTES + weight


def product_widths(args: LighthouseModelArgs) -> dict[str, int]:
    """Width of the output of each linear layer of a block whose output may be kept."""
    q, kv, hidden = args.attention_width, args.kv_heads * args.head_dim, args.ffn_width
    return {"wq": q, "wk": kv, "wv": kv, "wo": args.dim, "w1": hidden, "w3": hidden}


def layer_elements(
    args: LighthouseModelArgs, section: ActivationCheckpoint, geometry: PyramidGeometry | None
) -> tuple[float, float]:
    """Elements per token that a dense layer and a Lighthouse layer keep for backward.

    Without a geometry the layer attends over a window, and keeps what a dense layer keeps.

    They depend on the mode of activation checkpointing: "lighthouse" keeps what
    ``infra/activation_checkpoint.py`` lists; "full" keeps the layer's input; "selective" also keeps
    the attention output and half of the matrix products, as torchtitan's "op" policy does; "none"
    keeps nearly everything that the layer computes.
    """
    widths = product_widths(args)
    products = sum(widths.values())
    if section.mode != "lighthouse":
        kept = {
            "full": args.dim,
            "selective": args.dim + args.attention_width + products / 2,
            "none": 4 * args.dim + 3 * args.attention_width + products + 2 * widths["w1"],
        }.get(section.mode, float("nan"))
        return kept, kept
    # Logsumexps and indices take four bytes each.
    words = 4 / ACTIVATION_BYTES
    attention = args.attention_width + words * args.n_heads
    dense = args.dim + sum(widths[name] for name in section.keep_products) + attention
    if geometry is None:
        return dense, dense
    share = geometry.gathered_length / geometry.sequence_length
    pyramid = geometry.pyramid_length / geometry.sequence_length
    # Selections hold the maps of both directions, between places and pyramid entries.
    selection = words * args.kv_heads * (share + pyramid)
    gathered = share * (args.attention_width + 2 * widths["wk"] + attention) + selection
    # A window beside the selection keeps what a dense layer keeps.
    if args.lighthouse.window:
        return dense, dense + gathered
    unread = replaced_products(args.attention_class.norms_heads)
    read = sum(widths[name] for name in section.keep_products if name not in unread)
    return dense, args.dim + read + gathered


def activation_bytes(
    args: LighthouseModelArgs,
    seq_len: int,
    tokens: int,
    section: ActivationCheckpoint,
    attention: str,
) -> float:
    """Bytes that a rank keeps for backward, ``head_bytes`` included.

    Args:
        tokens: tokens of a pass on this rank, of sequences of ``seq_len``.
        attention: "lighthouse" or "dense".
    """
    # Dense attention takes lengths that no selection does.
    selects = args.selects and attention == "lighthouse"
    geometry = PyramidGeometry(args.lighthouse, seq_len) if selects else None
    dense, lighthouse = layer_elements(args, section, geometry)
    lighthouse_layers = args.n_layers - len(args.dense_layers) if attention == "lighthouse" else 0
    layers = (args.n_layers - lighthouse_layers) * dense + lighthouse_layers * lighthouse
    if section.offload_inputs:
        layers -= max(0, args.n_layers - INPUTS_ON_DEVICE) * args.dim
    return tokens * layers * ACTIVATION_BYTES + head_bytes(args, tokens)


def pinned_bytes(args: LighthouseModelArgs, tokens: int) -> int:
    """Bytes of host memory that a rank pins to offload the inputs of all layers."""
    # torch pins powers of two.
    buffer = 2 ** (args.dim * tokens * ACTIVATION_BYTES - 1).bit_length()
    return args.n_layers * buffer
