"""Preconditioners: C in dW = R K^T (C + K K^T)^-1, given as what the write needs of it, P = C^-1 K (method.md section 2).

Identity is IGA (eq. 10): C = ridge I, P = K. Protected adds the keys K_p of texts that must not change, C = ridge I + K_p K_p^T: the
update then moves them as little as it can, which is MEMIT's covariance with the few texts that matter in the place of a
corpus, and no d_in x d_in matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rose_kernels import rank_gram


def protected(K: Tensor, protect: Tensor, ridge: float) -> Tensor:
    """ridge C^-1 K for C = ridge I + K_p K_p^T, by the push-through identity: K - K_p (ridge I + K_p^T K_p)^-1 K_p^T K.

    K [d_in, n] and protect (K_p) [d_in, m], float32; returns P [d_in, n] float32. The m x m system is solved in float64. With it
    `rank_update_(W, K, R, P, ridge)` writes R K^T (C + K K^T)^-1. ValueError where the system is not positive definite.
    """
    k, p = K.double(), protect.double()
    system = rank_gram(protect).tril()
    system = system + system.tril(-1).T
    system.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        raise ValueError(f"the protected keys' system is not positive definite (leading minor {int(info)} of {len(system)})")
    return (k - p @ torch.cholesky_solve(p.T @ k, factor)).float()
