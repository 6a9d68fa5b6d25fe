"""The outputs of two attentions as that of one softmax over the keys of both.

A softmax divides by a sum of exponentials, and the logsumexp is the logarithm of this sum. Outputs
x and y over different keys, with logsumexps a and b, are averaged by these sums:

    out = (1 - w) x + w y        w = exp(b) / (exp(a) + exp(b)) = sigmoid(b - a)
    lse = log(exp(a) + exp(b))

Shapes: B batch, H query heads, N queries, D head dimension.
"""

import torch

from .implementation import choose_implementation, kernels


def merged_output(
    x: torch.Tensor, a: torch.Tensor, y: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """Merge two outputs. Gradients are exact, those of the logsumexps among them.

    Args:
        x, y: outputs, [B, H, N, D]. A row of y whose b is minus infinity has no weight.
        a, b: their logsumexps, [B, H, N].

    Returns:
        [B, H, N, D] in the dtype of x.
    """
    weight = torch.sigmoid(b - a).unsqueeze(-1)
    return (weight * y + (1 - weight) * x).to(x.dtype)


def merge_in_place(x: torch.Tensor, a: torch.Tensor, y: torch.Tensor, b: torch.Tensor) -> None:
    """Merge y and b into x and a, without autograd; on a GPU in one pass of a kernel.

    Args:
        x: output that becomes that of both, [B, H, N, D] with D contiguous.
        a: its logsumexp, which becomes that of both, [B, H, N].
        y, b: the other output and logsumexp, of the same shapes.
    """
    if choose_implementation(None, x) == "triton":
        # pyrefly: ignore[missing-attribute]  Choosing it has made sure that there are kernels.
        kernels.merge_in_place(x, a, y, b)
        return
    weight = torch.sigmoid(b - a).unsqueeze(-1)
    torch.addcmul(x * (1 - weight), y, weight, out=x)
    a.copy_(torch.logaddexp(a, b))
