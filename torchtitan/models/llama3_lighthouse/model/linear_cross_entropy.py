"""Output projection and cross-entropy together, without the logits of all tokens.

Forward computes the logits of one chunk of tokens after another, in one buffer. It writes each
chunk's gradient over its logits and multiplies it out at once. Loss and both gradients thus take
only the three matrix products that they need in any case, and backward only scales gradients.

Three libraries have such a loss, and none fits. ``linear_cross_entropy`` of torch 2.13 adds up the
weight's gradient in the weight's precision. Liger's waits for the device twice a step.
cut-cross-entropy adds in no fixed order.

Shapes: B batch, N positions, T = B N tokens, V vocabulary.
"""

from typing import Any

import torch
from torchtitan.components.loss import IGNORE_INDEX

from . import cross_entropy_kernel

# Size of the buffer. Each chunk reads and writes the weight's whole gradient, so small chunks are
# slow.
LOGITS_BYTES = 2**30


def tokens_per_chunk(vocabulary: int, element_size: int) -> int:
    """Tokens whose logits fit into the buffer, a power of two because that suits matrix products.

    Args:
        element_size: bytes of one logit.
    """
    fitting = max(1, LOGITS_BYTES // (vocabulary * element_size))
    return 1 << (fitting.bit_length() - 1)


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, differentiate: bool
) -> None:
    """The kernel of the same name in PyTorch. It computes in the dtype of ``losses``."""
    ignored = labels == IGNORE_INDEX
    column = labels.masked_fill(ignored, 0).unsqueeze(1)
    values = logits.to(losses.dtype)
    log_sum = values.logsumexp(1, keepdim=True)
    losses.copy_((log_sum - values.gather(1, column)).squeeze(1).masked_fill_(ignored, 0))
    if differentiate:
        gradient = values.sub_(log_sum).exp_()
        gradient.scatter_add_(1, column, -torch.ones_like(log_sum))
        logits.copy_(gradient.masked_fill_(ignored.unsqueeze(1), 0))


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add ``a @ b`` to ``total``, which may have a higher precision than ``a`` and ``b``."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        chunk: int,
        differentiate: bool,
    ) -> torch.Tensor:
        rows, labels = hidden.flatten(0, -2), labels.flatten().contiguous()
        accurate = torch.promote_types(dtype, torch.float32)
        cross_entropy = cross_entropy_kernel.cross_entropy_ if rows.is_cuda else cross_entropy_
        factor = weight.to(dtype)
        tokens, chunk = len(rows), min(chunk, len(rows))
        logits = factor.new_empty((chunk, len(factor)))
        losses = factor.new_empty(tokens, dtype=accurate)
        if differentiate:
            grad_rows = torch.empty_like(rows, dtype=dtype)
            grad_weight = torch.zeros_like(factor, dtype=accurate)
        for part in (slice(start, start + chunk) for start in range(0, tokens, chunk)):
            x = rows[part].to(dtype)
            z = torch.mm(x, factor.t(), out=logits[: len(x)])
            cross_entropy(z, labels[part], losses[part], differentiate)
            if differentiate:
                torch.mm(z, factor, out=grad_rows[part])
                add_product_(grad_weight, z.t(), x)
        if differentiate:
            ctx.gradients = grad_rows.view(hidden.shape), grad_weight
            ctx.dtypes = hidden.dtype, weight.dtype
        return losses.sum()

    @staticmethod
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran before and took the gradients with it; "
                "compute the loss again"
            )
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_hidden = grad_hidden.to(hidden_dtype).mul_(grad_loss)
        return grad_hidden, grad_weight.mul_(grad_loss).to(weight_dtype), None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Sum over all tokens of the cross-entropy of ``hidden @ weight.T``, in float32.

    Matrix products are in the autocast dtype, or without autocast in that of ``hidden``, as in
    ``nn.Linear``. The gradient of ``weight`` adds up in float32.

    Args:
        hidden: [B, N, dim].
        weight: [V, dim].
        labels: int64 [B, N]; torchtitan's IGNORE_INDEX leaves a token out.
        chunk: tokens whose logits are held at once; by default as many as fit into a GiB.

    Raises:
        RuntimeError: in backward, if it runs a second time.
    """
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    chunk = chunk or tokens_per_chunk(len(weight), dtype.itemsize)
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, dtype, chunk, differentiate)
