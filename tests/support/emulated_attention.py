"""The attentions of GPUs on a CPU: cuDNN's operations, and a kernel in Triton's interpreter."""

import torch

from lighthouse.cpu_flash import cpu_backward, cpu_forward
from lighthouse.cudnn import cudnn_backward, cudnn_forward
from lighthouse.implementation import kernels

# Forward and backward of the attentions that rings run on GPUs.
ATTENTIONS = {
    "cudnn": (cudnn_forward, cudnn_backward),
    "kernel": (kernels.dense_forward, kernels.dense_backward),
}


def emulate_attention_of_gpus() -> None:
    """Run the operations of cuDNN on the CPU, by the CPU's attention.

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

    library.impl("_scaled_dot_product_cudnn_attention", cudnn, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    emulations.append(library)


emulations: list[torch.library.Library] = []
