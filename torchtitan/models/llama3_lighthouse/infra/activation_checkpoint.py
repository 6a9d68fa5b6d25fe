"""Activation checkpointing that keeps what is small and dear: ``mode = "lighthouse"``.

Of every layer its input is kept, what attention gave, and the selection: in a Lighthouse layer the
gathered queries, keys and values and the output of attention over them, all of length S, in a dense
layer the output of attention over N positions. Neither attention nor selection is ever repeated.
From these backward repeats norms, rotary embedding, scattering and those matrix products that
``keep_products`` does not name. A kept element of a product saves 2 K FLOPs for 2 bytes, K the
columns of its weight, so that all are worth the same but w2's, which backward does not need.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lighthouse import LighthouseAttention
from lighthouse.implementation import kernels

from ..job_config import ActivationCheckpoint

# Matrix products of a block, in the order in which it takes them.
PRODUCTS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")
# Those that the backward of Lighthouse attention does without, having what was gathered of them.
BEFORE_GATHERING = ("wq", "wk", "wv")

ATTENTION = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
SELECTION = {torch.ops.lighthouse.select.default}
GATHERING = set()
if kernels is not None:
    SELECTION |= {
        torch.ops.lighthouse.score.default,
        torch.ops.lighthouse.select_from_norms.default,
    }
    GATHERING = {torch.ops.lighthouse.gather.default}
# Of the seam between chunks, a few rows.
EXCHANGE = {torch.ops._c10d_functional.all_to_all_single.default}
# Of tensor parallelism, as in upstream's selective mode.
REDUCTION = {torch.ops._c10d_functional.reduce_scatter_tensor.default}


def apply_lighthouse_checkpoint(model: nn.Module, section: ActivationCheckpoint) -> None:
    """Checkpoint every block of ``model.layers``, keeping the products that ``section`` names."""
    for name, block in model.layers.named_children():
        wrapped = checkpoint_wrapper(
            block,
            context_fn=contexts_that_keep(block, frozenset(section.keep_products)),
            preserve_rng_state=section.preserve_rng_state,
            determinism_check=section.determinism_check,
            # Backward needs nothing after w3's product.
            early_stop=True,
            debug=section.debug,
        )
        model.layers.register_module(name, wrapped)


def contexts_that_keep(block: nn.Module, keep_products: frozenset[str]) -> Callable:
    """The ``context_fn`` of ``torch.utils.checkpoint`` for one block.

    Args:
        keep_products: of ``PRODUCTS``, those kept where backward needs them.
    """
    inner = block.attention.inner_attention
    kept = ATTENTION | SELECTION | GATHERING | EXCHANGE

    def contexts():
        needed = set(keep_products)
        if isinstance(inner, LighthouseAttention) and inner.enabled:
            needed -= set(BEFORE_GATHERING)
        products_seen = {False: 0, True: 0}

        def policy(context, operation, *arguments, **options):
            seen = products_seen[context.is_recompute]
            if operation == torch.ops.aten.mm.default:
                assert seen < len(PRODUCTS), "a block takes more products than its linear layers"
                products_seen[context.is_recompute] += 1
                keep = PRODUCTS[seen] in needed
            elif operation in REDUCTION:
                keep = seen < len(PRODUCTS)
            else:
                keep = operation in kept
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    # Lets the compiler's cache tell graphs apart that differ in nothing but what they keep.
    contexts.cache_hash = f"lighthouse {sorted(keep_products)}"
    return contexts
