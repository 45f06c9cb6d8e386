"""Loss and hidden gradient at target tokens, the vocabulary in chunks (method.md section 1).

    nll[t]       = lse[t] - cap(h_t . w_target),    lse[t] = log sum_v exp cap(h_t . w_v),    cap(x) = softcap tanh(x / softcap), or x
    grad_hidden  = sum_v grad_nll[t] (softmax_v - [v = target]) cap'(h_t . w_v) w_v

Forward: each program walks a stretch of the vocabulary with a running maximum and sum (online log-sum-exp) and keeps no logits; a second
kernel joins the stretches. Backward: a chunk of the vocabulary at a time, one kernel recomputes the logits and writes
their gradient, and a library matrix product takes it to `hidden`. Products are accumulated in float32 (a chunk's part of the gradient
is rounded to the dtype of `hidden` before it is added in float32); no more than a
[T, CHUNK] piece of anything as wide as the vocabulary exists. Definition: `reference.target_nll`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rose_kernels import reference
from rose_kernels.backend import interpreted, jit, on_device, serving, tl, triton
from rose_kernels.contract import FLOATS, INTEGERS, check, check_index

BLOCK_T, BLOCK_V, BLOCK_D = 32, 128, 64
STRETCHES = 264  # parallel stretches of the vocabulary: two for each multiprocessor of an H100 or H200
CHUNK = 16_384  # columns of logit gradients that exist at one time


@jit
def logits_tile(
    hidden, head, rows, words, T, V, d, softcap,
    CAP: tl.constexpr, WIDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """cap(hidden[rows] @ head[words]^T) in float32 [BLOCK_T, BLOCK_V], and tanh's square for its derivative."""
    lanes = tl.arange(0, BLOCK_D)
    h = hidden + rows.to(tl.int64)[:, None] * d + lanes[None, :]
    w = head + words.to(tl.int64)[None, :] * d + lanes[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, d, BLOCK_D):
        inside = start + lanes < d
        a = tl.load(h + start, (rows < T)[:, None] & inside[None, :], 0.0)
        b = tl.load(w + start, inside[:, None] & (words < V)[None, :], 0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    squared = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if CAP:
        bent = 2 / (1 + tl.exp(-2 * acc / softcap)) - 1  # tanh
        squared = bent * bent
        acc = softcap * bent
    return acc, squared


@jit
def forward_kernel(
    hidden, head, target, part_max, part_sum, chosen, T, V, d, softcap, stretch,
    CAP: tl.constexpr, WIDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows i * BLOCK_T and on, words j * stretch and on: maximum and sum of exponentials, and the target's logit."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * stretch
    wanted = tl.load(target + rows, rows < T, -1)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for start in range(first, tl.minimum(first + stretch, V), BLOCK_V):
        words = start + tl.arange(0, BLOCK_V)
        scores, _ = logits_tile(hidden, head, rows, words, T, V, d, softcap, CAP, WIDEN, BLOCK_T, BLOCK_V, BLOCK_D)
        hit = words[None, :] == wanted[:, None]
        found = tl.sum(tl.where(hit, scores, 0.0), 1)
        tl.store(chosen + rows, found, (rows < T) & (wanted >= start) & (wanted < start + BLOCK_V))
        scores = tl.where((words < V)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(scores - larger[:, None]), 1)
        largest = larger
    place = tl.program_id(1).to(tl.int64) * T + rows
    tl.store(part_max + place, largest, rows < T)
    tl.store(part_sum + place, total, rows < T)


@jit
def join_kernel(part_max, part_sum, chosen, lse, nll, T, stretches, BLOCK_T: tl.constexpr):
    """Program i: join the stretches of BLOCK_T rows, in order."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for j in range(stretches):
        m = tl.load(part_max + j * T + rows, rows < T, 0.0)
        larger = tl.maximum(largest, m)
        total = total * tl.exp(largest - larger) + tl.load(part_sum + j * T + rows, rows < T, 1.0) * tl.exp(m - larger)
        largest = larger
    out = largest + tl.log(total)
    tl.store(lse + rows, out, rows < T)
    tl.store(nll + rows, out - tl.load(chosen + rows, rows < T, 0.0), rows < T)


@jit
def backward_kernel(
    hidden, head, target, lse, grad_nll, grad_logits, T, V, d, softcap, first, width,
    CAP: tl.constexpr, WIDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (j, i): the gradient of the logits of words first + j * BLOCK_V and on, rows i * BLOCK_T and on.

    Rows run fastest, so that the programs that read one piece of the head follow each other and share it in the cache.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    words = first + local
    scores, squared = logits_tile(hidden, head, rows, words, T, V, d, softcap, CAP, WIDEN, BLOCK_T, BLOCK_V, BLOCK_D)
    share = tl.exp(scores - tl.load(lse + rows, rows < T, 0.0)[:, None])
    share -= (words[None, :] == tl.load(target + rows, rows < T, -1)[:, None]).to(tl.float32)
    share *= tl.load(grad_nll + rows, rows < T, 0.0)[:, None]
    if CAP:
        share *= 1 - squared
    place = grad_logits + rows.to(tl.int64)[:, None] * width + local[None, :]
    tl.store(place, share.to(grad_logits.dtype.element_ty), (rows < T)[:, None] & (local < width)[None, :])


def _check(hidden: Tensor, head: Tensor, target: Tensor, softcap: float | None) -> None:
    check("hidden", hidden, (None, None), FLOATS)
    check("head", head, (None, hidden.shape[1]), (hidden.dtype,), hidden)
    check("target", target, (len(hidden),), INTEGERS, hidden)
    check_index("target", target, len(head))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, given {softcap}")


def _blocks(softcap: float | None) -> dict[str, int | bool]:
    # The interpreter multiplies bfloat16 bit patterns as integers, so there the operands are widened first.
    return {"CAP": softcap is not None, "WIDEN": interpreted(), "BLOCK_T": BLOCK_T, "BLOCK_V": BLOCK_V, "BLOCK_D": BLOCK_D}


@torch.library.custom_op("rose::target_nll_lse", mutates_args=())
def target_nll_lse(hidden: Tensor, head: Tensor, target: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """(nll [T], lse [T]) float32: the loss of `target_nll` and the log-sum-exp that its backward starts from."""
    if serving(hidden.device, "target_nll") == "reference":
        scores = reference.capped_logits(hidden, head, softcap)
        lse = scores.logsumexp(-1)
        return lse - scores.gather(1, target.long()[:, None])[:, 0], lse
    _check(hidden, head, target, softcap)
    (T, d), V = hidden.shape, len(head)
    stretch = triton.cdiv(triton.cdiv(V, STRETCHES), BLOCK_V) * BLOCK_V
    stretches = triton.cdiv(V, stretch)
    part_max, part_sum = hidden.new_empty(2, stretches, T, dtype=torch.float32)
    chosen, lse, nll = hidden.new_empty(3, T, dtype=torch.float32)
    if T:
        with on_device(hidden):
            forward_kernel[(triton.cdiv(T, BLOCK_T), stretches)](
                hidden, head, target, part_max, part_sum, chosen, T, V, d, softcap or 1.0, stretch, **_blocks(softcap)
            )
            join_kernel[(triton.cdiv(T, BLOCK_T),)](part_max, part_sum, chosen, lse, nll, T, stretches, BLOCK_T=BLOCK_T)
    return nll.clone(), lse.clone()


@torch.library.custom_op("rose::target_nll_backward", mutates_args=())
def target_nll_backward(
    grad_nll: Tensor, hidden: Tensor, head: Tensor, target: Tensor, lse: Tensor, softcap: float | None = None
) -> Tensor:
    """The gradient [T, d] in `hidden`, in its dtype, from grad_nll [T] and the forward's lse [T]."""
    grad = hidden.new_zeros(hidden.shape, dtype=reference.wide_dtype(hidden))
    native = serving(hidden.device, "target_nll") == "triton"
    if native:
        _check(hidden, head, target, softcap)
        check("grad_nll", grad_nll, (len(hidden),), (torch.float32,), hidden)
        check("lse", lse, (len(hidden),), (torch.float32,), hidden)
    (T, d), V = hidden.shape, len(head)
    for first in range(0, V if T else 0, CHUNK):
        width = min(CHUNK, V - first)
        if native:
            piece = hidden.new_empty(T, width)
            grid = (triton.cdiv(T, BLOCK_T), triton.cdiv(width, BLOCK_V))
            backward_kernel[grid](hidden, head, target, lse, grad_nll, piece, T, V, d, softcap or 1.0, first, width, **_blocks(softcap))
        else:
            scores = reference.capped_logits(hidden, head[first : first + width], softcap)
            slope = 1.0 if softcap is None else 1 - (scores / softcap) ** 2
            share = (scores - lse[:, None]).exp_()
            local = target.long() - first
            here = ((local >= 0) & (local < width)).nonzero()[:, 0]
            share[here, local[here]] -= 1
            piece = (share * slope * grad_nll[:, None]).to(hidden.dtype)
        grad += piece @ head[first : first + width]
    return grad.to(hidden.dtype)


@target_nll_lse.register_fake
def _(hidden, head, target, softcap=None):
    nll = hidden.new_empty(hidden.shape[0], dtype=reference.wide_dtype(hidden))
    return nll, torch.empty_like(nll)


@target_nll_backward.register_fake
def _(grad_nll, hidden, head, target, lse, softcap=None):
    return torch.empty_like(hidden)


def _setup(ctx, inputs, output):
    hidden, head, target, ctx.softcap = inputs
    ctx.save_for_backward(hidden, head, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_nll, grad_lse):
    hidden, head, target, lse = ctx.saved_tensors
    return target_nll_backward(grad_nll.contiguous(), hidden, head, target, lse, ctx.softcap), None, None, None


target_nll_lse.register_autograd(_backward, setup_context=_setup)


def target_nll(hidden: Tensor, head: Tensor, target: Tensor, softcap: float | None = None) -> Tensor:
    """nll [T] float32 of one target token a row; differentiable in `hidden` alone.

    hidden [T, d] and head [V, d] of one dtype, target [T] integer. ValueError or IndexError names an argument that does not fit.
    """
    return target_nll_lse(hidden, head, target, softcap)[0]
