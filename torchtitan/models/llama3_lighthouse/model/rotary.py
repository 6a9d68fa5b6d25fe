"""Rotary embedding that compiles into one kernel each way.

torchtitan multiplies complex numbers, for which inductor generates no code: five passes over
queries and keys, with copies in float32. Written out in real numbers the product is fused with the
casts around it; without a compiler the complex product is the one with the fewest passes. Both
round every product and every sum once, so they differ only where a compiler contracts the two.

Shapes: B batch, N positions, H heads, D head dimension.
"""

import torch
from torchtitan.models.llama3.model.model import Attention


def table_of(freqs_cis: torch.Tensor) -> torch.Tensor:
    """torchtitan's table, complex64 [longest N, D / 2], as cosines and sines of int32 bits.

    As bits, because FSDP casts what a block is called with to bfloat16 if it is floating-point.

    Returns:
        int32 [longest N, D / 2, 2], on the same memory.
    """
    return torch.view_as_real(freqs_cis).view(torch.int32)


def turns_at(table: torch.Tensor, length: int, positions: torch.Tensor | None) -> torch.Tensor:
    """Cosines and sines of a batch's positions, float32 [B or 1, N, 1, D / 2, 2].

    Args:
        table: from ``table_of``.
        positions: integers [B or 1, N], or None for 0 to ``length`` - 1.
    """
    table = table.view(torch.float32)
    rows = table[None, :length] if positions is None else table[positions]
    return rows.unsqueeze(2)


def rotate_real(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """``rotate`` in real numbers: each pair (a, b) becomes (a c - b s, b c + a s)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cosine, sine = turns.split(1, dim=-1)
    # -1 for the first of a pair and 1 for the second.
    sign = 2 * torch.arange(2, device=x.device) - 1
    return (pairs * cosine + pairs.flip(-1) * (sine * sign)).flatten(-2).type_as(x)


def rotate_complex(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """``rotate`` as upstream computes it: (a + i b) (c + i s)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(turns)).flatten(-2).type_as(x)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbouring columns of ``x`` [B, N, H, D] by its position's angle.

    Computed in float32 and rounded to the dtype of ``x`` once.

    Args:
        turns: from ``turns_at``.
    """
    return (rotate_real if torch.compiler.is_compiling() else rotate_complex)(x, turns)


class RotaryAttention(Attention):
    """Upstream's attention of type "sdpa" with this rotary embedding, on a table of bits."""

    def forward(
        self,
        x: torch.Tensor,
        table: torch.Tensor,
        attention_masks: None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, length, _ = x.shape
        # Of the heads that tensor parallelism leaves on this rank.
        q, k, v = (
            projection(x).view(batch, length, -1, self.head_dim)
            for projection in (self.wq, self.wk, self.wv)
        )
        turns = turns_at(table, length, positions)
        q, k, v = (rows.transpose(1, 2) for rows in (rotate(q, turns), rotate(k, turns), v))
        out = self.inner_attention(q, k, v, enable_gqa=self.enable_gqa)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))
