"""The attention operations of GPUs on a CPU."""

import torch

from lighthouse.cudnn import cudnn_backward, cudnn_forward
from torchtitan.models.llama3_lighthouse.infra import ring_operations

# Forward and backward of the attentions that torch has for GPUs.
ATTENTIONS = {
    "cudnn": (cudnn_forward, cudnn_backward),
    "flash": (ring_operations.flash_forward, ring_operations.flash_backward),
}


def emulate_attention_of_gpus() -> None:
    """Run the operations of cuDNN and flash attention on the CPU, by the CPU's attention.

    They take the arguments of those on GPUs and return results of the same shapes.
    """
    library = torch.library.Library("aten", "IMPL")
    seed = torch.zeros((), dtype=torch.long)
    forward, backward = ring_operations.cpu_forward, ring_operations.cpu_backward

    def cudnn(query, key, value, bias, with_logsumexp, dropout_p=0.0, is_causal=False,
              debug=False, *, scale=None):  # fmt: skip
        assert bias is None and with_logsumexp and not dropout_p
        out, logsumexp = forward(query, key, value, scale, is_causal)
        lengths = query.shape[2], key.shape[2]
        return out, logsumexp.unsqueeze(-1), None, None, *lengths, seed, seed.clone(), None

    def cudnn_backward(grad, query, key, value, out, logsumexp, seed, offset, bias, starts_q,
                       starts_k, max_q, max_k, dropout_p, is_causal, *, scale=None):  # fmt: skip
        assert starts_q is None and starts_k is None and logsumexp.shape == (*out.shape[:3], 1)
        assert (max_q, max_k) == (query.shape[2], key.shape[2]) and not dropout_p
        return backward(grad, query, key, value, out, logsumexp.squeeze(-1), scale, is_causal)

    def flash(query, key, value, dropout_p=0.0, is_causal=False, debug=False, *, scale=None):
        assert query.shape[-1] % 8 == 0 and not dropout_p
        out, logsumexp = forward(query, key, value, scale, is_causal)
        lengths = query.shape[2], key.shape[2]
        random_state = torch.zeros(2, dtype=torch.uint64)
        return (
            out,
            logsumexp,
            None,
            None,
            *lengths,
            random_state,
            random_state[0].clone(),
            torch.empty(0),
        )

    def flash_backward(grad, query, key, value, out, logsumexp, starts_q, starts_k, max_q, max_k,
                       dropout_p, is_causal, seed, offset, *, scale=None):  # fmt: skip
        assert starts_q is None and starts_k is None and logsumexp.is_contiguous()
        assert (max_q, max_k) == (query.shape[2], key.shape[2]) and not dropout_p
        assert query.shape[-1] % 8 == 0
        return backward(grad, query, key, value, out, logsumexp, scale, is_causal)

    library.impl("_scaled_dot_product_cudnn_attention", cudnn, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    library.impl("_scaled_dot_product_flash_attention", flash, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", flash_backward, "CPU")
    emulations.append(library)


emulations: list[torch.library.Library] = []
