"""PyTorch in the place of flash attention, which has no window on a CPU."""

import math

import torch
from torch.nn.functional import pad


def stand_in_forward(q, k, v, _q, _k, max_q, max_k, dropout, is_causal, debug, *, scale,
                     window_size_left, window_size_right):  # fmt: skip
    """flash attention's forward as its schema has it, in PyTorch: rows [B, N, H, D]."""
    assert (max_q, max_k, dropout, is_causal) == (q.shape[1], k.shape[1], 0, True)
    assert window_size_right == 0
    size = max_k if window_size_left < 0 else window_size_left + 1
    # Keys before the first query get queries whose outputs nobody reads.
    more = max_k - max_q
    q = pad(q, (0, 0, 0, 0, more, 0))
    rows = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out, lse = torch.ops.lighthouse.window(*rows, size, scale)
    return out[:, :, more:].transpose(1, 2), lse[:, :, more:], None, None, None


def stand_in_backward(dout, q, k, v, out, lse, _q, _k, max_q, max_k, dropout, is_causal, state,
                      unused, *, scale, window_size_left, window_size_right):  # fmt: skip
    """flash attention's backward, which takes no gradient of the logsumexp."""
    # Dense attention, which has no limit to the left, repeats its bits where a user asks for that.
    repeats = torch.get_deterministic_debug_mode() == 2
    assert repeats or window_size_left < 0
    assert torch.utils.deterministic.fill_uninitialized_memory != repeats
    assert (max_q, max_k, dropout, is_causal) == (q.shape[1], k.shape[1], 0, True)
    assert window_size_right == 0 and lse.is_contiguous()
    size = max_k if window_size_left < 0 else window_size_left + 1
    # Keys before the first query get queries that weigh nothing.
    more = max_k - max_q
    dout, q, out = (pad(x, (0, 0, 0, 0, more, 0)) for x in (dout, q, out))
    lse = pad(lse, (more, 0), value=math.inf)
    rows = [x.transpose(1, 2).contiguous() for x in (dout, q, k, v, out)]
    grads = torch.ops.lighthouse.window_backward(rows[0], None, *rows[1:], lse, size, scale)
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq[:, more:], dk, dv
