"""Context parallelism: ring attention inside Lighthouse attention, on GPUs and on CPUs."""

from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.distributed.tensor.experimental._context_parallel._attention import _cp_options
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module

from lighthouse import ContextParallel
from lighthouse.inner_attention import InnerAttention
from lighthouse.precision import accumulation_dtype

from ..job_config import Parallelism
from ..model.model import LighthouseModelArgs
from .ring_attention import install_ring_attention, sum_dtype
from .ring_logsumexp import operations_of


def layout_of(mesh: DeviceMesh, config: Parallelism) -> ContextParallel:
    """The chunks of a sequence that this rank of ``mesh`` holds."""
    return ContextParallel(
        mesh.get_group(),
        mesh.get_local_rank(),
        mesh.size(),
        balanced=config.balanced,
    )


def held_batch(
    inputs: torch.Tensor, labels: torch.Tensor, mesh: DeviceMesh, config: Parallelism
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut this rank's part out of a batch.

    torchtitan's own function would have torch 2.11 list every position of the sequence on the host,
    for each batch, while the device waits.

    Args:
        inputs, labels: [B, N] each.

    Returns:
        Inputs, labels and their positions in the sequence, [B, N / W] each.
    """
    layout = layout_of(mesh, config)
    positions = torch.arange(inputs.shape[1], dtype=torch.int32, device=inputs.device)
    inputs, labels, positions = (
        layout.take(rows, dim=1) for rows in (inputs, labels, positions.expand(inputs.shape))
    )
    return inputs, labels, positions


def apply_context_parallel(
    attention_modules: list[nn.Module], mesh: DeviceMesh, config: Parallelism
) -> None:
    """Run every module's dense attention over ``mesh``, also where it lies inside Lighthouse.

    Lighthouse and windows learn which chunks of the sequence are here.
    """
    install_ring_attention()
    # Upstream reads the key but never sets the method, so torch would all-gather.
    set_rotate_method(config.context_parallel_rotate_method)
    layout = layout_of(mesh, config)
    _cp_options.enable_load_balance = layout.balanced
    assert layout.group is not None
    gathers = config.context_parallel_rotate_method == "allgather"
    operations = operations_of(layout.group, layout.balanced, gathers)
    layout = replace(layout, operations=operations)
    dense = []
    for module in attention_modules:
        if isinstance(module, InnerAttention):
            module.context_parallel = layout
            module = module.sdpa
        dense.append(module)
    apply_cp_to_attention_module(dense, mesh, "sdpa")


def bytes_sent_per_layer(
    args: LighthouseModelArgs, seq_len: int, layout: ContextParallel, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that one rank sends in one layer of stage "lighthouse" for one sequence.

    Keys and values of S / W places go round the ring forward and again backward, W - 1 hops each,
    with the rotate method "alltoall". Their gradients go round backward. At the seam, L - 1 rows of
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
