"""Context parallelism: ring attention in the place of dense attention, on GPUs and on CPUs.

Shapes: B batch, Hq query heads, Hkv key-value heads, S positions on a rank, D head dimension.
"""

import math
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from lighthouse import ContextParallel
from lighthouse.context_parallel import attention_over_ranks
from lighthouse.dense_attention import document_attention_over_ranks
from lighthouse.inner_attention import InnerAttention, check_call
from lighthouse.precision import accumulation_dtype

from ..job_config import Parallelism
from ..model.model import LighthouseModelArgs
from .ring_attention import sum_dtype
from .ring_operations import operations_of


class RingAttention(nn.Module):
    """Dense causal attention over the parts of all ranks, in the place of torch's.

    Args:
        layout: the parts, with operations that attend over them.
    """

    def __init__(self, layout: ContextParallel) -> None:
        super().__init__()
        self.layout = layout

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
        """Output [B, Hq, S, D] for this rank's q [B, Hq, S, D] and k, v [B, Hkv, S, D].

        Args:
            documents: as in ``document_attention_over_ranks``.

        Raises:
            ValueError: ``is_causal`` is false, or the heads differ without ``enable_gqa``.
        """
        check_call("ring attention", q, k, enable_gqa, is_causal)
        if documents is not None:
            rows = q, k, v, documents, self.layout
            return document_attention_over_ranks(*rows, scale)
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        return attention_over_ranks(q, k, v, scale, self.layout)


def layout_of(mesh: DeviceMesh, config: Parallelism) -> ContextParallel:
    """The chunks of a sequence that this rank of ``mesh`` holds."""
    return ContextParallel(
        mesh.get_group(),
        mesh.get_local_rank(),
        mesh.size(),
        balanced=config.balanced,
    )


def held_batch(
    inputs: torch.Tensor,
    labels: torch.Tensor,
    options: dict[str, torch.Tensor],
    mesh: DeviceMesh,
    config: Parallelism,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Cut this rank's part out of a batch.

    torchtitan's own function would have torch 2.11 list every position of the sequence on the host,
    for each batch, while the device waits.

    Args:
        inputs, labels: [B, N] each.
        options: what the model takes besides. A layout of documents stays whole: ranks need to know
            where documents lie on the others.

    Returns:
        Inputs and labels [B, N / W], and the options with their positions in the sequence or, if
        they were given, in their documents.
    """
    layout = layout_of(mesh, config)
    positions = options.get("positions")
    if positions is None:
        positions = torch.arange(inputs.shape[1], dtype=torch.int32, device=inputs.device)
    inputs, labels, positions = (
        layout.take(rows, dim=1) for rows in (inputs, labels, positions.expand(inputs.shape))
    )
    return inputs, labels, {**options, "positions": positions}


def apply_context_parallel(model: nn.Module, mesh: DeviceMesh, config: Parallelism) -> None:
    """Put the ring over ``mesh`` in the place of every dense attention of ``model``.

    Lighthouse and windows learn which chunks of the sequence are here. The dense attention inside
    of them gives way to the ring too.

    Raises:
        TypeError: the ``inner_attention`` of a module is of a class that is not known here.
    """
    layout = layout_of(mesh, config)
    layout = replace(layout, operations=operations_of(layout))
    for module in list(model.modules()):
        if isinstance(module, InnerAttention):
            module.context_parallel = layout
            module.sdpa = RingAttention(layout)
        inner = getattr(module, "inner_attention", None)
        if isinstance(inner, ScaledDotProductAttentionWrapper):
            module.inner_attention = RingAttention(layout)
        elif inner is not None and not isinstance(inner, InnerAttention):
            raise TypeError(
                "context parallelism takes an InnerAttention, or torch's dense attention, as an "
                f"inner_attention, got {type(inner).__name__}; make it an InnerAttention"
            )


def bytes_sent_per_layer(
    args: LighthouseModelArgs, seq_len: int, layout: ContextParallel, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that one rank sends in one layer of stage "lighthouse" for one sequence.

    Keys and values of S / W places go round the ring forward and again backward, W - 1 hops each.
    Their gradients go round backward. At the seam, L - 1 rows of
    every query head follow each chunk, forward and backward, even to a chunk on the same rank; with
    a window beside the selection, each has its logsumexp with it. So do the halo's window - 1 keys
    and values of each chunk. A window alone has no ring and no seam.

    Args:
        seq_len: N.
        dtype: the dtype of q, k and v.

    Returns:
        Bytes by "ring", "seam" and "halo". The last two are those of a rank which holds neither the
        first nor the last chunk of the sequence; one that does sends less.
    """
    ranks, chunks = layout.world_size, len(layout.held)
    key_value = 2 * args.kv_heads * args.head_dim
    window = args.window or args.lighthouse.window
    halo = 2 * chunks * max(0, window - 1) * key_value * dtype.itemsize
    if not args.selects:
        return {"ring": 0, "seam": 0, "halo": halo}
    hop = 2 * dtype.itemsize + sum_dtype(dtype, ranks).itemsize
    hop *= key_value * args.gathered_length(seq_len) // ranks
    row = args.head_dim * dtype.itemsize
    row += accumulation_dtype(dtype).itemsize if window else 0
    seam = 2 * chunks * args.n_heads * (args.lighthouse.levels - 1) * row
    return {"ring": (ranks - 1) * hop, "seam": seam, "halo": halo}
