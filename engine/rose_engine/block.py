"""Llama-like decoder layers on the CPU, written out, and the step through them: no autograd, no copies, nothing kept that backward does
not need.

    m = x + o(attention(q(n), k(n), v(n))),  n = norm(x);     y = m + down(silu(gate(n')) * up(n')),  n' = norm(m)

Of weights that are spread over ranks each rank has the outputs of q, k, v, gate and up that it holds, and o, down and the gradients in n
and n' are sums over ranks. The residual stream is float32 and the matrix products are in the weights' dtype. Of each layer x, m, q, k, v,
gate and up are kept, in buffers that all steps share. The last layer runs only for the tokens whose output is read, and the first passes
its gradient only to the tokens that ask. What the layers compute is the library's: `block_of` takes a layer only where it is one of
those written out here, and everything else is run by the library (`forward.run_layers`).

Where csrc's products serve (`products_`), the bits do not depend on the number of threads, nor in float32 on whether the weights are whole
or spread over two ranks: what two ranks would each sum is summed in two parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rose_engine.sharding import Sharding, local, sharding_between
from rose_kernels.layer import (
    DTYPES,
    WIDTH,
    Layout,
    attention,
    attention_backward,
    available,
    products_,
    rms_norm,
    rms_norm_backward_,
    rotate_,
    swiglu,
    swiglu_backward_,
)

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
# Where the hooks come from that make a projection with spread weights give what it gave before; their work is done here.
SPREADING = "torch.distributed.tensor._api"
# Where the hooks come from that read what a projection is given; `run` gives it to them.
READING = "rose_engine.keys"
# Parts in which whole weights sum over what may be spread.
PARTS = 2


@dataclass(frozen=True)
class Block:
    """A decoder layer's parts. head: the norms of a head's queries and keys, where the family has them. heads_over, mlp_over: the ranks
    that the heads and the MLP are spread over, None where they are whole."""

    attention: nn.Module
    mlp: nn.Module
    before_attention: nn.Module
    before_mlp: nn.Module
    head: tuple[nn.Module, nn.Module] | None
    heads_over: Sharding | None
    mlp_over: Sharding | None


def block_of(layer: nn.Module) -> Block | None:
    """The parts of a layer, or None where the library has to run it: another family, another dtype, an adapter or a hook in it.

    Hooks of spread weights and of readers do not count; readers are given their keys by `run` alone.
    """
    if type(layer).__name__ not in LAYERS or any(_changed(m) for m in layer.modules()):
        return None
    a, mlp = layer.self_attn, layer.mlp
    if not all(type(m).__module__.startswith("transformers.models.") for m in (layer, a, mlp)):
        return None
    linear = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    parameters = list(layer.parameters())
    dtypes = {p.dtype for p in parameters}
    if any(type(m) is not nn.Linear for m in linear) or len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return None
    if not all(available(p.device) and local(p).is_contiguous() for p in parameters) or mlp.config.hidden_act != "silu":
        return None
    if a.head_dim % (2 * WIDTH) or any(n % WIDTH for m in linear for n in m.weight.shape):
        return None
    try:
        heads_over, mlp_over = sharding_between(linear[:3], a.o_proj), sharding_between((mlp.gate_proj, mlp.up_proj), mlp.down_proj)
    except ValueError:
        return None
    # Parts of one size, and heads that stay whole.
    if any(over and (len(set(over.sizes)) > 1 or over.sizes[0] % WIDTH) for over in (heads_over, mlp_over)):
        return None
    if any(len(local(m.weight)) % a.head_dim for m in linear[:3]):
        return None
    head = (a.q_norm, a.k_norm) if hasattr(a, "q_norm") else None
    if not all(is_norm(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm, *(head or ()))):
        return None
    return Block(a, mlp, layer.input_layernorm, layer.post_attention_layernorm, head, heads_over, mlp_over)


def is_norm(module: nn.Module) -> bool:
    """Whether a norm is the one written out here."""
    if type(module).__name__ not in NORMS or _changed(module) or isinstance(module.weight, DTensor):
        return False
    return module.weight.dtype in DTYPES and len(module.weight) % WIDTH == 0


def _changed(module: nn.Module) -> bool:
    """Whether calling a module does something else than its class says."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    known = {READING, SPREADING} if isinstance(getattr(module, "weight", None), DTensor) else {READING}
    return any(_origin(hook) not in known for hook in hooks) or "forward" in vars(module)


def _origin(hook: Callable) -> str:
    """The module that a hook comes from; nothing where it does not say."""
    return getattr(hook, "__module__", "")


def norm_of(module: nn.Module) -> tuple[Tensor, float]:
    """A norm's weight and epsilon."""
    return module.weight, module.variance_epsilon


class Workspace:
    """Buffers that steps share, by layer and name."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._kept: dict[tuple[int, str], Tensor] = {}

    def take(self, layer: int, name: str, tokens: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[tokens, width] of the named buffer, of the weights' dtype unless told; it grows where it is too short."""
        kept = self._kept.get((layer, name))
        if kept is None or len(kept) < tokens:
            kept = self._kept[layer, name] = torch.empty(tokens, width, dtype=dtype or self._dtype)
        return kept[:tokens]


