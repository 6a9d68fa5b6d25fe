"""Cross-entropy of rows of logits, and its gradient, written over the logits.

    loss = log(sum_j exp(x_j)) - x_label      x_j <- exp(x_j) / sum_i exp(x_i) - (j = label)

One program owns one row. It reads the row once for the sum, and reads and writes it once more for
the gradient. It computes in float32. A row whose label is ignored has loss and gradient zero.

Shapes: T tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torchtitan.components.loss import IGNORE_INDEX

BLOCK, WARPS = 4096, 8
# The number is lower than every logit. Minus infinity would not do: minus itself, it is NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _cross_entropy(
    logits, labels, losses, columns,
    IGNORED: tl.constexpr, DIFFERENTIATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    label = tl.load(labels + row)
    kept = label != IGNORED
    known = (label >= 0) & (label < columns)
    # A label beyond the vocabulary makes the loss NaN, which stops training.
    at_label = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)

    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, columns, BLOCK):
        column = start + lane
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    peak = tl.max(highest, 0)
    # The sum is taken relative to the peak, or logits far from zero would lose precision.
    log_total = tl.log(tl.sum(total * tl.exp(highest - peak), 0))
    tl.store(losses + row, tl.where(kept, log_total - (at_label - peak), 0.0))

    if DIFFERENTIATE:
        for start in tl.range(0, columns, BLOCK):
            column = start + lane
            inside = column < columns
            x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - peak - log_total) - tl.where(column == label, 1.0, 0.0)
            gradient = tl.where(kept, gradient, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, differentiate: bool
) -> None:
    """Write the loss of every row to ``losses``, and its gradient over ``logits`` if asked to.

    Args:
        logits: contiguous [T, V], in float32 or a shorter dtype.
        labels: contiguous int64 [T].
        losses: contiguous float32 [T].
        differentiate: whether to replace the logits by the gradient.
    """
    tokens, columns = logits.shape
    _cross_entropy[(tokens,)](
        logits, labels, losses, columns, IGNORED=IGNORE_INDEX, DIFFERENTIATE=differentiate,
        BLOCK=min(BLOCK, triton.next_power_of_2(columns)), num_warps=WARPS,
    )  # fmt: skip
