"""The parts of a Llama-like decoder layer between its matrix products, forward and backward, on the CPU (`csrc/layer.h`).

A packed token's residual stream and its gradient are float32; what enters a matrix product has the dtype of the weights, float32 or
bfloat16. Widths (hidden size, MLP size) are multiples of `WIDTH`, the head dimension of twice that. Nothing here is differentiable:
the backward passes are operators of their own, which `rose_engine.block` calls in their order. ValueError where shapes or dtypes do
not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rose_kernels.backend import serving
from rose_kernels.contract import check, check_index

WIDTH = 16
DTYPES = (torch.float32, torch.bfloat16)


def available(device: torch.device) -> bool:
    """Whether these operators serve tensors on a device: on the CPU, where csrc is built and `ROSE_BACKEND` asks for nothing else."""
    return device.type == "cpu" and serving(device, "add_low_rank_") == "csrc"


@dataclass(frozen=True)
class Layout:
    """B suffixes and the cached prefixes that they continue, all int64: start, length [B] in packed tokens; prefix [B, longest] rows of the
    cache, of which the first prefix_length [B] count."""

    start: Tensor
    length: Tensor
    prefix: Tensor
    prefix_length: Tensor

    def check(self, tokens: int, cached: int) -> None:
        """IndexError or ValueError unless every suffix lies within `tokens` and every prefix within `cached` rows."""
        B = len(self.start)
        for name, x, shape in (
            ("start", self.start, (B,)),
            ("length", self.length, (B,)),
            ("prefix", self.prefix, (B, None)),
            ("prefix_length", self.prefix_length, (B,)),
        ):
            check(name, x, shape, (torch.int64,))
        check_index("start", self.start, tokens)
        check_index("start + length", self.start + self.length, tokens + 1)
        check_index("prefix", self.prefix, max(1, cached))
        check_index("prefix_length", self.prefix_length, self.prefix.shape[1] + 1 if cached else 1)
        if (self.length < 1).any():
            raise ValueError("a suffix has at least one token")


def products_(a: Tensor, w: Sequence[Tensor], out: Sequence[Tensor], *, turned: bool, add: bool = False, parts: int = 1) -> None:
    """out[i] = a w[i]^T where turned, for w[i] [columns, depth] as a linear layer has it, else a w[i] for w[i] [depth, columns].

    add: onto what out[i] holds. parts: where all of out is float32, each of so many equal parts of the depth is summed by itself, and one
    is added after the other; a depth that does not divide so in multiples of `WIDTH`, in bfloat16 twice that, is one part. By
    `csrc/matmul.h` these are the bits of processes that have a part of up to 16,384 words each and add up in this order.
    a [N, depth] and out[i] [N, columns] float32 or of the dtype of w, float32 or bfloat16. Weights are read in place, by
    `csrc/matmul.h` where the machine has AVX-512, in bfloat16 AVX512-BF16 and no AMX, which rounds nothing but `out`; else by PyTorch, in
    one part, which rounds sums to the weights' dtype.
    """
    if parts < 1:
        raise ValueError(f"parts must be at least 1, given {parts}")
    for weight, to in zip(w, out, strict=True):
        check("w", weight, (None, a.shape[1]) if turned else (a.shape[1], None), DTYPES)
        check("out", to, (len(a), weight.shape[0 if turned else 1]), (torch.float32, weight.dtype))
        check("a", a, tuple(a.shape), (torch.float32, weight.dtype))
        if weight.dtype != w[0].dtype or any(not n or n % WIDTH for n in weight.shape):
            raise ValueError(f"weights must be of one dtype and in multiples of {WIDTH}, given {weight.dtype} {list(weight.shape)}")
    if _serves(w[0]):
        torch.ops.rose_native.products(a, list(w), list(out), turned, add, parts)
        return
    for weight, to in zip(w, out, strict=True):
        left, right = a.to(weight.dtype), weight.T if turned else weight
        if to.dtype == weight.dtype:
            to.addmm_(left, right, beta=float(add))
        elif add:
            to.add_(left @ right)
        else:
            to.copy_(left @ right)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in the dtype of weight [width]; x [..., width] float32."""
    _check_rows(x, weight)
    return torch.ops.rose_native.rms_norm(x, weight, eps)