@dataclass(frozen=True)
class Kept:
    """What backward needs of a layer. rows: the tokens that were run behind the attention, None for all."""

    x: Tensor
    m: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    up: Tensor
    rows: Tensor | None


# Keys and values [M, KV, h] of the prefixes in one layer.
Past = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Context:
    """What all layers of a batch share: cosine and sine [N, h] float32 of its tokens, its suffixes, and of each layer the keys and values
    [M, KV, h] of the prefixes."""

    cosine: Tensor
    sine: Tensor
    layout: Layout
    past: Sequence[Past]


def forward(blocks: Sequence[Block], context: Context, x: Tensor, outputs: Tensor, space: Workspace) -> tuple[Tensor, list[Kept]]:
    """Hidden states [T, d] float32 of the tokens `outputs` after all layers, from x [N, d] float32, and what backward needs."""
    kept = []
    for i, (block, past) in enumerate(zip(blocks, context.past, strict=True)):
        x, saved = layer_forward(block, context, past, x, partial(space.take, i), outputs if i == len(blocks) - 1 else None)
        kept.append(saved)
    return x, kept


def backward(blocks: Sequence[Block], context: Context, kept: Sequence[Kept], grad: Tensor, inputs: Tensor) -> Tensor:
    """The gradient [B, d] float32 at the tokens `inputs` of the first layer's x, from grad [T, d] at the last layer's outputs.

    Overwrites grad and what was kept.
    """
    for i in reversed(range(len(blocks))):
        grad = layer_backward(blocks[i], context, context.past[i], kept[i], grad, inputs if i == 0 else None)
    return grad


def gradients(blocks: Sequence[Block], context: Context, kept: Sequence[Kept], grad: Tensor) -> Iterator[Tensor]:
    """The gradient [N, d] float32 at every token of each layer's x, from the last layer's to the first's; the next overwrites it.

    grad [T, d]: that at the last layer's outputs. Overwrites it and what was kept.
    """
    for i in reversed(range(len(blocks))):
        grad = layer_backward(blocks[i], context, context.past[i], kept[i], grad)
        yield grad


# attend(q, k, v): what each token of q [N, heads, h] is told by the keys and values [N, KV, h], and any others: [N, heads * h].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(block: Block, x: Tensor, cosine: Tensor, sine: Tensor, attend: Attend) -> Tensor:
    """Hidden states [N, d] after a layer of float32 weights, from x [N, d], under any attention."""
    y, kept = _forward(block, cosine, sine, attend, x, None, _fresh)
    for hook in block.mlp.down_proj._forward_pre_hooks.values():
        if _origin(hook) == READING:
            hook(block.mlp.down_proj, (key_of(kept)[None],))
    return y


