"""One optimiser step for all subjects in one launch (method.md section 1): gradient tree, regularisers, Adam, projection.

    leaf centroid   c_r = mean of row_grad over the rows of relation r                          (eq. 11)
    root            g_s = mean of c_r over the relations of s + extra_grad_s + weight_decay * delta_s / (||delta_s|| v0_norm_s^2)
    Adam            with bias correction, then delta_s onto the ball ||delta_s|| <= clamp * v0_norm_s

One program owns a subject: it walks the features in blocks three times (norm of delta; tree, Adam and the new norm; projection), so
nothing is shared between programs, no atomics are needed, and the same inputs give the same bits. Definition and
contract: `reference.aggregate_step_`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rose_kernels import reference
from rose_kernels.backend import jit, on_device, serving, tl
from rose_kernels.contract import FLOATS, INTEGERS, check, check_offsets

BLOCK = 512
STATE = (torch.float32,)


@jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0: near 0 by its series, where the difference would cancel in float32."""
    return tl.where(x > -0.05, -x * (1 + x * (0.5 + x * (1 / 6 + x / 24))), 1 - tl.exp(x))


@jit
def aggregate_kernel(
    row_grad, relation_offset, subject_offset, delta, exp_avg, exp_avg_sq, step, v0_norm, active, extra_grad, centroids,
    d, lr, beta1, beta2, log_beta1, log_beta2, eps, weight_decay, clamp,
    HAS_EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    subject = tl.program_id(0)
    first_relation = tl.load(subject_offset + subject)
    last_relation = tl.load(subject_offset + subject + 1)
    lanes = tl.arange(0, BLOCK)
    stride = tl.full([], 0, tl.int64) + d  # 64-bit, so that offsets into large arrays do not wrap
    if tl.load(active + subject) == 0:
        for relation in range(first_relation, last_relation):
            for start in range(0, d, BLOCK):
                column = start + lanes
                tl.store(centroids + relation * stride + column, tl.zeros([BLOCK], tl.float32), column < d)
    else:
        state = subject * stride
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, d, BLOCK):
            column = start + lanes
            value = tl.load(delta + state + column, column < d, 0.0)
            squares += value * value
        norm = tl.sqrt(tl.sum(squares))
        radius = tl.load(v0_norm + subject)
        decay = tl.where(norm > 0, weight_decay / (tl.maximum(norm, 1e-38) * radius * radius), 0.0)

        count = tl.load(step + subject) + 1
        correction1 = one_minus_exp(count.to(tl.float32) * log_beta1)
        correction2 = one_minus_exp(count.to(tl.float32) * log_beta2)
        relations = (last_relation - first_relation).to(tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, d, BLOCK):
            column = start + lanes
            inside = column < d
            grad = tl.zeros([BLOCK], tl.float32)
            for relation in range(first_relation, last_relation):
                first_row = tl.load(relation_offset + relation)
                last_row = tl.load(relation_offset + relation + 1)
                leaf = tl.zeros([BLOCK], tl.float32)
                for row in range(first_row, last_row):
                    leaf += tl.load(row_grad + row * stride + column, inside, 0.0).to(tl.float32)
                leaf = leaf / (last_row - first_row).to(tl.float32)
                tl.store(centroids + relation * stride + column, leaf, inside)
                grad += leaf
            grad = grad / relations
            if HAS_EXTRA:
                grad += tl.load(extra_grad + state + column, inside, 0.0)
            value = tl.load(delta + state + column, inside, 0.0)
            grad += decay * value
            m = beta1 * tl.load(exp_avg + state + column, inside, 0.0) + (1 - beta1) * grad
            v = beta2 * tl.load(exp_avg_sq + state + column, inside, 0.0) + (1 - beta2) * grad * grad
            value = value - lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
            value = tl.where(inside, value, 0.0)
            tl.store(exp_avg + state + column, m, inside)
            tl.store(exp_avg_sq + state + column, v, inside)
            tl.store(delta + state + column, value, inside)
            squares += value * value
        norm = tl.sqrt(tl.sum(squares))
        limit = clamp * radius
        if norm > limit:
            for start in range(0, d, BLOCK):
                column = start + lanes
                value = tl.load(delta + state + column, column < d, 0.0)
                tl.store(delta + state + column, value * (limit / norm), column < d)
        tl.store(step + subject, count)


def _check(row_grad, relation_offset, subject_offset, delta, exp_avg, exp_avg_sq, step, v0_norm, active, extra_grad) -> None:
    check("row_grad", row_grad, (None, None), FLOATS)
    d = row_grad.shape[1]
    check("delta", delta, (None, d), STATE, row_grad)
    subjects = len(delta)
    check("relation_offset", relation_offset, (None,), INTEGERS, row_grad)
    check("subject_offset", subject_offset, (subjects + 1,), INTEGERS, row_grad)
    check_offsets("relation_offset", relation_offset, len(row_grad))
    check_offsets("subject_offset", subject_offset, len(relation_offset) - 1)
    for name, x in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check(name, x, (subjects, d), STATE, row_grad)
    check("step", step, (subjects,), (torch.int32,), row_grad)
    check("v0_norm", v0_norm, (subjects,), STATE, row_grad)
    check("active", active, (subjects,), (torch.bool,), row_grad)
    if extra_grad is not None:
        check("extra_grad", extra_grad, (subjects, d), STATE, row_grad)


@torch.library.custom_op("rose::aggregate_step_", mutates_args=("delta", "exp_avg", "exp_avg_sq", "step"))
def aggregate_step_(
    row_grad: Tensor,
    relation_offset: Tensor,
    subject_offset: Tensor,
    delta: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    v0_norm: Tensor,
    active: Tensor,
    extra_grad: Tensor | None = None,
    lr: float = 0.5,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.5,
    clamp: float = 4.0,
) -> Tensor:
    """One step in place; returns the centroids [M, d]. Arguments as in `reference.aggregate_step_`."""
    arrays = (row_grad, relation_offset, subject_offset, delta, exp_avg, exp_avg_sq, step, v0_norm, active, extra_grad)
    if serving(row_grad.device, "aggregate_step_") == "reference":
        return reference.aggregate_step_(*arrays, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, clamp=clamp)
    _check(*arrays)
    subjects, d = delta.shape
    centroids = row_grad.new_empty(len(relation_offset) - 1, d, dtype=torch.float32)
    if subjects:
        with on_device(row_grad):
            aggregate_kernel[(subjects,)](
                *arrays[:9], delta if extra_grad is None else extra_grad, centroids,
                d, lr, beta1, beta2, math.log(beta1), math.log(beta2), eps, weight_decay, clamp,
                HAS_EXTRA=extra_grad is not None, BLOCK=BLOCK,
            )  # fmt: skip
    return centroids


@aggregate_step_.register_fake
def _(row_grad, relation_offset, subject_offset, delta, *args, **kwargs):
    return row_grad.new_empty(relation_offset.shape[0] - 1, delta.shape[1], dtype=reference.wide_dtype(row_grad))
