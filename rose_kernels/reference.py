"""Every operator in plain PyTorch: its definition, and what serves where no faster backend does.

The Triton and C++ backends are tested against these functions in float64. Shapes come first in every docstring; arithmetic
is carried out in float32, or in float64 where an input is float64. Nothing here knows a model, a tokenizer or a file.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of float32 scratch that the in-place write may use at once; it bounds the extra memory of `add_low_rank_`.
WRITE_SCRATCH_BYTES = 8 << 20


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which we compute: float64 stays, everything narrower becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """The tensor in the dtype in which we compute."""
    return x.to(wide_dtype(x))


def inject(hidden: Tensor, delta: Tensor, token: Tensor, subject: Tensor) -> Tensor:
    """Add each row's subject delta at the row's token (method.md section 1).

        out[token[b]] = hidden[token[b]] + delta[subject[b]]        for every row b; all other tokens are copied

    hidden [N, d], delta [S, d], token [B] and subject [B] integer; the tokens of different rows are different.
    Returns [N, d] in the dtype of `hidden`, rounded once.
    """
    out = hidden.clone()
    out[token] = (wide(hidden[token]) + delta[subject]).to(hidden.dtype)
    return out


def inject_backward(grad_hidden: Tensor, token: Tensor) -> Tensor:
    """Row gradients of `inject`: grad_hidden [N, d] at token [B], in float32 (or float64): [B, d].

    They are kept per row, not summed over a subject, because the gradient tree (eq. 11) and the gradient-conflict score
    (eq. 6) both start from them.
    """
    return wide(grad_hidden[token])


def segment_mean(x: Tensor, offset: Tensor) -> Tensor:
    """Mean over consecutive segments: x [B, d], offset [G + 1] ascending from 0 to B, no segment empty: [G, d]."""
    return torch.segment_reduce(x, "mean", offsets=offset.long(), axis=0)


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
    *,
    lr: float = 0.5,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.5,
    clamp: float = 4.0,
) -> Tensor:
    """One optimiser step for all subjects: the two-level gradient tree, regularisers, Adam, projection (method.md section 1).

        leaf centroid   c_r = mean of row_grad over the rows of relation r                          (eq. 11)
        root            g_s = mean of c_r over the relations of subject s + extra_grad_s
                              + weight_decay * delta_s / (||delta_s|| * v0_norm_s^2)                (0 where delta_s = 0)
        Adam            with bias correction, on delta_s
        projection      delta_s onto the ball ||delta_s|| <= clamp * v0_norm_s

    row_grad [B, d]; relation_offset [M + 1]: the rows of relation r are relation_offset[r] .. relation_offset[r + 1];
    subject_offset [S + 1]: the relations of subject s, likewise; delta, exp_avg, exp_avg_sq [S, d] float and step [S] int32,
    changed in place; v0_norm [S]; active [S] bool: subjects that are not active keep every bit of their state;
    extra_grad [S, d] or None: the gradient of further regularisers.
    Returns the centroids [M, d]; those of inactive subjects are zero.
    """
    if row_grad.shape[0] != int(relation_offset[-1]):
        raise ValueError(f"row_grad has {row_grad.shape[0]} rows, relation_offset ends at {int(relation_offset[-1])}")
    relation_active = active.repeat_interleave((subject_offset[1:] - subject_offset[:-1]).long())
    centroids = segment_mean(wide(row_grad), relation_offset)
    centroids = torch.where(relation_active[:, None], centroids, 0.0)
    grad = segment_mean(centroids, subject_offset)
    if extra_grad is not None:
        grad = grad + extra_grad
    norm = delta.norm(dim=-1, keepdim=True)
    decay = weight_decay * delta / (norm * v0_norm[:, None] ** 2)
    grad = grad + torch.where(norm > 0, decay, 0.0)

    t = (step + 1).to(delta.dtype)[:, None]
    correction1, correction2 = -torch.expm1(t * math.log(beta1)), -torch.expm1(t * math.log(beta2))
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    new = delta - lr * (m / correction1) / ((v / correction2).sqrt() + eps)
    limit = clamp * v0_norm[:, None]
    length = new.norm(dim=-1, keepdim=True)
    new = torch.where(length > limit, new * (limit / length), new)

    keep = active[:, None]
    delta.copy_(torch.where(keep, new, delta))
    exp_avg.copy_(torch.where(keep, m, exp_avg))
    exp_avg_sq.copy_(torch.where(keep, v, exp_avg_sq))
    step.add_(active.to(step.dtype))
    return centroids


def target_nll(hidden: Tensor, head: Tensor, target: Tensor, softcap: float | None = None) -> Tensor:
    """Negative log-likelihood of one target token a row.

        nll[t] = -log softmax(cap(hidden[t] @ head^T))[target[t]],      cap(x) = softcap * tanh(x / softcap), or x

    hidden [T, d], head [V, d] of the same dtype, target [T] integer. Returns [T] float32 (float64 for float64 inputs);
    differentiable in `hidden`. The matrix product runs in the dtype of the inputs, everything after it in float32.
    """
    return F.cross_entropy(capped_logits(hidden, head, softcap), target.long(), reduction="none")


def capped_logits(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """Logits [T, V] of hidden [T, d] under head [V, d], soft-capped where a family caps them, in float32 (float64)."""
    return capped(wide(F.linear(hidden, head)), softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(logits / softcap), or the logits as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def rank_gram(K: Tensor, P: Tensor | None = None) -> Tensor:
    """K^T P, the n x n system without its ridge, in float64. K, P [d_in, n]; K itself where P is None."""
    P = K if P is None else P
    gram = K.double().T @ P.double()
    return (gram + gram.T) / 2


def rank_solve(gram: Tensor, P: Tensor, ridge: float = 1.0) -> Tensor:
    """V = (ridge I + G)^-1 P^T, the right factor of the weight update (method.md section 2).

    gram [n, n] float64, symmetric positive semi-definite, as K^T P is for P = K (IGA, eq. 10) and P = C^-1 K; P [d_in, n]. Returns
    V [n, d_in] float32 (float64 for float64 P). ValueError where the system is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if int(info):
        raise indefinite(int(info), len(gram), ridge)
    return torch.cholesky_solve(P.double().T, factor).to(wide_dtype(P)).contiguous()


