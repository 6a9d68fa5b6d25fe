"""An estimate of the time of a step, by which a schedule's stages are compared.

FLOPs alone mislead: products of matrices, attention and passes over memory run at different shares
of a GPU's peak. The constants below are fitted to steps of H200s in bfloat16, compiled.

One GPU does all the work here. Communication, the bubbles of a pipeline, the recomputation of
activation checkpointing and waiting for the host are left out. They lengthen one stage more than
another. Ratios of two steps of one model and GPU are within 15% of the records in docs/benchmarks
where the host keeps up; small steps without CUDA graphs take several times as long.
"""

from .memory_estimate import ACTIVATION_BYTES, product_widths
from .model.model import LighthouseModelArgs

# Products of matrices: 72% of a peak of 989 TFLOP/s.
PRODUCT_FLOPS = 0.72 * 989e12
# Bytes a second of a pass over memory; a copy reaches 4.2e12.
BANDWIDTH = 3.8e12
# Seconds of attention, forward and backward, in one head: for each row of queries, for each pair of
# a query and a key, and for each FLOP of a pair. Together they are half of the peak in long
# sequences of heads of 128, and a third in those of 64.
ROW, PAIR, PAIR_FLOP = 1.65e-9, 1.3e-12, 1.12e-15
# Values that forward and backward read and write per token and layer. Norms, residuals and rotary
# embedding take some for each dimension of the model, SiLU for each of the feed-forward's, and
# Lighthouse for pooling, gathering, scattering and merging.
PASSES, SILU_PASSES, LIGHTHOUSE_PASSES = 40, 12, 27
# Bytes that the loss moves for each logit, and that a step moves for each parameter, however short
# it is: casts of weights and gradients, clipping, AdamW.
LOGIT_BYTES, PARAMETER_BYTES = 8, 100


def step_seconds(args: LighthouseModelArgs, seq_len: int, tokens: int, attention: str) -> float:
    """Seconds of one GPU for a step.

    Args:
        tokens: tokens of the step, in sequences of ``seq_len``.
        attention: "lighthouse" or "dense".
    """
    widths = product_widths(args)
    # The last product of attention takes its width in, where the others take dim.
    inputs = dict.fromkeys(widths, args.dim) | {"wo": args.attention_width}
    per_layer = sum(inputs[name] * width for name, width in widths.items())
    per_layer += widths["w1"] * args.dim
    head = args.vocab_size * args.dim
    products = 6 * (args.n_layers * per_layer + head) / PRODUCT_FLOPS
    sparse = args.n_layers - len(args.dense_layers) if attention == "lighthouse" else 0
    values = args.n_layers * (PASSES * args.dim + SILU_PASSES * widths["w1"])
    rows = float(args.n_layers)
    if sparse and args.key_stride:
        # Attention to far keys begins from nearly every row too.
        rows += sparse
    if sparse and args.selects:
        # A window beside the selection attends from every row too.
        beside = 1 if args.lighthouse.window else 0
        rows += sparse * (args.gathered_length(seq_len) / seq_len + beside - 1)
        values += sparse * LIGHTHOUSE_PASSES * args.dim
    # A pair costs 12 FLOPs a dimension. A scorer's operations count as those of pairs.
    flops = args.flops_per_token(0, seq_len, attention)
    pairs = flops / (12 * args.head_dim)
    per_token = (
        products
        + args.n_heads * rows * ROW
        + pairs * PAIR
        + flops * PAIR_FLOP
        + (values * ACTIVATION_BYTES + args.vocab_size * LOGIT_BYTES) / BANDWIDTH
    )
    parameters = args.n_layers * per_layer + (1 if args.tied else 2) * head
    return tokens * per_token + parameters * PARAMETER_BYTES / BANDWIDTH
