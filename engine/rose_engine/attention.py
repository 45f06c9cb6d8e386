"""Attention over packed tokens, by the library: how the engine's layouts reach the model's own attention layers.

transformers' `AttentionInterface` lets a decoder layer call a function of ours in place of its attention core; the layer's attention mask
reaches it in every family, and so the layout travels as the mask. Four layouts exist: `TreeAttention` for a prefix tree,
`SuffixAttention` for suffixes over cached prefixes, `VarlenAttention` for the same by FlashAttention, without padding, and
`GrowingAttention` for rows that are continued token by token. Queries, keys and values arrive as [1, heads, N, head_dim], and the core
runs in float32 on the CPU, where PyTorch's attention is slow in narrower types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from rose_engine.packing import Suffixes, Tree

NAME = "rose"
# Nodes of a tree that `TreeAttention` asks at one time.
QUERY_BLOCK = 256
# That several heads of queries share a head of keys has to be said from PyTorch 2.12 on.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """softmax(cap(scaling q k^T) + mask) v [B, H, Q, h] for q [B, H, Q, h] and k, v [B, KV, K, h]; mask [Q, K] or [B, 1, Q, K] boolean,
    true where allowed.

    The query heads that share a key head are laid along the query axis, so grouped-query attention repeats no keys. cap(x) = softcap
    tanh(x / softcap), which PyTorch's fused attention does not know, or x.
    """
    shape, group = q.shape[:-1], q.shape[1] // k.shape[1]
    q = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
    mask = mask.repeat(*[1] * (mask.dim() - 2), group, 1)
    if softcap is not None:
        scores = softcap * torch.tanh(scaling / softcap * (q @ k.transpose(-1, -2)))
        out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(*shape, v.shape[-1])


def _core_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x.dtype


class TreeAttention:
    """Each node of the tree attends to itself and its ancestors. Keeps keys and values of the layers in `keep`.

    nodes [N]: the tree's nodes that are run, in order; they hold every ancestor of each of them.
    keys, values: layer -> [N, KV, h], for `SuffixAttention`.
    A block of nodes in order sees nothing but itself and the ancestors of its first node, and is given no other keys.
    """

    def __init__(self, tree: Tree, nodes: Tensor, keep: range = range(0)):
        self.keep = keep
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.blocks: list[tuple[slice, slice | Tensor, Tensor]] = []  # queries, their keys, and which query sees which of these
        node, end, place = nodes.cpu(), tree.end[nodes].cpu(), torch.arange(len(nodes))  # on the host: no wait for every block
        for start in range(0, len(nodes), QUERY_BLOCK):
            asked = slice(start, start + QUERY_BLOCK)
            seen = torch.cat([(end[:start] > node[start]).nonzero()[:, 0], place[asked]])
            asker = node[asked, None]
            mask = (node[seen] <= asker) & (asker < end[seen])
            self.blocks.append((asked, seen.to(nodes.device) if start else asked, mask.to(nodes.device)))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None) -> Tensor:
        if layer in self.keep:
            self.keys[layer], self.values[layer] = k[0].transpose(0, 1).contiguous(), v[0].transpose(0, 1).contiguous()
        dtype = _core_dtype(q)
        k, v = k.to(dtype), v.to(dtype)
        out = [_core(q[:, :, asked].to(dtype), k[:, :, seen], v[:, :, seen], mask, scaling, softcap) for asked, seen, mask in self.blocks]
        return torch.cat(out, dim=2).transpose(1, 2).to(q.dtype)


class GrowingAttention:
    """Rows of a tree continued, a token each at a time: a token attends to what `seen` says of the tree's nodes and of all tokens so far.

    prefix: has kept the keys and values of all layers that are run. seen [R, nodes + tokens so far]: boolean, to be set before every step.
    """

    def __init__(self, prefix: TreeAttention):
        core = lambda x: x.to(_core_dtype(x)).transpose(0, 1)[None]  # noqa: E731  [1, KV, nodes, h]
        self.past = {layer: (core(prefix.keys[layer]), core(prefix.values[layer])) for layer in prefix.keys}
        self.seen: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None) -> Tensor:
        dtype = _core_dtype(q)
        k, v = (torch.cat([past, new.to(dtype)], dim=2) for past, new in zip(self.past[layer], (k, v), strict=True))
        self.past[layer] = k, v
        return _core(q.to(dtype), k, v, self.seen, scaling, softcap).transpose(1, 2).to(q.dtype)


class SuffixAttention:
    """The tokens of each suffix attend to their row's cached prefix and, causally, to the suffix itself.

    The prefixes' keys and values stay in the tree, once for all rows that share them, and are gathered layer by layer.
    """

    def __init__(self, suffixes: Suffixes, tree: TreeAttention, tree_place: Tensor):
        s = suffixes
        self.suffixes, self.tree = s, tree
        self.place = tree_place[s.prefix]
        column = torch.arange(s.prefix.shape[1], device=s.node.device)
        query = torch.arange(s.pad.shape[1], device=s.node.device)
        seen = (column < s.prefix_length[:, None])[:, None, :].expand(-1, len(query), -1)
        causal = (query[None, :] <= query[:, None]).expand(len(s.row), -1, -1)
        self.mask = torch.cat([seen, causal], dim=2)[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None) -> Tensor:
        s, dtype = self.suffixes, _core_dtype(q)
        spread = lambda x: x[0][:, s.pad].transpose(0, 1).to(dtype)  # noqa: E731  [B, heads, longest, h]
        past = lambda x: x[self.place].transpose(1, 2).to(dtype)  # noqa: E731  [B, KV, longest prefix, h]
        keys = torch.cat([past(self.tree.keys[layer]), spread(k)], dim=2)
        values = torch.cat([past(self.tree.values[layer]), spread(v)], dim=2)
        out = _core(spread(q), keys, values, self.mask, scaling, softcap).transpose(1, 2).flatten(0, 1)[s.flat]
        return out[None].to(q.dtype)


class _Placed(torch.autograd.Function):
    """x [N, KV, h] at its places in a buffer [places, KV, h] that is written into; the gradient is that of those places."""

    @staticmethod
    def forward(ctx, x: Tensor, buffer: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return buffer.index_copy_(0, place, x).detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


@dataclass(frozen=True)
class VarlenAttention:
    """The tokens of each row attend to its prefix and, causally, to its suffix: packed queries against keys that stand row by row, a row's
    prefix before its suffix. Nothing is padded, and a call copies no prefix.

    keys, values: layer -> [places, KV, h], buffers in which the prefixes stand already. place [N] int64: where each token's key and value
    are put. query_offset, key_offset [rows + 1] int32: where each row's queries and keys begin, and the end. longest_query, longest_key:
    no row has more.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    place: Tensor
    query_offset: Tensor
    key_offset: Tensor
    longest_query: int
    longest_key: int

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        keys, values = _Placed.apply(k, self.keys[layer], self.place), _Placed.apply(v, self.values[layer], self.place)
        offsets, longest = (self.query_offset, self.key_offset), (self.longest_query, self.longest_key)
        return varlen_attn(q, keys, values, *offsets, *longest, scale=scaling, window_size=(-1, 0), **GROUPED)[None]


def _attend(module: nn.Module, query, key, value, attention_mask, scaling, softcap=None, **kwargs):
    return attention_mask(module.layer_idx, query, key, value, scaling, softcap), None


AttentionInterface.register(NAME, _attend)


@contextmanager
def attention_of(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's attention layers call the engine's layouts; afterwards what they called before."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
