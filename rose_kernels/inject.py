"""Multi-template injection (method.md section 1): every form of every subject gets its subject's delta, in one launch.

    out[token[b]] = hidden[token[b]] + delta[subject[b]]      for every row b
    row gradient  = grad_out[token[b]]                        [B, d] float32, kept per row for the gradient tree (eq. 11)

hidden [N, d] float32, bfloat16 or float16; delta [S, d] float32; token, subject [B] integer; a token belongs to one row. The sum is
carried out in float32 and rounded once. Definition: `reference.inject`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rose_kernels import reference
from rose_kernels.backend import jit, on_device, serving, tl, triton
from rose_kernels.contract import FLOATS, INTEGERS, check, check_index

BLOCK = 1024  # features a program: 8 a thread for 4 warps: 16-byte accesses in bfloat16


@jit
def inject_kernel(out, delta, token, subject, d, BLOCK: tl.constexpr):
    """Program (b, i): row b, features i * BLOCK and on; adds in place."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    place = out + tl.load(token + row).to(tl.int64) * d + column
    change = tl.load(delta + tl.load(subject + row).to(tl.int64) * d + column, inside)
    tl.store(place, (tl.load(place, inside).to(tl.float32) + change).to(out.dtype.element_ty), inside)


@jit
def gather_kernel(grad_out, token, row_grad, d, BLOCK: tl.constexpr):
    """Program (b, i): the gradient at row b's token, widened to float32."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    source = grad_out + tl.load(token + row).to(tl.int64) * d + column
    tl.store(row_grad + row.to(tl.int64) * d + column, tl.load(source, inside).to(tl.float32), inside)


@jit
def scatter_kernel(grad_out, token, subject, grad_delta, rows, d, BLOCK: tl.constexpr):
    """Program (s, i): the sum of subject s's row gradients, in row order, so that it is the same bits every time."""
    owner = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        if tl.load(subject + row) == owner:
            total += tl.load(grad_out + tl.load(token + row).to(tl.int64) * d + column, inside, 0.0).to(tl.float32)
    tl.store(grad_delta + owner.to(tl.int64) * d + column, total, inside)


def _check(hidden: Tensor, delta: Tensor, token: Tensor, subject: Tensor) -> None:
    check("hidden", hidden, (None, None), FLOATS)
    check("delta", delta, (None, hidden.shape[1]), (torch.float32,), hidden)
    check("token", token, (None,), INTEGERS, hidden)
    check("subject", subject, (len(token),), INTEGERS, hidden)
    check_index("token", token, len(hidden))
    check_index("subject", subject, len(delta))


def _add_(out: Tensor, delta: Tensor, token: Tensor, subject: Tensor) -> None:
    d = out.shape[1]
    if len(token) and d:
        with on_device(out):
            inject_kernel[(len(token), triton.cdiv(d, BLOCK))](out, delta, token, subject, d, BLOCK=BLOCK)


@torch.library.custom_op("rose::inject", mutates_args=())
def inject(hidden: Tensor, delta: Tensor, token: Tensor, subject: Tensor) -> Tensor:
    """`hidden` with each row's subject delta added at the row's token, as a new tensor [N, d]; differentiable in both."""
    if serving(hidden.device, "inject") == "reference":
        return reference.inject(hidden, delta, token, subject)
    _check(hidden, delta, token, subject)
    out = hidden.clone()
    _add_(out, delta, token, subject)
    return out


@torch.library.custom_op("rose::inject_", mutates_args=("hidden",))
def inject_(hidden: Tensor, delta: Tensor, token: Tensor, subject: Tensor) -> None:
    """The same in place, on a buffer that the caller owns; not differentiable."""
    if serving(hidden.device, "inject") == "reference":
        hidden.copy_(reference.inject(hidden, delta, token, subject))
        return
    _check(hidden, delta, token, subject)
    _add_(hidden, delta, token, subject)


@torch.library.custom_op("rose::row_gradients", mutates_args=())
def row_gradients(grad_out: Tensor, token: Tensor) -> Tensor:
    """The row gradients [B, d] float32 of an injection, from the gradient [N, d] of its output."""
    if serving(grad_out.device, "inject") == "reference":
        return reference.inject_backward(grad_out, token)
    check("grad_out", grad_out, (None, None), FLOATS)
    check("token", token, (None,), INTEGERS, grad_out)
    check_index("token", token, len(grad_out))
    d = grad_out.shape[1]
    row_grad = grad_out.new_empty(len(token), d, dtype=torch.float32)
    if row_grad.numel():
        with on_device(grad_out):
            gather_kernel[(len(token), triton.cdiv(d, BLOCK))](grad_out, token, row_grad, d, BLOCK=BLOCK)
    return row_grad


@torch.library.custom_op("rose::subject_gradients", mutates_args=())
def subject_gradients(grad_out: Tensor, token: Tensor, subject: Tensor, subjects: int) -> Tensor:
    """The gradient [subjects, d] float32 of an injection in its delta: each subject's row gradients, summed in row order."""
    if serving(grad_out.device, "inject") == "reference":
        rows = reference.inject_backward(grad_out, token)
        return rows.new_zeros(subjects, rows.shape[1]).index_add(0, subject, rows)
    check("grad_out", grad_out, (None, None), FLOATS)
    check("token", token, (None,), INTEGERS, grad_out)
    check("subject", subject, (len(token),), INTEGERS, grad_out)
    check_index("token", token, len(grad_out))
    check_index("subject", subject, subjects)
    d = grad_out.shape[1]
    grad_delta = grad_out.new_empty(subjects, d, dtype=torch.float32)
    if grad_delta.numel():
        with on_device(grad_out):
            scatter_kernel[(subjects, triton.cdiv(d, BLOCK))](grad_out, token, subject, grad_delta, len(token), d, BLOCK=BLOCK)
    return grad_delta


@inject.register_fake
def _(hidden, delta, token, subject):
    return torch.empty_like(hidden)


@inject_.register_fake
def _(hidden, delta, token, subject):
    return None


@row_gradients.register_fake
def _(grad_out, token):
    return grad_out.new_empty(token.shape[0], grad_out.shape[1], dtype=reference.wide_dtype(grad_out))


@subject_gradients.register_fake
def _(grad_out, token, subject, subjects):
    return grad_out.new_empty(subjects, grad_out.shape[1], dtype=reference.wide_dtype(grad_out))


def _setup(ctx, inputs, output):
    _, delta, token, subject = inputs
    ctx.subjects = len(delta)
    ctx.save_for_backward(token, subject)


def _backward(ctx, grad_out):
    token, subject = ctx.saved_tensors
    return grad_out, subject_gradients(grad_out.contiguous(), token, subject, ctx.subjects), None, None


inject.register_autograd(_backward, setup_context=_setup)
