"""Preconditioners: C in dW = R K^T (C + K K^T)^-1, given as what the write needs of it, P = C^-1 K (method.md section 2).

Identity is IGA (eq. 10): C = ridge I, P = K. Protected adds keys K_p that must not move, C = ridge I + K_p K_p^T: those of texts about
others, MEMIT's covariance with the few texts that matter in the place of a corpus, and those of earlier edits, with which a write is
a step of recursive least squares. No d_in x d_in matrix is made: the m x m Cholesky factor of ridge I + K_p^T K_p serves, and
grows by a block when keys join.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Protected keys that are widened to float64 at one time.
BLOCK = 512


@dataclass(frozen=True)
class Protected:
    """Keys K_p [d_in, m] float32 and the lower Cholesky factor [m, m] float64 of ridge I + K_p^T K_p."""

    keys: Tensor
    factor: Tensor
    ridge: float

    def joined(self, keys: Tensor) -> Protected:
        """With more keys [d_in, n]: [[L, 0], [X^T, chol(ridge I + K^T K - X^T X)]], X = L^-1 K_p^T K; O(m^2 n + n^3).

        ValueError where the keys are not finite.
        """
        k = keys.double()
        X = torch.linalg.solve_triangular(self.factor, _products(self.keys, k), upper=False)
        system = k.T @ k - X.T @ X
        system.diagonal().add_(self.ridge)
        corner, info = torch.linalg.cholesky_ex(system)
        if int(info):
            raise ValueError(f"the protected keys' system is not positive definite (leading minor {int(info)} of {len(system)})")
        top = torch.cat([self.factor, self.factor.new_zeros(X.shape)], 1)
        return Protected(torch.cat([self.keys, keys.float()], 1), torch.cat([top, torch.cat([X.T, corner], 1)]), self.ridge)

    def apply(self, K: Tensor) -> Tensor:
        """ridge C^-1 K [d_in, n] float32 by the push-through identity: K - K_p (ridge I + K_p^T K_p)^-1 K_p^T K, solved in float64.

        With it `rank_update_(W, K, R, P, ridge)` writes R K^T (C + K K^T)^-1.
        """
        out = K.to(torch.float64, copy=True)
        share = torch.cholesky_solve(_products(self.keys, out), self.factor)
        for i in range(0, self.keys.shape[1], BLOCK):
            out -= self.keys[:, i : i + BLOCK].double() @ share[i : i + BLOCK]
        return out.float()


def protect(keys: Tensor, ridge: float) -> Protected:
    """Protect keys [d_in, m]; m may be 0."""
    nothing = Protected(keys.new_zeros(len(keys), 0, dtype=torch.float32), keys.new_zeros(0, 0, dtype=torch.float64), ridge)
    return nothing.joined(keys)


def _products(keys: Tensor, k: Tensor) -> Tensor:
    """K_p^T K [m, n] float64."""
    blocks = [keys[:, i : i + BLOCK].double().T @ k for i in range(0, keys.shape[1], BLOCK)]
    return torch.cat([k.new_zeros(0, k.shape[1]), *blocks])
