"""The gradient of a logsumexp, for backwards of attention that know none.

They read ``out`` for one purpose alone, the row sums of dout * out, and subtract them where the
gradient of the logsumexp would be added. So they are given another ``out``:

    out' = out - dout dlse / |dout|^2,   for which   rowsum(dout out') = rowsum(dout out) - dlse

Shapes: B batch, Hq query heads, N positions, D head dimension.
"""

import torch

from .precision import accumulation_dtype

# A row of dout below this share of its dlse is raised to it. float16 has no room for less.
SMALLEST_SHARE = {torch.float16: 2.0**-10}
SMALLEST_SHARE_OF_OTHERS = 2.0**-20


def fold_lse_gradient(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows dout' and out', such that rowsum(dout' out') = rowsum(dout' out) - dlse.

    dout' is dout, save for rows that are zero or too small beside their dlse for out' to hold the
    quotient. Such rows are raised to ``SMALLEST_SHARE`` of their dlse, and so change the gradient
    of v by that share of it.

    Args:
        dout, out: [B, Hq, N, D].
        dlse: [B, Hq, N], or None where the logsumexp has no gradient; both rows are then as given.
    """
    if dlse is None:
        return dout, out
    dtype, sums = dout.dtype, accumulation_dtype(dout.dtype)
    dlse = dlse.to(sums).unsqueeze(-1)
    rows = dout.to(sums)
    least = dlse.abs() * SMALLEST_SHARE.get(dtype, SMALLEST_SHARE_OF_OTHERS)
    rows = torch.where(rows.abs().amax(dim=-1, keepdim=True) < least, least, rows).to(dtype)
    # Squares of small gradients would vanish in float32.
    size = rows.to(sums).abs().amax(dim=-1, keepdim=True)
    unit = rows.to(sums) / torch.where(size > 0, size, 1.0)
    squares = (unit * unit).sum(dim=-1, keepdim=True)
    quotient = torch.where(size > 0, dlse / size / squares, 0.0)
    return rows, (out.to(sums) - unit * quotient).to(dtype)