def _fresh(name: str, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(tokens, width, dtype=dtype)


def _forward(
    block: Block, cosine: Tensor, sine: Tensor, attend: Attend, x: Tensor, rows: Tensor | None, take: Callable[..., Tensor]
) -> tuple[Tensor, Kept]:
    a, mlp, N = block.attention, block.mlp, len(x)
    n = rms_norm(x, *norm_of(block.before_attention))
    q, k, v = _linear(n, (a.q_proj, a.k_proj, a.v_proj), [take(name, N, width) for name, width in zip("qkv", _widths(a), strict=True)])
    mixed = attend(*_turn(block, cosine, sine, q, k), v.view(N, -1, a.head_dim))
    before, mixed = (x, mixed) if rows is None else (x[rows], mixed[rows])
    m = _add_linear(before, mixed, a.o_proj, take("m", *before.shape, dtype=torch.float32), block.heads_over)
    n = rms_norm(m, *norm_of(block.before_mlp))
    gate, up = _linear(n, (mlp.gate_proj, mlp.up_proj), [take(name, len(m), len(local(mlp.gate_proj.weight))) for name in ("gate", "up")])
    y = _add_linear(m, swiglu(gate, up), mlp.down_proj, take("y", *m.shape, dtype=torch.float32), block.mlp_over)
    return y, Kept(x, m, q, k, v, gate, up, rows)


def layer_forward(
    block: Block, context: Context, past: Past, x: Tensor, take: Callable[..., Tensor], outputs: Tensor | None = None
) -> tuple[Tensor, Kept]:
    """Hidden states [T, d] float32 of the tokens `outputs` (None: of all) after one layer, from x [N, d] float32, and what backward needs.

    take(name, tokens, width): a buffer.
    """
    attend = partial(_over_suffixes, past=past, layout=context.layout, scale=block.attention.scaling)
    return _forward(block, context.cosine, context.sine, attend, x, outputs, take)


def key_of(kept: Kept) -> Tensor:
    """What a layer's `down_proj` was given [T, d_in], of the weights' dtype; a rank's part of it."""
    return swiglu(kept.gate, kept.up)


def layer_backward(
    block: Block, context: Context, past: Past, kept: Kept, grad: Tensor, inputs: Tensor | None = None, key: Tensor | None = None
) -> Tensor:
    """The gradient [B, d] float32 at the tokens `inputs` (None: at all) of a layer's x, from grad [T, d] at its outputs.

    key [T, d_in]: a gradient in what `down_proj` was given, beside it. Overwrites grad and what was kept.
    """
    a, mlp, N = block.attention, block.mlp, len(kept.q)
    dh = torch.empty_like(kept.gate)
    products_(grad, [local(mlp.down_proj.weight)], [dh], turned=False)
    if key is not None:
        dh += key
    swiglu_backward_(dh, kept.gate, kept.up)
    dn = _through((kept.gate, kept.up), (mlp.gate_proj, mlp.up_proj), block.mlp_over)
    rms_norm_backward_(grad, dn, kept.m, *norm_of(block.before_mlp))
    x = kept.x
    if kept.rows is not None:
        grad = grad.new_zeros(N, grad.shape[1]).index_add_(0, kept.rows, grad)
    mixed = torch.empty_like(kept.q)
    products_(grad, [local(a.o_proj.weight)], [mixed], turned=False)
    heads = lambda x: x.view(N, -1, a.head_dim)  # noqa: E731
    q, k = heads(kept.q), heads(kept.k)  # turned in place already, but where norms stand between
    if block.head is not None:
        q, k = _turn(block, context.cosine, context.sine, kept.q, kept.k)
    dq, dk, dv = attention_backward(heads(mixed), q, k, heads(kept.v), *past, context.layout, a.scaling)
    query_norm, key_norm = block.head or (None, None)
    dq, dk, dv = _turn_back(query_norm, context, dq, kept.q), _turn_back(key_norm, context, dk, kept.k), dv.view(N, -1)
    if inputs is not None:
        x, grad, dq, dk, dv = (t[inputs] for t in (x, grad, dq, dk, dv))
    dn = _through((dq, dk, dv), (a.q_proj, a.k_proj, a.v_proj), block.heads_over)
    return rms_norm_backward_(grad, dn, x, *norm_of(block.before_attention))


def _over_suffixes(q: Tensor, k: Tensor, v: Tensor, past: Past, layout: Layout, scale: float) -> Tensor:
    return attention(q, k, v, *past, layout, scale).view(len(q), -1)


def _widths(a: nn.Module) -> tuple[int, int, int]:
    q, k, v = (len(local(p.weight)) for p in (a.q_proj, a.k_proj, a.v_proj))
    return q, k, v


def _linear(x: Tensor, projections: Sequence[nn.Linear], out: Sequence[Tensor]) -> Sequence[Tensor]:
    products_(x, [local(p.weight) for p in projections], out, turned=True)
    for y, p in zip(out, projections, strict=True):
        if p.bias is not None:
            y += local(p.bias)
    return out


def _add_linear(x: Tensor, y: Tensor, projection: nn.Linear, out: Tensor, over: Sharding | None) -> Tensor:
    """x + projection(y) in float32."""
    weight = local(projection.weight)
    if over is None or over.rank == 0:
        out.copy_(x)
        products_(y, [weight], [out], turned=True, add=True, parts=PARTS if over is None else 1)
    else:
        products_(y, [weight], [out], turned=True)
    if over is not None:
        over.total_(out)
    return out if projection.bias is None else out.add_(local(projection.bias))


def _through(grads: Sequence[Tensor], projections: Sequence[nn.Linear], over: Sharding | None) -> Tensor:
    """The gradient [N, d] float32 in what several projections were given, from those in their outputs."""
    each = grads[0].new_empty(len(projections), len(grads[0]), projections[0].in_features, dtype=torch.float32)
    for grad, projection, out in zip(grads, projections, each, strict=True):
        products_(grad, [local(projection.weight)], [out], turned=False, parts=PARTS if over is None else 1)
    first, *others = each if over is None else over.total_(each)
    for other in others:
        first += other
    return first


def _turn(block: Block, cosine: Tensor, sine: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [N, heads, h] turned by their position; without norms of their own in place, else as copies."""
    q, k = (x.view(len(x), -1, block.attention.head_dim) for x in (q, k))
    if block.head is not None:
        q, k = (rms_norm(x.float(), *norm_of(norm)) for norm, x in zip(block.head, (q, k), strict=True))
    return rotate_(q, cosine, sine), rotate_(k, cosine, sine)


def _turn_back(norm: nn.Module | None, context: Context, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient [N, heads * h] in what `_turn` was given, from that in what it returned."""
    rotate_(grad, context.cosine, context.sine, backward=True)
    if norm is not None:
        given = x.view(grad.shape).float()
        grad = rms_norm_backward_(torch.zeros_like(given), grad.float(), given, *norm_of(norm)).to(grad.dtype)
    return grad.view(len(x), -1)