def rms_norm_backward_(grad: Tensor, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """grad += the gradient in x of <dy, rms_norm(x)>, in place; grad and dy float32, shaped like x."""
    _check_rows(x, weight)
    check("grad", grad, tuple(x.shape), (torch.float32,))
    check("dy", dy, tuple(x.shape), (torch.float32,))
    torch.ops.rose_native.rms_norm_backward(grad, dy, x, weight, eps)
    return grad


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; float32 or bfloat16."""
    _check_like("up", up, gate)
    return torch.ops.rose_native.swiglu(gate, up)


def swiglu_backward_(dy: Tensor, gate: Tensor, up: Tensor) -> None:
    """gate and up become the gradients of <dy, swiglu(gate, up)> in them."""
    _check_like("up", up, gate)
    _check_like("dy", dy, gate)
    torch.ops.rose_native.swiglu_backward(dy, gate, up)


def rotate_(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool = False) -> Tensor:
    """Rotary embedding in place: x cos + (-x2, x1) sin, x1 and x2 the halves of a head; backward applies the transpose.

    x [N, heads, h] float32 or bfloat16, cosine and sine [N, h] float32.
    """
    check("x", x, (None, None, None), DTYPES)
    for name, table in (("cosine", cosine), ("sine", sine)):
        check(name, table, (x.shape[0], x.shape[2]), (torch.float32,))
    _check_width(x.shape[2] // 2)
    torch.ops.rose_native.rotate(x, cosine, sine, backward)
    return x


def attention(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, layout: Layout, scale: float) -> Tensor:
    """softmax(scale q k^T) v of each suffix over its prefix and, causally, itself; scores in float32.

    q [N, heads, h]; k, v [N, kv, h]; past_k, past_v [M, kv, h], all of one dtype; returns [N, heads, h]. `layout` must have passed its
    `check` for N and M, and every packed token must lie in a suffix.
    """
    _check_heads(q, k, v, past_k, past_v)
    return torch.ops.rose_native.attention(q, k, v, past_k, past_v, layout.start, layout.length, layout.prefix, layout.prefix_length, scale)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of <dout, attention(q, k, v, ...)> in q, k and v; what is cached takes none."""
    _check_heads(q, k, v, past_k, past_v)
    _check_like("dout", dout, q)
    return torch.ops.rose_native.attention_backward(
        dout, q, k, v, past_k, past_v, layout.start, layout.length, layout.prefix, layout.prefix_length, scale
    )


def _serves(weight: Tensor) -> bool:
    return torch.ops.rose_native.products_serve(weight)


def _check_rows(x: Tensor, weight: Tensor) -> None:
    check("weight", weight, (x.shape[-1],), DTYPES)
    check("x", x, tuple(x.shape), (torch.float32,))
    _check_width(x.shape[-1])


def _check_like(name: str, x: Tensor, like: Tensor) -> None:
    check(name, x, tuple(like.shape), (like.dtype,))
    check("the first argument", like, tuple(like.shape), DTYPES)
    _check_width(like.shape[-1])


def _check_heads(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> None:
    check("q", q, (None, None, None), DTYPES)
    check("k", k, (len(q), None, q.shape[2]), (q.dtype,))
    check("v", v, tuple(k.shape), (q.dtype,))
    check("past_k", past_k, (None, *k.shape[1:]), (q.dtype,))
    check("past_v", past_v, tuple(past_k.shape), (q.dtype,))
    _check_width(q.shape[2])
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")


def _check_width(width: int) -> None:
    if not width or width % WIDTH:
        raise ValueError(f"the last dimension must be a multiple of {WIDTH}, given {width}")
