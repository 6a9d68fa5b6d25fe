"""Activation checkpointing that keeps what is small and costly: ``mode = "lighthouse"``.

Each layer keeps its input, the output of attention, and the selection. In a dense layer, and over a
window, the output of attention has N positions. Over selected entries it has S, and the gathered
queries, keys and values, which have S as well, are kept with it. Backward then repeats neither
attention nor selection.

Backward does repeat norms, rotary embedding, scattering, and the matrix products that
``keep_products`` does not name. One element of a product takes 2 bytes to keep and 2 K FLOPs to
repeat, where K is the number of the layer's inputs. K is the model's width for every product but
that of w2. Backward does not need w2's product, so all that can be kept are equally worth keeping.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from lighthouse import LighthouseAttention
from lighthouse.implementation import kernels

from ..job_config import ActivationCheckpoint
from ..model.rotary import RotaryAttention
from . import ring_operations

# Matrix products of a block, in the order in which it computes them.
PRODUCTS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")
# Products that make the rows of attention.
BEFORE_GATHERING = ("wq", "wk", "wv")

ATTENTION = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
# Dense attention within documents on CPUs. On GPUs it is a window of the whole sequence.
DOCUMENTS = {torch.ops.lighthouse.document_attention.default}
# The same over several ranks.
RING = {ring_operations.ATTENTION}
WINDOW = {torch.ops.lighthouse.window.default, torch.ops.lighthouse.halo_window.default}
SELECTION = {torch.ops.lighthouse.select.default}
GATHERING: set[torch._ops.OpOverload] = set()
if kernels is not None:
    WINDOW |= {
        torch.ops.lighthouse.window_by_kernel.default,
        torch.ops.lighthouse.flash4_window.default,
    }
    SELECTION |= {
        torch.ops.lighthouse.score.default,
        torch.ops.lighthouse.select_from_norms.default,
        torch.ops.lighthouse.select_by_documents.default,
    }
    GATHERING = {torch.ops.lighthouse.gather.default}
# The rows that cross from chunk to chunk under context parallelism: seam and halo. They are read
# again out of what came.
EXCHANGE = {torch.ops.lighthouse.send.default}
# Tensor parallelism's reduction, which upstream's selective mode keeps as well.
REDUCTION = {torch.ops._c10d_functional.reduce_scatter_tensor.default}


def apply_lighthouse_checkpoint(model: nn.Module, section: ActivationCheckpoint) -> None:
    """Checkpoint every block of ``model.layers``, keeping the products that ``section`` names."""
    layers = model.get_submodule("layers")
    for name, block in layers.named_children():
        wrapped = checkpoint_wrapper(
            block,
            context_fn=contexts_that_keep(block, frozenset(section.keep_products)),
            preserve_rng_state=section.preserve_rng_state,
            determinism_check=section.determinism_check,
            # Backward needs nothing after w3's product.
            early_stop=True,
            debug=section.debug,
        )
        layers.register_module(name, wrapped)


def replaced_products(norms_heads: bool) -> set[str]:
    """Products in whose place backward of Lighthouse attention reads the gathered rows.

    Args:
        norms_heads: whether queries and keys are normed, so that backward of the norm reads them.
    """
    return {"wv"} if norms_heads else set(BEFORE_GATHERING)


def contexts_that_keep(
    block: nn.Module, keep_products: frozenset[str]
) -> Callable[[], tuple[Any, Any]]:
    """Make the ``context_fn`` of ``torch.utils.checkpoint`` for one block.

    Args:
        keep_products: names from ``PRODUCTS``. Each is kept where backward needs it.
    """
    attention = cast(RotaryAttention, block.get_submodule("attention"))
    inner, replaced = attention.inner_attention, replaced_products(attention.norms_heads)
    kept = ATTENTION | DOCUMENTS | RING | WINDOW | SELECTION | GATHERING | EXCHANGE

    def contexts() -> tuple[Any, Any]:
        needed = set(keep_products)
        # A window beside the selection attends over all of them.
        if isinstance(inner, LighthouseAttention) and inner.enabled and not inner.config.window:
            needed -= replaced
        # Products so far, in the forward pass (False) and in its repetition (True).
        products_seen = {False: 0, True: 0}

        def policy(
            context: SelectiveCheckpointContext,
            operation: torch._ops.OpOverload,
            *arguments: Any,
            **options: Any,
        ) -> CheckpointPolicy:
            seen = products_seen[context.is_recompute]
            if operation == torch.ops.aten.mm.default:
                assert seen < len(PRODUCTS), "a block takes more products than its linear layers"
                products_seen[context.is_recompute] += 1
                keep = PRODUCTS[seen] in needed
            elif operation in REDUCTION:
                # The reduction after w2 is not needed, just as w2's product is not.
                keep = seen < len(PRODUCTS)
            else:
                keep = operation in kept
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    # By this hash, the compiler's cache tells apart graphs that differ only in what they keep.
    # pyrefly: ignore[missing-attribute]  Functions take attributes; torch looks for this one.
    contexts.cache_hash = f"lighthouse {sorted(keep_products)}"
    return contexts
