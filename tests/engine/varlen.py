"""The definition of `varlen_attn` with grouped heads and a causal window, and of its gradients, in float32: for where there is no GPU."""

from itertools import pairwise

import torch


def _rows(q, k, v, query_offset, key_offset):
    """Of each row of `varlen_attn` the slices of its queries and keys, and queries, keys, values [heads, n, h] and what sees what."""
    for (a, b), (c, e) in zip(pairwise(query_offset.tolist()), pairwise(key_offset.tolist()), strict=True):
        keys, values = (x[c:e].float().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (k, v))
        yield slice(a, b), slice(c, e), q[a:b].float().transpose(0, 1), keys, values, torch.ones(b - a, e - c).tril(e - c - b + a).bool()


def _shares(q, k, seen, scale):
    return (scale * q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf")).softmax(-1)


def varlen(q, k, v, query_offset, key_offset, scale):
    """Row by row: the last query sees all keys, each before it one less."""
    out = torch.full_like(q, torch.nan)
    for queries, _, row, keys, values, seen in _rows(q, k, v, query_offset, key_offset):
        out[queries] = (_shares(row, keys, seen, scale) @ values).transpose(0, 1).to(q.dtype)
    return out


def varlen_backward(grad, q, k, v, query_offset, key_offset, scale):
    """Gradients in q, k and v; those of keys that no row has are left as memory was."""
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    for queries, places, row, keys, values, seen in _rows(q, k, v, query_offset, key_offset):
        share, slope = _shares(row, keys, seen, scale), grad[queries].float().transpose(0, 1)
        inner = slope @ values.transpose(1, 2)
        inner = scale * share * (inner - (inner * share).sum(-1, keepdim=True))
        dq[queries] = (inner @ keys).transpose(0, 1).to(q.dtype)
        for out, x in ((dk, inner.transpose(1, 2) @ row), (dv, share.transpose(1, 2) @ slope)):
            out[places] = x.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1).to(k.dtype)
    return dq, dk, dv
