"""Estimates of the memory of a rank: weights and optimizer, activations, and the loss.

Activations are largest when backward begins, or soon after it. Every layer then holds what it
keeps, and one part of the model at a time holds its working set besides: the loss, the final norm,
or the layer that runs backward. Working sets are counted from the compiled graphs of a layer, in
which a tensor lives from the operation that writes it to the last that reads it.

Gradients of all weights are counted from the start, as in a step of several passes. A step of one
pass has none of them when activations are largest.
"""

from itertools import accumulate

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
# Elements that the final norm holds for each of its columns. It is not compiled, and computes in
# float32, two elements each: its input and the normed input wait for backward beside the output,
# and backward has six such tensors at once.
NORM_KEEPS, NORM_BACKWARD = 5, 12


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

    Without a geometry the layer attends over a window, and keeps what a dense layer keeps, and what
    attention to far keys returns if there are some.

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
        # Far attention has an output and logsumexps of its own.
        return dense, dense + (attention if args.key_stride else 0)
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


def feed_forward_elements(args: LighthouseModelArgs, section: ActivationCheckpoint) -> float:
    """Elements per token that backward of a feed-forward layer holds beside what layers keep.

    These are the gradient of its output, the gate's gradient, and those of the two products that
    make the gate. In every mode but "none" they are also what is computed again: the layer's normed
    input, those products, the gate, and wo's product, from which the layer's input is made.
    """
    gradients = args.dim + 3 * args.ffn_width
    if section.mode == "none":
        return gradients
    kept = set(section.keep_products) if section.mode == "lighthouse" else set()
    widths = product_widths(args)
    products = sum(widths[name] for name in ("wo", "w1", "w3") if name not in kept)
    return gradients + args.dim + args.ffn_width + products


def attention_elements(
    args: LighthouseModelArgs,
    section: ActivationCheckpoint,
    geometry: PyramidGeometry | None,
    kind: str,
    ranks: int,
) -> float:
    """Elements per token that backward of attention holds beside what layers keep.

    What the feed-forward layer behind it kept is free by then.

    Args:
        geometry: that of the selection, or None for a ``kind`` without one.
        kind: "dense", "window", "strided" for a window with far keys, "selected", or "beside" for a
            window beside the selection.
        ranks: ranks that share a sequence.
    """
    widths = product_widths(args)
    q, kv = args.attention_width, widths["wk"]
    rows = q + 2 * kv
    # Dense attention on one rank: gradients of rows, that of the queries in float32 beside them.
    everywhere = rows + 2 * q
    if ranks > 1:
        # Rows' gradients at home, half of the heads still with theirs in float32. Those of queries
        # from other ranks; those of keys and values, once leaving and once arriving. Sums of more
        # than two terms are in float32.
        everywhere = rows + q + (1 if ranks == 2 else 2) * (q + 4 * kv)
    near = rows + max(2 * q, rows)
    # The gradient of the sum behind attention, the feed-forward layer's two parts of it, and the
    # gradient of the output of attention.
    held = 3 * args.dim + q
    if geometry is None:
        # Far attention's queries, output and both gradients lie in an order of their own.
        held += {"window": near, "strided": near + 4 * q}.get(kind, everywhere)
    else:
        share = geometry.gathered_length / geometry.sequence_length
        # The output's gradient is collected, and so is the output if there is a window.
        collected = share * ((2 if kind == "beside" else 1) * q + everywhere)
        held += max(near, rows + collected) if kind == "beside" else rows + collected
    if section.mode == "none":
        return held
    kept = set(section.keep_products) if section.mode == "lighthouse" else set()
    # Computed again: the normed input, wo's product, and the rows that attention reads. Products
    # that were kept for these rows are free once the rows are there.
    held += args.dim + (0 if "wo" in kept else args.dim)
    read = {"wq", "wk", "wv"}
    if kind == "selected":
        read -= replaced_products(args.attention_class.norms_heads)
    held += sum(widths[name] for name in read - kept)
    held -= sum(widths[name] for name in ("w1", "w3") if name in kept)
    # Modes of torch's own compute attention once more.
    return held if section.mode == "lighthouse" else held + q


def kept_bytes(
    args: LighthouseModelArgs,
    seq_len: int,
    tokens: int,
    section: ActivationCheckpoint,
    attention: str,
) -> list[float]:
    """Bytes that are kept for backward when forward has passed each layer.

    Args:
        tokens, attention: as in ``activation_bytes``.
    """
    # Dense attention takes lengths that no selection does.
    selects = args.selects and attention == "lighthouse"
    geometry = PyramidGeometry(args.lighthouse, seq_len) if selects else None
    dense, sparse = layer_elements(args, section, geometry)
    layers = [dense if is_dense else sparse for is_dense in dense_layers(args, attention)]
    found = list(accumulate(layers))
    if section.offload_inputs:
        offloaded = (max(0, count + 1 - INPUTS_ON_DEVICE) for count in range(len(layers)))
        found = [kept - args.dim * n for kept, n in zip(found, offloaded, strict=True)]
    return [tokens * kept * ACTIVATION_BYTES for kept in found]


def dense_layers(args: LighthouseModelArgs, attention: str) -> list[bool]:
    """Whether each layer is dense under ``attention``."""
    always = set(args.dense_layers)
    return [attention == "dense" or layer in always for layer in range(args.n_layers)]


def activation_bytes(
    args: LighthouseModelArgs,
    seq_len: int,
    tokens: int,
    section: ActivationCheckpoint,
    attention: str,
    ranks: int = 1,
) -> float:
    """Most bytes that a rank holds in a pass beside weights, gradients and optimizer.

    Args:
        tokens: tokens of a pass on this rank, of sequences of ``seq_len``.
        attention: "lighthouse" or "dense".
        ranks: ranks that share a sequence.
    """
    kept = kept_bytes(args, seq_len, tokens, section, attention)
    column = tokens * args.dim * ACTIVATION_BYTES
    behind = max(head_bytes(args, tokens) + NORM_KEEPS * column, NORM_BACKWARD * column)
    selects = args.selects and attention == "lighthouse"
    geometry = PyramidGeometry(args.lighthouse, seq_len) if selects else None
    sparse = "selected"
    if geometry is None:
        sparse = "strided" if args.key_stride else "window"
    if geometry is not None and args.lighthouse.window:
        sparse = "beside"
    feed_forward = feed_forward_elements(args, section)
    moments = [kept[-1] + behind]
    working: dict[str, float] = {}
    for is_dense, held in zip(dense_layers(args, attention), kept, strict=True):
        kind, of_kind = ("dense", None) if is_dense else (sparse, geometry)
        if kind not in working:
            own = attention_elements(args, section, of_kind, kind, ranks)
            working[kind] = tokens * max(feed_forward, own) * ACTIVATION_BYTES
        moments.append(held + working[kind])
    # Cosines and sines of all positions, in float32.
    return max(moments) + 4 * seq_len * args.head_dim


def pinned_bytes(args: LighthouseModelArgs, tokens: int) -> int:
    """Bytes of host memory that a rank pins to offload the inputs of all layers."""
    # torch pins powers of two.
    buffer = 2 ** (args.dim * tokens * ACTIVATION_BYTES - 1).bit_length()
    return args.n_layers * buffer
