"""PyTorch in the place of flash attention, which has no window on a CPU."""

import itertools
import math

import pytest
import torch

# It registers torch's flash attention by name, and torch imports it late: it would find a stand-in.
import torch.utils.flop_counter  # noqa: F401
from torch.nn.functional import pad

NAN = float("nan")


def replace_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the functions of this file in the place of torch's."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_in_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", stand_in_backward)


def sequences(queries, keys, longest_queries, longest_keys):
    """The rows of each sequence that has queries; the others have no gradient either."""
    assert queries.dtype == keys.dtype == torch.int32
    bounds = zip(*(itertools.pairwise(x.tolist()) for x in (queries, keys)), strict=True)
    for (first, end), (first_key, end_key) in bounds:
        assert 0 <= end - first <= longest_queries and 0 <= end_key - first_key <= longest_keys
        if end > first:
            yield slice(first, end), slice(first_key, end_key)


def all_pairs(q, k, v, scale):
    """Every query sees every key; without keys, out is zero and lse infinite, as flash has it."""
    if not k.shape[1]:
        return torch.zeros_like(q), q.new_full((len(q), q.shape[2], q.shape[1]), math.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    return (scores.softmax(dim=-1) @ v).transpose(1, 2), scores.logsumexp(dim=-1)


def gradients_of_all_pairs(dout, q, k, v, out, lse, scale):
    """Gradients by an output and a logsumexp that may be over more keys."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    weights = (q @ keys.mT * scale - lse.unsqueeze(-1)).exp()
    scores = weights * (dout @ values.mT - (dout * out).sum(dim=-1, keepdim=True)) * scale
    grads = scores @ keys, scores.mT @ q, weights.mT @ dout
    dk, dv = (x.unflatten(1, (-1, group)).sum(dim=2) for x in grads[1:])
    return [x.transpose(1, 2) for x in (grads[0], dk, dv)]


def stand_in_forward(q, k, v, _q, _k, max_q, max_k, dropout, is_causal, debug, *, scale,
                     window_size_left, window_size_right):  # fmt: skip
    """flash attention's forward as its schema has it, in PyTorch: rows [B, N, H, D].

    With lengths it takes joined rows [R, H, D], and what belongs to no sequence is not a number.
    """
    options = {"scale": scale, "window_size_left": window_size_left}
    options["window_size_right"] = window_size_right
    if _q is not None:
        out, lse = torch.full_like(q, NAN), torch.full(q.shape[1::-1], NAN)
        assert len(_q) == len(_k) and k.shape == v.shape
        for own, keys in sequences(_q, _k, max_q, max_k):
            x = (q[None, own], k[None, keys], v[None, keys])
            sizes = x[0].shape[1], x[1].shape[1]
            found = stand_in_forward(*x, None, None, *sizes, dropout, is_causal, debug, **options)
            out[own], lse[:, own] = found[0][0], found[1][0]
        return out, lse, None, None, None
    assert (max_q, max_k, dropout) == (q.shape[1], k.shape[1], 0)
    if not is_causal:
        assert window_size_left == window_size_right == -1
        out, lse = all_pairs(q, k, v, scale)
        return out, lse, None, None, None
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
    if _q is not None:
        grads = [torch.full_like(x, NAN) for x in (q, k, v)]
        options = {"scale": scale, "window_size_left": window_size_left}
        options["window_size_right"] = window_size_right
        assert lse.is_contiguous() and lse.shape == q.shape[1::-1]
        for own, keys in sequences(_q, _k, max_q, max_k):
            x = (dout[None, own], q[None, own], k[None, keys], v[None, keys], out[None, own])
            sizes = x[1].shape[1], x[2].shape[1]
            lse_of_one = lse[None, :, own].contiguous()
            found = stand_in_backward(*x, lse_of_one, None, None, *sizes, dropout, is_causal,
                                      state, unused, **options)  # fmt: skip
            for grad, rows, part in zip(grads, (own, keys, keys), found, strict=True):
                grad[rows] = part[0]
        return grads
    if not is_causal:
        assert window_size_left == window_size_right == -1
        return gradients_of_all_pairs(dout, q, k, v, out, lse, scale)
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
