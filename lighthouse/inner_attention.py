"""The place of an attention inside a model, with a switch to the dense attention that it holds.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension.
"""

from typing import Any

import torch
from torch import nn

from .context_parallel import ONE_DEVICE
from .dense_attention import document_attention, document_attention_over_ranks
from .implementation import check_implementation


class StockAttention(nn.Module):
    """torch's ``scaled_dot_product_attention`` as a module."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """[B, Hq, N, D]; ``options`` are the function's own."""
        return nn.functional.scaled_dot_product_attention(q, k, v, **options)


def check_call(
    name: str, q: torch.Tensor, k: torch.Tensor, enable_gqa: bool, is_causal: bool
) -> None:
    """Check that the attention ``name`` computes what is asked of it.

    Args:
        q: [B, Hq, N, D].
        k: [B, Hkv, N, D].

    Raises:
        ValueError: ``is_causal`` is false, or the heads differ without ``enable_gqa``.
    """
    if not is_causal:
        raise ValueError(f"{name} is causal; pass is_causal = True")
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise ValueError(
            f"q has {q.shape[1]} heads and k {k.shape[1]}; pass enable_gqa = True to share "
            "key-value heads"
        )


class InnerAttention(nn.Module):
    """A causal attention around a dense inner attention; subclasses say how it attends.

    It has no parameters and no buffers, so it does not change a model's state dict.

    Args:
        sdpa: the dense inner attention, called as torch's ``scaled_dot_product_attention``, which
            is the default.
        impl: one of ``implementations``; by default the fastest on the device.

    Raises:
        ValueError: ``impl`` is not known.

    Attributes:
        context_parallel: the chunks on this rank, when sequences are spread over several. Set it
            together with an ``sdpa`` that attends over all ranks.
        enabled: whether this attention runs; otherwise ``sdpa`` runs alone.
        name: what messages call it.
        implementations: the names that ``impl`` may have.
    """

    name: str
    implementations: tuple[str, ...]

    def __init__(self, sdpa: nn.Module | None = None, impl: str | None = None) -> None:
        super().__init__()
        check_implementation(impl, self.implementations)
        self.impl = impl
        self.sdpa = sdpa if sdpa is not None else StockAttention()
        self.context_parallel = ONE_DEVICE
        self.enabled = True

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        is_causal: bool = True,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention output [B, Hq, N, D] for q [B, Hq, N, D] and k, v [B, Hkv, N, D].

        Args:
            documents: int32 or int64 [B, N], for each position the first position of its document,
                within which it attends. ``sdpa`` does not run then: dense attention is that of
                ``document_attention``, or by the operations of ``context_parallel``. With several
                chunks this is the layout of the whole sequence.

        Raises:
            ValueError: the attention is enabled or there are documents, and ``is_causal`` is false
                or the heads differ without ``enable_gqa``; or there are documents under context
                parallelism without its operations.
        """
        if not self.enabled and documents is None:
            return self.sdpa(q, k, v, scale=scale, enable_gqa=enable_gqa, is_causal=is_causal)
        check_call(self.name, q, k, enable_gqa, is_causal)
        if not self.enabled:
            assert documents is not None
            if self.context_parallel.chunks > 1:
                rows = q, k, v, documents, self.context_parallel
                return document_attention_over_ranks(*rows, scale)
            return document_attention(q, k, v, documents, scale=scale)
        return self.attend(q, k, v, scale, documents)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output of ``forward`` when this attention is enabled."""
        raise NotImplementedError

    def settings(self) -> str:
        """The settings that ``repr`` shows."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.settings()}, enabled={self.enabled}"
