"""Rotary embedding that compiles into one kernel for forward and one for backward.

torchtitan multiplies complex numbers, for which inductor generates no code. That takes five passes
over queries and keys, with copies in float32. Written in real numbers, the product is fused with
the casts around it. Without a compiler, the complex product takes the fewest passes. Both forms
round every product and every sum once, so they differ only where a compiler contracts a product and
a sum into one operation.

Shapes: B batch, N positions, H heads, D head dimension.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3.model.model import Attention

from lighthouse import document_attention


def table_of(freqs_cis: torch.Tensor) -> torch.Tensor:
    """torchtitan's table, complex64 [longest N, D / 2], as the bits of cosines and sines.

    FSDP casts floating-point arguments of a block to bfloat16; it leaves integers alone.

    Returns:
        int32 [longest N, D / 2, 2], a view of the same memory.
    """
    return torch.view_as_real(freqs_cis).view(torch.int32)


def turns_at(table: torch.Tensor, length: int, positions: torch.Tensor | None) -> torch.Tensor:
    """Cosines and sines at a batch's positions.

    Args:
        table: from ``table_of``.
        length: N.
        positions: integers [B or 1, N], or None for 0 to ``length`` - 1.

    Returns:
        float32 [B or 1, N, 1, D / 2, 2].
    """
    table = table.view(torch.float32)
    rows = table[None, :length] if positions is None else table[positions]
    return rows.unsqueeze(2)


def rotate_real(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """``rotate`` in real numbers: each pair (a, b) becomes (a c - b s, b c + a s)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cosine, sine = turns.split(1, dim=-1)
    # -1 for the first element of each pair and 1 for the second.
    sign = 2 * torch.arange(2, device=x.device) - 1
    return (pairs * cosine + pairs.flip(-1) * (sine * sign)).flatten(-2).type_as(x)


def rotate_complex(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """``rotate`` as upstream computes it: (a + i b) (c + i s)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(turns)).flatten(-2).type_as(x)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbouring columns of ``x`` [B, N, H, D] by its position's angle.

    It computes in float32 and rounds to the dtype of ``x`` once.

    Args:
        turns: from ``turns_at``.
    """
    return (rotate_real if torch.compiler.is_compiling() else rotate_complex)(x, turns)


class RotaryAttention(Attention):
    """Upstream's attention of type "sdpa", with this rotary embedding and its table of bits.

    The place of upstream's masks takes documents: int32 [B, N], for each position the first
    position of its document, within which it attends. Other families derive theirs from it.

    Attributes:
        norms_heads: whether ``rotated`` norms each head's queries and keys.
    """

    norms_heads: ClassVar[bool] = False

    def set_heads(self, dim: int, kv_heads: int, head_dim: int) -> None:
        """Make heads of another width than upstream's, which is dim / n_heads.

        Args:
            dim: columns of the residual stream.
            head_dim: D.
        """
        self.head_dim, width = head_dim, self.n_heads * head_dim
        self.wq = nn.Linear(dim, width, bias=False)
        self.wk = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(width, dim, bias=False)

    @staticmethod
    def tensor_parallel_plan() -> dict[str, ParallelStyle]:
        """How tensor parallelism divides the modules that a Llama's attention does not have."""
        return {}

    def rotated(
        self, q: torch.Tensor, k: torch.Tensor, turns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the queries and keys that attention sees out of the projected ones.

        Args:
            q, k: [B, N, H, D]; tensor parallelism leaves this rank's heads.
            turns: from ``turns_at``.

        Returns:
            The same shapes.
        """
        return rotate(q, turns), rotate(k, turns)

    def forward(
        self,
        x: torch.Tensor,
        table: torch.Tensor,
        attention_masks: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, length, _ = x.shape
        # -1: the number of heads on this rank, which tensor parallelism may have divided.
        q, k, v = (
            projection(x).view(batch, length, -1, self.head_dim)
            for projection in (self.wq, self.wk, self.wv)
        )
        q, k = self.rotated(q, k, turns_at(table, length, positions))
        q, k, v = (rows.transpose(1, 2) for rows in (q, k, v))
        out = self._attend(q, k, v, attention_masks)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor:
        options: dict[str, Any] = {}
        if documents is not None:
            options["documents"] = documents
            # Upstream's dense attention knows no documents.
            if isinstance(self.inner_attention, ScaledDotProductAttentionWrapper):
                return document_attention(q, k, v, **options)
        return self.inner_attention(q, k, v, enable_gqa=self.enable_gqa, **options)
