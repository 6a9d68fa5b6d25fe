"""The attention operations of GPUs on a CPU."""

import torch

from lighthouse.cpu_flash import cpu_backward, cpu_forward
from lighthouse.cudnn import cudnn_backward, cudnn_forward
from lighthouse.flash import flash_backward, flash_forward

# Forward and backward of the attentions that torch has for GPUs.
ATTENTIONS = {
    "cudnn": (cudnn_forward, cudnn_backward),
    "flash": (flash_forward, flash_backward),
}


def check_rows(*rows: torch.Tensor) -> None:
    """flash attention copies rows of D elements in vectors of eight."""
    assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in rows)


def emulate_attention_of_gpus() -> None:
    """Run the operations of cuDNN and flash attention on the CPU, by the CPU's attention.

    They take the arguments of those on GPUs and return results of the same shapes.
    """
    library = torch.library.Library("aten", "IMPL")
    seed = torch.zeros((), dtype=torch.long)

    def cudnn(query, key, value, bias, with_logsumexp, dropout_p=0.0, is_causal=False,
              debug=False, *, scale=None):  # fmt: skip
        assert bias is None and with_logsumexp and not dropout_p
        out, logsumexp = cpu_forward(query, key, value, scale, is_causal)
        lengths = query.shape[2], key.shape[2]
        return out, logsumexp.unsqueeze(-1), None, None, *lengths, seed, seed.clone(), None

    def cudnn_backward(grad, query, key, value, out, logsumexp, seed, offset, bias, starts_q,
                       starts_k, max_q, max_k, dropout_p, is_causal, *, scale=None):  # fmt: skip
        assert starts_q is None and starts_k is None and logsumexp.shape == (*out.shape[:3], 1)
        # A plan for other strides would be taken.
        assert grad.stride() == out.stride() == query.stride()
        assert (max_q, max_k) == (query.shape[2], key.shape[2]) and not dropout_p
        return cpu_backward(grad, query, key, value, out, logsumexp.squeeze(-1), scale, is_causal)

    def flash(query, key, value, starts_q, starts_k, max_q, max_k, dropout_p, is_causal,
              debug, *, scale, window_size_left, window_size_right, **others):  # fmt: skip
        check_rows(query, key, value)
        assert starts_q is None and starts_k is None and not dropout_p
        assert (max_q, max_k) == (query.shape[1], key.shape[1])
        assert (window_size_left, window_size_right) == (-1, 0 if is_causal else -1)
        rows = (x.transpose(1, 2) for x in (query, key, value))
        out, logsumexp = cpu_forward(*rows, scale, is_causal)
        state = torch.zeros(2, dtype=torch.uint64)
        return out.transpose(1, 2), logsumexp, state, state[0].clone(), torch.empty(0)

    def flash_backward(grad, query, key, value, out, logsumexp, starts_q, starts_k, max_q, max_k,
                       dropout_p, is_causal, seed, offset, *, scale, window_size_left,
                       window_size_right):  # fmt: skip
        check_rows(grad, query, key, value, out)
        assert starts_q is None and starts_k is None and logsumexp.is_contiguous()
        assert (max_q, max_k) == (query.shape[1], key.shape[1]) and not dropout_p
        assert (window_size_left, window_size_right) == (-1, 0 if is_causal else -1)
        rows = (x.transpose(1, 2) for x in (grad, query, key, value, out))
        grads = cpu_backward(*rows, logsumexp, scale, is_causal)
        return tuple(x.transpose(1, 2) for x in grads)

    library.impl("_scaled_dot_product_cudnn_attention", cudnn, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    library.impl("_flash_attention_forward", flash, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    emulations.append(library)


emulations: list[torch.library.Library] = []