def indefinite(minor: int, n: int, ridge: float) -> ValueError:
    """The error of a system whose leading minor is not positive."""
    return ValueError(f"ridge I + K^T P is not positive definite (leading minor {minor} of {n}, ridge {ridge})")


def add_low_rank_(W: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """W += U V in place: float32 arithmetic and one rounding to W's dtype, a block of rows at a time.

    W [d_out, d_in] of any float dtype, U [d_out, n], V [n, d_in]. Returns W.
    """
    check_write(W, U, V)
    dtype = wide(W).dtype
    U, V = U.to(dtype), V.to(dtype)
    rows = max(1, WRITE_SCRATCH_BYTES // max(1, 2 * W.shape[1] * dtype.itemsize))
    for block, u in zip(W.split(rows), U.split(rows), strict=True):
        block.copy_(torch.addmm(block.to(dtype), u, V))
    return W


def rank_update_(W: Tensor, K: Tensor, R: Tensor, P: Tensor | None = None, ridge: float = 1.0) -> tuple[Tensor, Tensor]:
    """The weight write W += R (ridge I + K^T P)^-1 P^T in place (method.md section 2, eq. 10).

    W [d_out, d_in], K [d_in, n], R [d_out, n], P [d_in, n] or None for K. Returns the factors (U [d_out, n], V [n, d_in])
    in float32, of which W received exactly U V. ValueError, with W untouched, where an input is not finite, shapes do not
    fit, or the system is not positive definite.
    """
    check_update(W, K, R, P)
    check_finite(K=K, P=P, R=R)
    V = rank_solve(rank_gram(K, P), K if P is None else P, ridge)
    U = R.to(V.dtype).contiguous()
    add_low_rank_(W, U, V)
    return U, V


def check_update(W: Tensor, K: Tensor, R: Tensor, P: Tensor | None = None) -> None:
    """ValueError where the shapes of an update do not fit, or W shares memory with another argument or within itself."""
    if W.dim() != 2 or K.dim() != 2 or R.shape != (W.shape[0], K.shape[1]) or K.shape[0] != W.shape[1]:
        raise ValueError(f"W {list(W.shape)} does not fit K {list(K.shape)} and R {list(R.shape)}")
    if P is not None and P.shape != K.shape:
        raise ValueError(f"K and P must be [d_in, n] alike, given {list(K.shape)} and {list(P.shape)}")
    check_device(W, K=K, R=R, P=P)
    check_overlap(W, K=K, R=R, P=P)


def check_write(W: Tensor, U: Tensor, V: Tensor) -> None:
    """ValueError where factors do not fit the weight, or W shares memory with one of them or within itself."""
    if W.dim() != 2 or U.dim() != 2 or V.dim() != 2 or W.shape != (U.shape[0], V.shape[1]) or U.shape[1] != V.shape[0]:
        raise ValueError(f"W {list(W.shape)} does not fit U {list(U.shape)} and V {list(V.shape)}")
    check_device(W, U=U, V=V)
    check_overlap(W, U=U, V=V)


def check_device(W: Tensor, **others: Tensor | None) -> None:
    """ValueError naming the first tensor that is not where W is."""
    for name, x in others.items():
        if x is not None and x.device != W.device:
            raise ValueError(f"{name} must be on {W.device} as W is, given {x.device}")


def check_overlap(W: Tensor, **others: Tensor | None) -> None:
    """ValueError where two elements of W are one place in memory, or another tensor lies within the stretch of memory that W spans."""
    near, far = sorted(zip(W.stride(), W.shape, strict=True), key=lambda axis: axis[0])
    if W.numel() > 1 and ((near[1] > 1 and near[0] == 0) or (far[1] > 1 and far[0] < near[0] * (near[1] - 1) + 1)):
        raise ValueError(f"W overlaps itself: strides {W.stride()} of shape {list(W.shape)}; clone it first")
    start, end = extent(W)
    for name, x in others.items():
        if x is not None:
            first, last = extent(x)
            if first < end and start < last:
                raise ValueError(f"W and {name} share memory; clone one of them first")


def extent(x: Tensor) -> tuple[int, int]:
    """The addresses from the first to past the last byte of a tensor; (0, 0) where it has none."""
    if not x.numel() or x.device.type == "meta":
        return 0, 0
    return x.data_ptr(), x.data_ptr() + (1 + sum(step * (n - 1) for step, n in zip(x.stride(), x.shape, strict=True))) * x.itemsize


def check_finite(**tensors: Tensor | None) -> None:
    """ValueError naming the first tensor that holds NaN or Inf."""
    for name, x in tensors.items():
        if x is not None and not torch.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or Inf")
